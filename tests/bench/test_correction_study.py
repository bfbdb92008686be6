"""The study of corrections from samples: that it measures what the plans compute."""

from __future__ import annotations

import copy

import torch
from networks import COUNTS, RHO, batches, imbsam, network

from benchmarks import correction_study
from imbsam_fast import ClassSplit, SplitCrossEntropy, TrainStep


def study() -> tuple[TrainStep, torch.Tensor, correction_study.Corrections]:
    """A step of a network whose rows do not influence each other, labels, the corrections."""
    model = network("group")
    step = TrainStep(model, SplitCrossEntropy(ClassSplit.from_counts(COUNTS)), imbsam(model))
    images, targets = next(batches(1))
    return step, targets, correction_study.Corrections(step, images, targets)


def test_the_tail_rows_alone_have_the_whole_correction() -> None:
    assert correction_study.RHO == RHO
    step, targets, corrections = study()
    before = copy.deepcopy(step.model.state_dict())
    tail = step.criterion.split.tail_mask(targets)
    whole = corrections.of(torch.ones_like(tail))
    assert whole.norm() > 0
    torch.testing.assert_close(corrections.of(tail), whole)
    assert all(torch.equal(v, before[name]) for name, v in step.model.state_dict().items())


def test_samples_hold_all_tail_rows_but_where_they_are_drawn_by_chance() -> None:
    step, targets, _ = study()
    tail = step.criterion.split.tail_mask(targets)
    found = {name: rows for name, rows, _ in correction_study.samples(step, targets, seed=0)}
    assert len(found) == 3 * len(correction_study.SHARES)
    for name, rows in found.items():
        assert "by chance" in name or bool(rows[tail].all())
        if name.startswith("0.5"):
            assert int(rows.sum()) == max(8, int(tail.sum()))

"""The study of corrections from samples: that it measures what the plans compute."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from networks import COUNTS, RHO, batches, imbsam, network

from benchmarks import correction_study, studies
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


def test_samples_hold_all_tail_rows_but_where_they_are_drawn_by_chance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(correction_study, "VARIED", 0.75)  # more than the tail rows
    step, targets, _ = study()
    tail = step.criterion.split.tail_mask(targets)
    found = dict(correction_study.samples(step, targets, seed=0))
    assert len(found) == len(correction_study.SHARES) + 3
    for name, drawn in found.items():
        assert len(drawn) == (4 if name.startswith("four") else 1)
        for first, second in drawn:
            assert torch.equal(first, second) == (not name.endswith("other head rows"))
            assert name.endswith("by chance") or bool(first[tail].all() and second[tail].all())
            if name == "sampled 0.5":
                assert int(first.sum()) == max(8, int(tail.sum()))


def test_a_mean_of_samples_and_the_batch_before() -> None:
    """Without batch statistics every sample with all tail rows has the whole correction."""
    step, targets, corrections = study()
    whole = corrections.of(torch.ones_like(targets, dtype=torch.bool))
    for name, drawn in correction_study.samples(step, targets, seed=0):
        if not name.endswith("by chance"):
            for rows in drawn:
                torch.testing.assert_close(corrections.of(*rows), whole)
    cosine, ratio = correction_study.compared(-2 * whole, whole)
    assert (cosine, ratio) == (pytest.approx(-1), pytest.approx(2))


def test_what_is_recorded_is_tabulated(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("sklearn")
    path = tmp_path / "correction.json"
    argv = ["--seeds", "1", "--epochs", "1", "2", "--json", str(path)]
    assert correction_study.main(argv) == 0
    found = studies.read(path)
    assert found.settings["epochs"] == [1, 2]
    names = {(row["preset"], row["name"]) for row in found.rows}
    assert len(names) == len(found.rows) == 2 * (len(correction_study.SHARES) + 4)
    for row in found.rows:
        before = row["name"] == correction_study.BEFORE
        batches = correction_study.BATCHES - before
        for epoch in row["epochs"].values():
            assert epoch["batches"] == batches and -1 < epoch["cosine"] < 0.999
    lines = correction_study.table(found)
    assert capsys.readouterr().out.splitlines() == lines and len(lines) == 2 + len(found.rows)
    assert "Measured (correction_study): " in found.provenance

"""The study of bfloat16: that it compares what the passes compute, and reads runs of any kind."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from networks import COUNTS, batches, imbsam, network
from tiny_runs import tiny_data_set, train

from benchmarks import bfloat16_study
from benchmarks.correction_study import Corrections, flat
from imbsam_fast import ClassSplit, SplitCrossEntropy, TrainStep


def test_the_same_passes_in_both_dtypes() -> None:
    model = network("group", torch.float32)
    step = TrainStep(model, SplitCrossEntropy(ClassSplit.from_counts(COUNTS)), imbsam(model))
    images, targets = next(batches(1))
    before = copy.deepcopy(model.state_dict())
    found = bfloat16_study.compared(step, images.float(), targets)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert list(found) == ["g_t", "g_p", "g_p - g_t"]
    for cosine, ratio in found.values():
        assert 0.9 < cosine < 1 - 1e-7 and 0.8 < ratio < 1.2
    everybody = torch.ones(len(targets), dtype=torch.bool)
    rounded = Corrections(step, images.float(), targets, torch.bfloat16)
    g_t = flat(rounded.gradient(everybody))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images.float())
        tail = step.criterion(logits, targets).tail
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(g_t, flat(torch.autograd.grad(tail, list(model.parameters()))))


@pytest.mark.parametrize("optimizer", ["sgd", "imbsam"])
def test_runs_are_read(optimizer: str, tmp_path: Path) -> None:
    run = train(tmp_path, optimizer, seed=1, epochs=1, batch_size=24)
    argv = [str(run.path), "--data-dir", "-", "--batches", "2"]
    with tiny_data_set():
        assert bfloat16_study.main([*argv, "--json", str(tmp_path / "found.json")]) == 0
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["seed"] == 1 and row["batches"] == 2
    assert 0.5 < row["g_p - g_t"]["cosine"] < 1

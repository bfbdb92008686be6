"""CUDA graphs of the plans that run parts of a batch, with a stand-in for the graph."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from graph_stand_in import Runtime, capturable, captured
from networks import COUNTS, batches, distance, imbsam, network
from torch import nn

from imbsam_fast import ClassSplit, SplitCrossEntropy, TrainStep
from imbsam_fast.training import sampled, step_graphs

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    return Runtime(monkeypatch)


class Seen(NamedTuple):
    """A step whose graphs are the stand-in's, and how many rows its parts had."""

    step: TrainStep
    sizes: list[tuple[int, ...]]

    @property
    def graphs(self) -> int:
        assert self.step.graphs is not None
        return sum(map(captured, self.step.graphs.kinds.values()))


def graphed(monkeypatch: pytest.MonkeyPatch, model: nn.Module, *args: Any, **settings: Any) -> Seen:
    monkeypatch.setattr(step_graphs, "check_capturable", lambda optimizer, grad_scaler: CPU)
    step = TrainStep(model, *args, cuda_graph=True, **settings)
    sizes: list[tuple[int, ...]] = []
    assert step.graphs is not None
    for graphs in step.graphs.kinds.values():
        graphs.step = capturable(graphs.step, 10, torch.float64, sizes)
    return Seen(step, sizes)


SPLITS = {
    "imbsam": ClassSplit.from_counts(COUNTS),
    "focal": ClassSplit.focal(COUNTS, 1.0, 0.8),
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_replays_are_the_steps_of_the_split_plan(monkeypatch, split):
    """Whose parts have few sizes; batches with ignored rows run as usual."""
    sizes = compare(monkeypatch, "group", split, plan="split")
    assert {size for parts in sizes for size in parts} <= {0, 8, 16}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(("norm", "share"), [("batch", 0.25), ("batch", 1.0), ("group", 0.25)])
def test_replays_are_the_steps_of_the_sampled_plan(monkeypatch, norm, share, every):
    """Batches without head or without tail rows, or with ignored rows, among them."""
    monkeypatch.setattr(sampled, "is_compiled", lambda model: True)  # as few sizes without graphs
    sizes = compare(
        monkeypatch, norm, SPLITS["imbsam"], plan="sampled", sample=share, perturb_every=every
    )
    multiple = 8 if norm == "group" else round(16 * share)
    assert sizes
    assert all(rows == 16 and part % multiple == 0 and part > 0 for rows, part in sizes)


def test_replays_of_the_joint_plan_count_the_steps_with_tail_rows(monkeypatch):
    """Labels on the CPU are looked at under `perturb_every`."""
    assert compare(monkeypatch, "batch", SPLITS["imbsam"], plan="joint", perturb_every=3) == []


def compare(
    monkeypatch: pytest.MonkeyPatch, norm: str, split: ClassSplit, **settings: Any
) -> list[tuple[int, ...]]:
    """Take the steps of a training with graphs and of one without, and return the parts' sizes."""
    model, expected = network(norm), network(norm)
    criterion = SplitCrossEntropy(split)
    seen = graphed(monkeypatch, model, criterion, imbsam(model), **settings)
    plain = TrainStep(expected, criterion, imbsam(expected), **settings)
    for i, (x, y) in enumerate(batches(40)):
        if i % 10 == 9:
            y[:3] = -100
        result, known = seen.step(x, y), plain(x, y)
        torch.testing.assert_close(result[:4], known[:4])
        assert (result.tail_share, result.perturbed) == (known.tail_share, known.perturbed)
        assert distance(model, expected) < 1e-12
    assert seen.graphs >= 1
    assert seen.step.state_dict() == plain.state_dict()
    return seen.sizes

"""Steps as CUDA graphs, with a stand-in for the graph: what a replay reads, writes and returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import COUNTS, batches, distance, imbsam, network
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep, split_loss
from imbsam_fast.training.cuda_graph import WARM_UP_STEPS, GraphedSteps

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


class StandIn:
    """Captures like a CUDA graph: nothing runs then, and a replay works on the same memory."""

    capturing: StandIn | None = None

    def replay(self) -> None:
        results = pytree.tree_leaves(self.work())
        for place, x in zip(pytree.tree_leaves(self.results), results):
            place.copy_(x)


@contextmanager
def capture(graph: StandIn, capture_error_mode: str) -> Iterator[None]:
    StandIn.capturing = graph
    yield
    StandIn.capturing = None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], Callable]:
    """Makes a step capturable by the stand-in."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": StandIn,
        "graph": capture,
        "current_stream": lambda device: stream,
        "Stream": lambda device: stream,
        "stream": lambda side: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def capturable(step: Callable) -> Callable:
        def captured(inputs: Any, targets: Tensor) -> Any:
            graph = StandIn.capturing
            if graph is None:
                return step(inputs, targets)
            graph.work = lambda: step(inputs, targets)
            graph.results = (torch.full((), torch.nan), torch.full((len(targets), 10), torch.nan))
            graph.results = tuple(r.double() for r in graph.results)
            return graph.results

        return captured

    return capturable


def train_step(model: nn.Module) -> TrainStep:
    return TrainStep(
        model, SplitCrossEntropy(ClassSplit.from_counts(COUNTS)), imbsam(model), "joint"
    )


def test_replays_are_the_steps_of_the_joint_plan(stand_in):
    """On new batches each time, among them some without head or tail rows, or with ignored ones."""
    model, expected = network("batch"), network("batch")
    graphed, plain = train_step(model), train_step(expected)

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        result = graphed.unconditional(x, y)
        return result.loss, result.logits

    steps = GraphedSteps(stand_in(step), CPU)
    kept = []
    for i, (x, y) in enumerate(batches(WARM_UP_STEPS + 9)):
        if i % 3 == 2:
            y[:4] = -100
        loss, logits = steps(x, y)
        result = plain(x, y)
        kept.append((loss, result.loss))
        torch.testing.assert_close((loss, logits), (result.loss, result.logits))
        assert distance(model, expected) < 1e-12
    assert len(steps.graphs) == 1
    for loss, expected_loss in kept:  # a later replay does not write into earlier results
        torch.testing.assert_close(loss, expected_loss)


def test_every_shape_has_a_graph_after_its_own_warm_up(stand_in):
    model = network("group")
    train = train_step(model)
    calls = []

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(x))
        result = train.unconditional(x, y)
        return result.loss, result.logits

    steps = GraphedSteps(stand_in(step), CPU)
    x, y = next(batches(1))
    for rows in [16] * 5 + [7] * 2 + [16] * 2 + [7] * 2:
        steps(x[:rows], y[:rows])
    channels_last = x.to(memory_format=torch.channels_last)
    steps(channels_last, y)
    assert calls == [16] * 5 + [7] * 2 + [16] * 2 + [7] * 2 + [16]
    assert len(steps.graphs) == 2  # channels_last has not warmed up


def test_the_unconditional_step_counts_rows_itself():
    """Also with a criterion made of a loss per row."""
    x, y = next(batches(1))
    y[::3] = -100
    split = ClassSplit.from_counts(COUNTS)
    for criterion in (
        SplitCrossEntropy(split),
        split_loss(lambda z, y: nn.functional.cross_entropy(z, y, reduction="none"), split),
    ):
        ends = []
        for call in ("__call__", "unconditional"):
            model = network("group")
            step = TrainStep(model, criterion, imbsam(model), "joint")
            getattr(step, call)(x, y)
            ends.append(model)
        assert distance(*ends) < 1e-12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plan": "split"}, "plan is 'split', expected with cuda_graph=True: the joint plan"),
        ({"plan": "auto"}, "plan is 'auto', expected with cuda_graph=True"),
        ({"plan": "joint", "micro_batch_size": 4}, "micro_batch_size is 4, expected with"),
        ({"plan": "joint", "grad_scaler": torch.amp.GradScaler("cpu")}, "grad_scaler is <"),
        ({"plan": "joint"}, r"param_groups\[0\]\['lr'\] is 0.05 and the parameters are on cpu"),
    ],
)
def test_what_cannot_be_captured_is_named(settings, message):
    model = network("group")
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    with pytest.raises(ValueError, match=message):
        TrainStep(model, criterion, imbsam(model), cuda_graph=True, **settings)


def test_the_split_plan_is_not_captured_as_another_one_under_batch_norm():
    model = network("batch")
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    with pytest.raises(ValueError, match="plan is 'split', expected with cuda_graph=True"):
        TrainStep(model, criterion, imbsam(model), "split", cuda_graph=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_graphs_on_a_gpu():
    ends = []
    for cuda_graph in (True, False):
        model = network("batch", torch.float32).cuda()
        lr = torch.tensor(0.05, device="cuda")
        base = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=5e-3)
        criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS)).cuda()
        step = TrainStep(model, criterion, ImbSAM(base), "joint", cuda_graph=cuda_graph)
        scheduler = torch.optim.lr_scheduler.StepLR(base, 2, 0.5)
        for x, y in batches(WARM_UP_STEPS + 6, torch.float32):
            step(x.cuda(), y)
            scheduler.step()
        ends.append(model.cpu())
    assert distance(*ends) < 1e-4

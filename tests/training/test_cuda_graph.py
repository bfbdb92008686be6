"""Steps as CUDA graphs, with a stand-in for the graph: what a replay reads, writes and returns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graph_stand_in import Runtime, StandIn, captured
from networks import COUNTS, batches, distance, imbsam, network
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep, split_loss
from imbsam_fast.training import sampled
from imbsam_fast.training.cuda_graph import (
    CHANGES,
    WARM_UP_STEPS,
    GraphedSteps,
    check_capturable,
    grain,
)
from imbsam_fast.training.rows import filled, rows_of
from imbsam_fast.training.step_graphs import constants, unconditional

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    return Runtime(monkeypatch)


@pytest.fixture
def stand_in(runtime: Runtime) -> Callable[[Callable], Callable]:
    """Makes a step capturable by the stand-in."""

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
        result = unconditional(graphed, x, y)
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
    assert captured(steps) == 1
    for loss, expected_loss in kept:  # a later replay does not write into earlier results
        torch.testing.assert_close(loss, expected_loss)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 64, 1000])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_parts_are_filled_up_with_rows_that_weigh_nothing(rows, share):
    split = ClassSplit.from_counts([500, 3], eta=100)
    targets = torch.zeros(rows, dtype=torch.int64)
    targets[: round(share * rows)] = 1
    targets = targets[torch.randperm(rows)]
    before = rows_of(SplitCrossEntropy(split), targets, same_passes=False)
    after = filled(before, grain(rows))
    for name in ("head", "tail"):
        was, now = getattr(before, name), getattr(after, name)
        size = int(now.sum())
        assert torch.equal(was & now, was)
        assert size == getattr(after, f"{name}_rows")
        assert size == rows or size % grain(rows) == 0
        assert size - int(was.sum()) < grain(rows) and (size > 0) == bool(was.any())
    assert (after.counted, after.tail_share) == (before.counted, before.tail_share)


def test_every_shape_has_a_graph_after_its_own_warm_up(stand_in):
    model = network("group")
    train = train_step(model)
    calls = []

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(x))
        result = unconditional(train, x, y)
        return result.loss, result.logits

    steps = GraphedSteps(stand_in(step), CPU)
    x, y = next(batches(1))
    for rows in [16] * 5 + [7] * 2 + [16] * 2 + [7] * 2:
        steps(x[:rows], y[:rows])
    channels_last = x.to(memory_format=torch.channels_last)
    steps(channels_last, y)
    assert calls == [16] * 5 + [7] * 2 + [16] * 2 + [7] * 2 + [16]
    assert captured(steps) == 2  # channels_last has not warmed up


def test_one_stream_of_the_models_device_and_one_pool(runtime, stand_in):
    """Whatever the current device is, and however many shapes there are."""
    steps = GraphedSteps(stand_in(lambda x, y: (x.sum(), x)), torch.device("cuda:1"))
    x = torch.ones(4, 10, dtype=torch.float64)
    for rows in (4, 2, 3):
        for _ in range(WARM_UP_STEPS + 2):
            targets = SimpleTargets(rows)
            steps(x[:rows], targets)
    ((device, stream),) = runtime.made
    assert device == torch.device("cuda:1")
    assert runtime.warm_ups == [stream] * (3 * WARM_UP_STEPS)
    assert len(runtime.captures) == 3 and len(set(runtime.captures)) == 1
    assert runtime.captures[0][0] is stream and runtime.captures[0][1] is not None


class SimpleTargets:
    """Targets that any device may be asked for."""

    dtype = torch.int64

    def __init__(self, rows: int) -> None:
        self.shape = (rows,)

    def __len__(self) -> int:
        return self.shape[0]

    def to(self, device: torch.device, **options: Any) -> SimpleTargets:
        return self

    def copy_(self, other: SimpleTargets, non_blocking: bool) -> None:
        pass


def graphed(stand_in: Callable, model: nn.Module) -> tuple[TrainStep, GraphedSteps]:
    train = train_step(model)

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        result = unconditional(train, x, y)
        return result.loss, result.logits

    return train, GraphedSteps(stand_in(step), CPU, partial(constants, train))


def change_setting(name: str, value: Any) -> Callable[[TrainStep], None]:
    def change(step: TrainStep) -> None:
        for group in step.optimizer.param_groups:
            group[name] = value

    return change


def load_optimizer(step: TrainStep) -> None:
    """Its state lies in new memory then."""
    step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))


def move_weights(step: TrainStep) -> None:
    for p in step.model.parameters():
        p.data = p.data.clone()


def freeze(step: TrainStep) -> None:
    next(step.model.parameters()).requires_grad_(False)


CHANGES_OF_CONSTANTS: dict[str, Callable[[TrainStep], None]] = {
    "momentum": change_setting("momentum", 0.5),
    "weight_decay": change_setting("weight_decay", 0.1),
    "nesterov": change_setting("nesterov", True),
    "rho": change_setting("rho", 0.3),
    "adaptive": change_setting("adaptive", True),
    "load_state_dict": load_optimizer,
    "p.data": move_weights,
    "eval": lambda step: step.model.eval() and None,
    "requires_grad": freeze,
}


@pytest.mark.parametrize("change", CHANGES_OF_CONSTANTS.values(), ids=CHANGES_OF_CONSTANTS.keys())
def test_a_graph_is_given_up_when_a_constant_changes(stand_in, change):
    """And steps are those of a training without graphs, before and after."""
    model, expected = network("batch"), network("batch")
    (train, steps), plain = graphed(stand_in, model), train_step(expected)
    seen = []
    for i, (x, y) in enumerate(batches(2 * (WARM_UP_STEPS + 2))):
        if i == WARM_UP_STEPS + 2:
            change(train)
            change(plain)
        steps(x, y)
        plain(x, y)
        seen.append(captured(steps))
        assert distance(model, expected) < 1e-12
    half = [0] * WARM_UP_STEPS + [1, 1]
    assert seen == half + half


def test_a_learning_rate_that_is_a_tensor_may_change(stand_in):
    model, expected = network("batch"), network("batch")
    (train, steps), plain = graphed(stand_in, model), train_step(expected)
    for step in (train, plain):
        change_setting("lr", torch.tensor(0.05, dtype=torch.float64))(step)
    for x, y in batches(WARM_UP_STEPS + 4):
        steps(x, y)
        plain(x, y)
        for step in (train, plain):
            step.optimizer.param_groups[0]["lr"].mul_(0.5)
        assert distance(model, expected) < 1e-12
    assert captured(steps) == 1


def test_a_momentum_that_changes_in_every_step_is_honoured_and_said(stand_in):
    """As OneCycleLR and CyclicLR change it."""
    model, expected = network("batch"), network("batch")
    (train, steps), plain = graphed(stand_in, model), train_step(expected)
    message = r"captures nothing as long as param_groups\[0\]\['momentum'\] changes"
    with pytest.warns(UserWarning, match=message) as warned:
        for i, (x, y) in enumerate(batches(CHANGES + 5)):
            for step in (train, plain):
                change_setting("momentum", 0.9 - i / 100)(step)
            steps(x, y)
            plain(x, y)
    assert distance(model, expected) < 1e-12
    assert captured(steps) == 0 and len(warned) == 1
    for x, y in batches(WARM_UP_STEPS + 1):  # then it is captured after all
        steps(x, y)
    assert captured(steps) == 1


def test_the_scale_of_a_grad_scaler_may_change_and_its_factors_are_constants():
    model = network("batch")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    step = train_step(model)
    step.grad_scaler = scaler
    before = constants(step)
    scaler.update(8.0) if scaler._scale is not None else None
    assert constants(step) == before
    scaler.set_growth_factor(3.0)
    assert constants(step) != before


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
        for blind in (False, True):
            model = network("group")
            step = TrainStep(model, criterion, imbsam(model), "joint")
            unconditional(step, x, y) if blind else step(x, y)
            ends.append(model)
        assert distance(*ends) < 1e-12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plan": "split"}, r"param_groups\[0\]\['lr'\] is 0.05 and the parameters are on cpu"),
        ({"plan": "auto"}, "plan is 'auto', expected with cuda_graph=True"),
        ({"plan": "joint", "micro_batch_size": 4}, "micro_batch_size is 4, expected with"),
        ({"plan": "joint"}, r"param_groups\[0\]\['lr'\] is 0.05 and the parameters are on cpu"),
    ],
)
def test_what_cannot_be_captured_is_named(settings, message):
    model = network("group")
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    with pytest.raises(ValueError, match=message):
        TrainStep(model, criterion, imbsam(model), cuda_graph=True, **settings)


def on_a_gpu(base: type[torch.optim.Optimizer], **settings: Any) -> Any:
    """An ImbSAM whose parameters say that they are on a GPU, without one."""
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(3, device="cuda"))]
        lr = torch.empty((), device="cuda")
    group = {"params": params, "lr": lr, **settings}
    inner = base([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    return SimpleNamespace(param_groups=[group], base=inner)


def test_what_only_the_host_knows_is_not_captured():
    scaler = torch.amp.GradScaler("cpu")
    check_capturable(on_a_gpu(torch.optim.SGD), scaler)
    check_capturable(on_a_gpu(torch.optim.Adam, capturable=True, fused=None), scaler)
    check_capturable(on_a_gpu(torch.optim.Adam, capturable=False, fused=True), None)
    check_capturable(on_a_gpu(torch.optim.Adagrad), None)
    counts = r"param_groups\[0\]\['capturable'\] is False, expected True or fused=True"
    with pytest.raises(ValueError, match=counts):
        check_capturable(on_a_gpu(torch.optim.Adam, capturable=False, fused=None), None)
    with pytest.raises(ValueError, match="base is Adagrad, expected with grad_scaler and cuda_gr"):
        check_capturable(on_a_gpu(torch.optim.Adagrad), scaler)


def test_the_split_plan_is_not_captured_as_another_one_under_batch_norm():
    model = network("batch")
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    message = "plan is 'split', expected with cuda_graph=True: the joint or the sampled plan, or"
    with pytest.raises(ValueError, match=message):
        TrainStep(model, criterion, imbsam(model), "split", cuda_graph=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("norm", "plan"),
    [("batch", "joint"), ("group", "split"), ("batch", "sampled"), ("group", "sampled")],
)
def test_graphs_on_a_gpu(norm, plan, monkeypatch):
    monkeypatch.setattr(sampled, "is_compiled", lambda model: True)  # as few sizes without graphs
    ends = []
    for cuda_graph in (True, False):
        model = network(norm, torch.float32).cuda()
        lr = torch.tensor(0.05, device="cuda")
        base = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=5e-3)
        criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS)).cuda()
        step = TrainStep(model, criterion, ImbSAM(base), plan, cuda_graph=cuda_graph)
        scheduler = torch.optim.lr_scheduler.StepLR(base, 2, 0.5)
        for x, y in batches(3 * WARM_UP_STEPS + 6, torch.float32):
            step(x.cuda(), y)
            scheduler.step()
        ends.append(model.cpu())
    assert distance(*ends) < 1e-4

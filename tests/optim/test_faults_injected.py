"""Training steps that fail at every single point: weights and state stay what they were.

The step after a failure must end bit for bit where it would have ended without one.
"""

from __future__ import annotations

import copy
import itertools
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from networks import COUNTS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from imbsam_fast import ClassSplit, ImbSAM, LeanImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.ops import dispatch, updates
from imbsam_fast.ops import operators as phases

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(10, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(10)  # one row of every class, half of them tail


class Watched(torch.autograd.Function):
    """The identity, which calls `watch` when it runs forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, watch: Callable[[str], Tensor | None]) -> Tensor:
        ctx.watch = watch
        watch("forward")
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        factor = ctx.watch("backward")
        return grad if factor is None else grad * factor, None


class Watch(nn.Module):
    """A layer that does `action` at its n-th pass of one kind, counted from `arm`."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[str] = []
        self.at: tuple[str, int] | None = None

    def arm(self, kind: str, number: int, action: Callable[[], Tensor | None]) -> None:
        self.passes, self.at, self.action = [], (kind, number), action

    def watch(self, kind: str) -> Tensor | None:
        self.passes.append(kind)
        return self.action() if self.at == (kind, self.passes.count(kind)) else None

    def forward(self, x: Tensor) -> Tensor:
        return Watched.apply(x, self.watch)


BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.01),
    "Adam": torch.optim.Adam,
}


class Training:
    """A small network in the middle of its training, and where its next step ends."""

    def __init__(
        self,
        plan: str,
        base: str = "SGD",
        norm: str = "layer",
        warm: int = 1,
        classes: int = 10,
        master_weights: bool = False,
        kind: type[ImbSAM] = ImbSAM,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        norms = {"layer": nn.LayerNorm(3), "batch": nn.BatchNorm1d(3)}
        self.watch = Watch()
        first, last = nn.Linear(4, 3), nn.Linear(3, 10)
        dtype = torch.bfloat16 if master_weights else torch.float64
        self.model = nn.Sequential(first, norms[norm], self.watch, last).to(dtype)
        self.inputs = X.to(dtype)
        groups = [
            {"params": list(first.parameters()), "lr": 0.1},
            {"params": [*self.model[1].parameters(), *last.parameters()], "lr": 0.05},
        ]
        more = {"master_weights": True} if master_weights else {}
        self.optimizer = kind(BASES[base](groups), rho=0.2, **more)
        criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
        self.step = TrainStep(self.model, criterion, self.optimizer, plan, **options)
        self.targets = Y % classes
        for _ in range(warm):
            self.take_step()
        self.start = self.state()
        self.watch.passes = []
        self.take_step()
        self.passes, self.end = self.watch.passes, self.state()
        self.go_back()

    def take_step(self) -> None:
        self.step(self.inputs, self.targets)

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def go_back(self) -> None:
        self.model.load_state_dict(self.start[0])
        self.optimizer.load_state_dict(copy.deepcopy(self.start[1]))

    def is_at(self, expected: tuple[dict[str, Any], dict[str, Any]], statistics: bool) -> bool:
        """Bit for bit; BatchNorm's statistics only where asked for."""
        buffers = {} if statistics else dict(self.model.named_buffers())
        weights, state = expected
        found, found_state = self.model.state_dict(), self.optimizer.state_dict()
        return (
            all(torch.equal(found[k], v) for k, v in weights.items() if k not in buffers)
            and found_state["state"].keys() == state["state"].keys()
            and all(
                torch.equal(found_state["state"][p][k], v)
                for p, of_p in state["state"].items()
                for k, v in of_p.items()
            )
            and found_state["param_groups"] == state["param_groups"]
        )

    def fails(
        self, error: type[BaseException], injected: AbstractContextManager | None = None
    ) -> None:
        """The next step raises `error`, and nothing has changed."""
        with pytest.raises(error), injected or nullcontext():
            self.take_step()
        self.is_idle()
        assert self.is_at(self.start, statistics=False)
        self.model.load_state_dict(self.start[0])

    def goes_on(self) -> None:
        """The next step ends where it would have ended without a failure before it."""
        self.watch.at = None
        self.take_step()
        assert self.is_at(self.end, statistics=True)
        self.go_back()

    def is_idle(self) -> None:
        assert not self.optimizer.is_perturbed
        assert all(p.grad is None for p in self.model.parameters())
        for m in self.model.modules():
            assert getattr(m, "track_running_stats", True)


TRAININGS: list[dict[str, Any]] = [
    {"plan": "joint"},
    {"plan": "split"},
    {"plan": "joint", "base": "Adam", "micro_batch_size": 5},
    {"plan": "split", "norm": "batch", "micro_batch_size": 3},
    {"plan": "joint", "norm": "batch", "batch_norm": "twice", "max_norm": 0.1, "warm": 0},
    {"plan": "split", "max_norm": 0.1},
    {"plan": "split", "master_weights": True, "warm": 0},
    {"plan": "joint", "master_weights": True, "base": "Adam"},
]
each_training = pytest.mark.parametrize("settings", TRAININGS, ids=str)


# ---------------------------------------------------------------- exceptions and Ctrl-C


def raises(error: type[BaseException]) -> Callable[[], None]:
    def action() -> None:
        raise error("injected")

    return action


ERRORS: dict[type[BaseException], Callable[[], None]] = {
    RuntimeError: raises(RuntimeError),
    torch.OutOfMemoryError: raises(torch.OutOfMemoryError),
    KeyboardInterrupt: lambda: signal.raise_signal(signal.SIGINT),
}


@each_training
@pytest.mark.parametrize("error", ERRORS)
def test_every_forward_and_every_backward(settings, error):
    training = Training(**settings)
    assert len(training.passes) >= 5
    for kind in ("forward", "backward"):
        for number in range(1, training.passes.count(kind) + 1):
            training.watch.arm(kind, number, ERRORS[error])
            training.fails(error)
            training.goes_on()


@pytest.mark.parametrize(("policy", "most"), [("once", 1), ("twice", 2)])
def test_statistics_of_a_failed_step_are_those_of_the_passes_that_ran(policy, most):
    """As after a failed step of SGD; the layers go on counting."""
    training = Training("joint", norm="batch", batch_norm=policy)
    norm = training.model[1]
    counts = []
    for kind, number in itertools.product(("forward", "backward"), (1, 2)):
        before = int(norm.num_batches_tracked)
        training.watch.arm(kind, number, raises(RuntimeError))
        with pytest.raises(RuntimeError, match="injected"):
            training.take_step()
        counts.append(int(norm.num_batches_tracked) - before)
    assert counts == [1, most, 1, 1]


# ---------------------------------------------------------------- out of memory, at every operator


class AtOperator(TorchDispatchMode):
    """Does `action` before the operator call of a number; calls are those that `counts` picks.

    Operators of this package are seen from inside, so that what a backend calls counts too.
    """

    def __init__(
        self,
        number: int = 0,
        action: Callable[[], None] = ERRORS[torch.OutOfMemoryError],
        counts: Callable[[Any], bool] = lambda operator: True,
    ) -> None:
        super().__init__()
        self.number, self.action, self.counts, self.calls = number, action, counts, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.counts(func):
            self.calls += 1
            if self.calls == self.number:
                self.action()
        if func.namespace != "imbsam_fast":
            return func(*args, **(kwargs or {}))
        with self:
            name = f"_{func.overloadpacket.__name__}"
            defined = phases if hasattr(phases, name) else updates
            return getattr(defined, name)(*args, **(kwargs or {}))


def allocates(operator: Any) -> bool:
    """Whether the operator returns memory that it did not get."""
    returns = operator._schema.returns
    return any(r.alias_info is None and "Tensor" in str(r.type) for r in returns)


def operators(training: Training, **options: Any) -> int:
    with AtOperator(**options) as counter:
        training.take_step()
    training.go_back()
    return counter.calls


class BaseError(Exception):
    """Raised where the base's own step() fails: what it leaves is its own."""


def base_steps_apart(training: Training) -> None:
    step = training.optimizer.base.step

    def marked() -> None:
        try:
            step()
        except torch.OutOfMemoryError as error:
            raise BaseError from error

    training.optimizer.base.step = marked  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("backend", "settings"),
    [("native", settings) for settings in TRAININGS]
    + [("reference", settings) for settings in (*TRAININGS[:5:4], {"plan": "joint", "classes": 5})],
    ids=str,
)
def test_out_of_memory_at_every_operator(backend, settings):
    with dispatch.use_backend(backend):
        training = Training(**settings)
        number = operators(training, counts=allocates)
        assert number > 50
        if settings.get("base") == "Adam":
            base_steps_apart(training)
        for i in range(1, number + 1):
            try:
                training.fails(torch.OutOfMemoryError, AtOperator(i, counts=allocates))
                if i % 5 == 0:
                    training.goes_on()
            except BaseError:
                training.is_idle()
                training.go_back()


def test_out_of_memory_at_every_operator_under_a_grad_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
    training = Training("split", grad_scaler=scaler)
    number = operators(training, counts=allocates)
    for i in range(1, number + 1):
        training.fails(torch.OutOfMemoryError, AtOperator(i, counts=allocates))
    training.goes_on()


@pytest.mark.parametrize("plan", ["joint", "split"])
def test_out_of_memory_at_every_operator_leaves_the_weights_of_a_lean_optimizer(plan):
    """Its momentum takes up gradients as they come; but for a first step it stays usable."""
    training = Training(plan, kind=LeanImbSAM)
    number = operators(training, counts=allocates)
    for i in range(1, number + 1):
        with pytest.raises(torch.OutOfMemoryError), AtOperator(i, counts=allocates):
            training.take_step()
        training.is_idle()
        found = training.model.state_dict()
        assert all(torch.equal(found[k], v) for k, v in training.start[0].items())
        training.go_back()
    training.goes_on()


@pytest.mark.parametrize(
    "settings",
    [
        {"plan": "joint"},
        {"plan": "split"},
        {"plan": "split", "master_weights": True},
    ],
    ids=str,
)
def test_ctrl_c_at_every_operator(settings):
    """The step is either not taken or taken, never half of it."""
    training = Training(**settings)
    taken = []
    for i in range(1, operators(training) + 1):
        with pytest.raises(KeyboardInterrupt), AtOperator(i, ERRORS[KeyboardInterrupt]):
            training.take_step()
        training.is_idle()
        taken.append(training.is_at(training.end, statistics=True))
        assert taken[-1] or training.is_at(training.start, statistics=True)
        training.go_back()
    assert taken == sorted(taken) and 0 < sum(taken) < 15  # what is left is what a result tells
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---------------------------------------------------------------- not a number, in every backward


def overflows(value: float) -> Callable[[], Tensor]:
    return lambda: torch.tensor(value, dtype=torch.float64)


def backwards(training: Training) -> Iterator[int]:
    yield from range(1, training.passes.count("backward") + 1)


@each_training
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_skips_the_step_under_a_grad_scaler(settings, value):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
    training = Training(**{**settings, "warm": 1}, grad_scaler=scaler)
    for number in backwards(training):
        scaler.update(4.0)
        training.watch.arm("backward", number, overflows(value))
        training.take_step()
        assert scaler.get_scale() == 2.0
        training.is_idle()
        assert training.is_at(training.start, statistics=False)
        assert all(b.isfinite().all() for b in training.model.buffers())
        training.model.load_state_dict(training.start[0])
        training.goes_on()  # to the same bits: scales are powers of two


@each_training
def test_without_a_grad_scaler_it_reaches_the_weights_as_with_sgd(settings):
    training = Training(**settings)
    for number in backwards(training):
        training.watch.arm("backward", number, overflows(float("nan")))
        training.take_step()
        training.is_idle()
        assert training.model[0].weight.isnan().all()
        training.go_back()

"""Optimizer steps and phases as contestants: ours, the authors' and others.

What returns operations also makes their data, before a clock starts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.dispatch import backend_name, use_backend
from ..optim import ImbSAM
from . import peers
from .measure import Contestant, Operation, Stopwatch
from .report import Report
from .shapes import Shape, describe, elements

STEP = "ImbSAM optimizer step"
AUTHORS = "authors' sequence, SGD"
AUTHORS_FUSED = "authors' sequence, SGD(fused=True)"
LR, MOMENTUM, WEIGHT_DECAY, RHO = 0.1, 0.9, 5e-4, 0.05
ADAMW_LR = 1e-3

# The data that calls go through in turn: more than a last-level cache keeps.
ROTATED_BYTES = 256_000_000


def ours() -> str:
    """The name of the contestant that runs the backend chosen for the CPU."""
    return f"imbsam-fast, {backend_name('cpu')}"


def backends() -> dict[str, str]:
    """Contestant name -> backend, the chosen one first."""
    return {f"imbsam-fast, {b}": b for b in (backend_name("cpu"), "reference")}


def running_on(backend: str) -> AbstractContextManager[None]:
    """`use_backend` for a backend other than the chosen one; nothing for that, as users run it."""
    return nullcontext() if backend == backend_name("cpu") else use_backend(backend)


def rotated_sets(shapes: Sequence[Shape], total_bytes: int = ROTATED_BYTES) -> int:
    """How many sets of five lists it takes until none is still cached at its next turn.

    At most 64: beyond that the many objects of the contestants would themselves fill the caches.
    """
    return max(1, min(64, math.ceil(total_bytes / (5 * 4 * elements(shapes)))))


def phase_operations(
    shapes: Sequence[Shape],
    size: str | None = None,  # what to call them, if not by their number
    sets: int = 1,
    contestants: dict[str, str] | None = None,
) -> list[Operation]:
    """Every operator on lists of tensors, on its own, gradients kept: kernels and checks.

    `contestants` maps names to backends. A call a set of tensors.

    bytes: squared_norm 1n read; perturb_ 2n read, 2n written; sgd_update_ 4n read, 2n written;
    merge_ 3n read, 2n written; grad_check 2n read
    """
    n = 4 * elements(shapes)
    rotated = [[random_tensors(shapes, x) for x in (0.02, 0.02, *[1e-3] * 4)] for _ in range(sets)]
    partials = ops.squared_norm(rotated[0][2])
    lr = torch.tensor(LR, dtype=torch.float64)

    def squared_norm(theta, saved, g_t, g_h, g_p, m) -> None:
        ops.squared_norm(g_t)

    def perturb_(theta, saved, g_t, g_h, g_p, m) -> None:
        ops.perturb_(theta, g_t, partials, RHO)

    def sgd_update_(theta, saved, g_t, g_h, g_p, m) -> None:
        ops.sgd_update_(theta, saved, g_h, g_p, m, lr, MOMENTUM, 0.0, WEIGHT_DECAY, False, False)

    def merge_(theta, saved, g_t, g_h, g_p, m) -> None:
        ops.merge_(theta, saved, g_h, g_p)

    def grad_check(theta, saved, g_t, g_h, g_p, m) -> None:
        ops.grad_check(g_h, g_p)

    counts = {squared_norm: 1, perturb_: 4, sgd_update_: 6, merge_: 5, grad_check: 2}

    def on_backend(call: Callable[..., None], backend: str) -> Contestant:
        def contestant(watch: Stopwatch) -> None:
            with running_on(backend), watch.lap("call"):
                for lists in rotated:
                    call(*lists)

        return contestant

    return [
        Operation(
            call.__name__,
            size or describe(shapes),
            {who: on_backend(call, b) for who, b in (contestants or backends()).items()},
            bytes=count * n,
            calls=sets,
        )
        for call, count in counts.items()
    ]


@dataclass
class Workspace:
    """Everything of the size of the weights that the contestants of a group share."""

    theta: list[Tensor]
    m: list[Tensor]
    held: list[Tensor]
    epsilon: list[Tensor]

    @functools.cached_property
    def v(self) -> list[Tensor]:
        """Second moments, for those whose base has them."""
        return [torch.full_like(t, 1e-6) for t in self.theta]


class Contender(NamedTuple):
    """Who takes part in a comparison of optimizers, and how it is made on a workspace."""

    # Returns what has the calls first_step, second_step and third_step, or the last of them.
    make: Callable[[Any, Workspace], Any]
    moves: int  # times the bytes of all weights, in one step
    fused: bool = False  # settings of the base that `make` gets, an SGD
    foreach: bool = False
    backend: str | None = None
    adamw: type[torch.optim.AdamW] | None = None  # what the base is instead


class Rules(NamedTuple):
    """One kind of step: what it is called, its calls in order, and the bytes it cannot avoid."""

    name: str
    calls: tuple[str, ...]
    moves: int  # times the bytes of all weights: the fewest, which is what our kernels move


IMBSAM = Rules(STEP, ("first_step", "second_step", "third_step"), 11)


def imbsam(backend: str, moves: int = IMBSAM.moves) -> Contender:
    """Our optimizer on `backend`, which moves `moves` n bytes a step."""
    return Contender(lambda base, _: ImbSAM(base, RHO), moves, backend=backend)


def authors(fused: bool = False, foreach: bool = False) -> Contender:
    """27n: 2n to hold; 8n for norm, copy, scaling, theta + epsilon; 6n to restore and add; SGD."""

    def make(base: torch.optim.SGD, work: Workspace) -> peers.AuthorsSequence:
        return peers.AuthorsSequence(base, RHO, work.held, work.epsilon)

    return Contender(make, 21 if fused else 27, fused, foreach)


def default_contenders() -> dict[str, Contender]:
    """Every backend that runs here, and the authors' code twice."""
    found = {name: imbsam(backend) for name, backend in backends().items()}
    return {**found, AUTHORS: authors(), AUTHORS_FUSED: authors(fused=True)}


class StepData:
    """The workspaces for one group of optimizer comparisons.

    Every contestant has parameters of its own that share the memory of one theta (unless it
    gives them another, as some do), and its own gradients; momentum and scratch are shared.
    Values drift as all of them step on the same weights, which costs no time.
    """

    def __init__(self, shapes: Sequence[Shape], sets: int = 1) -> None:
        self.shapes = shapes
        self.work = [
            Workspace(*(random_tensors(shapes, x) for x in (0.02, 1e-3, 0.0, 0.0)))
            for _ in range(sets)
        ]

    def step_operation(
        self, rules: Rules, contenders: dict[str, Contender], size: str | None = None
    ) -> Operation:
        """The calls of one step, with gradients freed as in training.

        Before each call, and not timed, the gradients are made as a backward pass makes them:
        new tensors in `p.grad`, the last parameter's first. Nothing else refers to them, so
        that every contestant frees them inside its own calls.
        """
        n = 4 * elements(self.shapes)
        return Operation(
            rules.name,
            size or describe(self.shapes),
            {who: self._contestant(rules.calls, c) for who, c in contenders.items()},
            bytes=rules.moves * n,
            moved={who: c.moves * n for who, c in contenders.items()},
            calls=len(self.work),
        )

    def _contestant(self, calls: Sequence[str], contender: Contender) -> Contestant:
        bases = [base_on(work, contender) for work in self.work]
        steppers = [contender.make(base, work) for base, work in zip(bases, self.work)]
        params = [base.param_groups[0]["params"] for base in bases]
        backend = contender.backend or backend_name("cpu")

        def contestant(watch: Stopwatch) -> None:
            for call in calls:
                for theta in params:
                    for p in reversed(theta):
                        p.grad = torch.full_like(p, 1e-3)
                with running_on(backend), watch.lap(call):
                    for stepper in steppers:
                        getattr(stepper, call)()

        return contestant


def base_on(work: Workspace, contender: Contender) -> torch.optim.Optimizer:
    """The contender's base on parameters of its own, in the memory of the workspace."""
    params = [t.detach().requires_grad_() for t in work.theta]
    fused, foreach = contender.fused or None, contender.foreach or None
    if contender.adamw is None:
        base: torch.optim.Optimizer = sgd(params, fused, foreach)
        for p, m in zip(params, work.m):
            base.state[p]["momentum_buffer"] = m
        return base
    base = contender.adamw(
        params, lr=ADAMW_LR, weight_decay=WEIGHT_DECAY, fused=fused, foreach=foreach
    )
    for p, m, v in zip(params, work.m, work.v):
        base.state[p].update(step=torch.tensor(100.0), exp_avg=m, exp_avg_sq=v)
    return base


def sgd(
    params: Sequence[Tensor], fused: bool | None = None, foreach: bool | None = None
) -> torch.optim.SGD:
    """SGD with the momentum and weight decay that all contestants share."""
    return torch.optim.SGD(
        params, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=fused, foreach=foreach
    )


def random_tensors(shapes: Sequence[Shape], scale: float) -> list[Tensor]:
    """Normal float32 tensors, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.empty(shape).normal_(0, scale, generator=generator) for shape in shapes]


# ---------------------------------------------------------------- what the numbers say


def step_summary(report: Report) -> list[str]:
    """One line for every size at which the optimizer step was measured."""
    lines = []
    for t in report.timings:
        if (t.operation, t.contestant) != (STEP, ours()):
            continue
        fused, default = (report.ms(STEP, c, t.size) / t.ms for c in (AUTHORS_FUSED, AUTHORS))
        lines.append(
            f"{STEP} ({t.size}): {fused:.2f} times faster than the authors' sequence with "
            f"SGD(fused=True), {default:.2f} times with default SGD, at "
            f"{t.percent_of_limit or math.nan:.0f} % of the machine's limit"
        )
    return lines

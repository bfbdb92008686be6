"""The machine's limits, the losses, and what `imbsam-fast bench` compares.

What returns operations also makes their data, before a clock starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..losses import SplitCrossEntropy, SplitLoss
from ..ops import native
from ..split import ClassSplit
from . import peers
from .measure import LIMIT, Contestant, Group, Operation, Stopwatch
from .optimizers import (
    IMBSAM,
    ROTATED_BYTES,
    StepData,
    backends,
    default_contenders,
    ours,
    phase_operations,
    running_on,
    step_summary,
)
from .report import Report
from .shapes import resnet32_shapes, resnet50_shapes

TAIL_FRACTION = 0.43  # of the rows of an iNaturalist 2018 batch, eta = 100
MASKS = "authors' boolean masks"
ROW_WEIGHTS = "cross_entropy, row weights"


# ---------------------------------------------------------------- the machine

# Bytes that each kind of traffic moves, in those of one array.
TRAFFIC = {"read": 1, "copy": 2, "triad": 3}


def limit_operations(size: int = 160_000_000) -> list[Operation]:
    """The memory bandwidth of this machine, on arrays of `size` bytes, more than caches hold.

    bytes: read b 1n; copy a = b 1n read, 1n written; triad a = b + 3 c 2n read, 1n written
    """
    a, b, c = (torch.full((size // 4,), x) for x in (0.0, 1.0, 2.0))
    threads = torch.get_num_threads()

    def bandwidth(kind: str, stream: bool) -> Contestant:
        def contestant(watch: Stopwatch) -> None:
            with watch.lap("call"):
                native._C.bandwidth(
                    kind, stream, a.data_ptr(), b.data_ptr(), c.data_ptr(), len(b), threads
                )

        return contestant

    def torch_copy(watch: Stopwatch) -> None:
        with watch.lap("call"):
            a.copy_(b)

    contestants: dict[str, dict[str, Contestant]] = {kind: {} for kind in TRAFFIC}
    if native._C is not None:
        for kind, found in contestants.items():
            found["plain stores" if kind != "read" else "no stores"] = bandwidth(kind, False)
            if kind != "read":
                found["streaming stores"] = bandwidth(kind, True)
    contestants["copy"]["torch copy_"] = torch_copy
    return [
        Operation(LIMIT, f"{kind}, {size / 1e6:.0f} MB", found, bytes=TRAFFIC[kind] * 4 * len(b))
        for kind, found in contestants.items()
        if found
    ]


# ---------------------------------------------------------------- the loss


def long_tail_batch(
    rows: int, classes: int, tail_fraction: float = TAIL_FRACTION
) -> tuple[ClassSplit, Tensor]:
    """A split with every second class tail, and int64 targets (rows,), a share of them tail."""
    counts = torch.full((classes,), 1000)
    counts[1::2] = 10
    targets = torch.randint(0, classes // 2, (rows,)) * 2
    targets[torch.randperm(rows)[: round(tail_fraction * rows)]] += 1
    return ClassSplit.from_counts(counts), targets


Criterion = Callable[..., SplitLoss]


def loss_operations(
    rows: int,
    classes: int,
    total_bytes: int = ROTATED_BYTES,
    more: dict[str, Callable[[ClassSplit, Tensor, Tensor], Criterion]] | None = None,
) -> list[Operation]:
    """The losses, alone and with both gradients for the logits, on rotated logits.

    Forward and backwards is what a joint plan runs: one forward, the gradient of the head loss
    (graph kept), the gradient of the tail loss. `more` makes further criteria from the split
    and a batch of logits and targets like those that follow.

    bytes: forward NK read; with gradients NK more read (each row has weight in one part only)
    and 2NK written
    """
    split, targets = long_tail_batch(rows, classes)
    size = 4 * rows * classes
    batches = [
        torch.randn(rows, classes, requires_grad=True)
        for _ in range(min(max(2, math.ceil(total_bytes / size)), 4096))
    ]

    def forward(criterion: Criterion, logits: Tensor) -> None:
        criterion(logits, targets)

    def with_gradients(criterion: Criterion, logits: Tensor) -> None:
        loss = criterion(logits, targets)
        torch.autograd.grad(loss.head, logits, retain_graph=True)
        torch.autograd.grad(loss.tail, logits)

    def taking(call: Callable, criterion: Criterion, backend: str) -> Contestant:
        def contestant(watch: Stopwatch) -> None:
            with running_on(backend), watch.lap("call"):
                for logits in batches:
                    call(criterion, logits)

        return contestant

    criteria: dict[str, tuple[Criterion, str]] = {
        name: (SplitCrossEntropy(split), b) for name, b in backends().items()
    }
    criteria[MASKS] = (peers.BooleanMasking(split), "reference")
    criteria[ROW_WEIGHTS] = (peers.RowWeights(split), "reference")
    for name, make in (more or {}).items():
        criteria[name] = (make(split, batches[0], targets), "reference")
    return [
        Operation(
            name,
            f"{rows} x {classes}",
            {who: taking(call, *criterion) for who, criterion in criteria.items()},
            bytes=count * size,
            calls=len(batches),
        )
        for name, call, count in (
            ("loss forward", forward, 1),
            ("loss forward, head and tail backward", with_gradients, 4),
        )
    ]


# ---------------------------------------------------------------- imbsam-fast bench


def default_groups(quick: bool) -> Iterator[Group]:
    """What `imbsam-fast bench` measures: the phases, whole steps and the loss."""
    shapes = resnet32_shapes() if quick else resnet50_shapes()
    size = 1_000_000 if quick else 160_000_000
    yield limit_operations(size) + phase_operations(shapes)
    yield [
        *limit_operations(size),
        StepData(shapes).step_operation(IMBSAM, default_contenders()),
    ]
    yield limit_operations(size) + (
        loss_operations(8, 32, 4096) if quick else loss_operations(512, 8142)
    )


def loss_summary(report: Report) -> list[str]:
    """One line for each size of logits: how many times faster than two other ways."""
    lines = []
    for t in report.timings:
        if t.operation.startswith("loss") and t.contestant == ours():
            masks, weights = (
                report.ms(t.operation, c, t.size) / t.ms for c in (MASKS, ROW_WEIGHTS)
            )
            lines.append(
                f"{t.operation} ({t.size}): {masks:.2f} times faster than the authors' boolean "
                f"masks, {weights:.2f} times than cross_entropy with row weights"
            )
    return lines


def default_summary(report: Report) -> list[str]:
    """The last lines of `imbsam-fast bench`: steps, then losses."""
    return step_summary(report) + loss_summary(report)

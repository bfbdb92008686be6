"""How the time of one optimizer step grows with the elements and with the number of tensors.

    python -m benchmarks.bench_growth [--rounds N] [--json FILE] [--quick]

Elements are spread over 100 tensors; tensors have 1,000 elements each. Steps go through sets of
weights in turn so that none is still cached, but for the smallest sizes: 64 sets of one tensor
of 1,000 elements are 1.3 MB.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from benchmarks import peers
from imbsam_fast.bench.cases import limit_operations
from imbsam_fast.bench.measure import Group, Operation, Timing
from imbsam_fast.bench.optimizers import IMBSAM, ROTATED_BYTES, StepData, rotated_sets
from imbsam_fast.bench.report import Report
from imbsam_fast.bench.script import run_script
from imbsam_fast.bench.shapes import Shape

ELEMENTS = "elements"
TENSORS = "tensors"
TENSORS_OF_ELEMENTS = 100
ELEMENTS_OF_TENSORS = 1_000
UNITS = {ELEMENTS: ("ns", 1e6), TENSORS: ("us", 1e3)}  # for one of them; how many in a ms
SIZES = {
    ELEMENTS: (100_000, 1_000_000, 10_000_000, 100_000_000, 400_000_000),
    TENSORS: (1, 10, 100, 1_000, 10_000),
}
QUICK_SIZES = {ELEMENTS: (100, 400), TENSORS: (1, 3)}


def shapes_of(axis: str, size: int) -> list[Shape]:
    if axis == TENSORS:
        return [(ELEMENTS_OF_TENSORS,)] * size
    return [(size // TENSORS_OF_ELEMENTS,)] * TENSORS_OF_ELEMENTS


def label(axis: str, size: int) -> str:
    return f"{size:,} {axis}"


def size_of(timing: Timing, axis: str) -> int | None:
    """The size that `label` made this timing's label from, None for another axis."""
    number, _, unit = timing.size.partition(" ")
    return int(number.replace(",", "")) if unit == axis else None


def groups(quick: bool) -> Iterator[Group]:
    limit_bytes, rotated = (1_000_000, 1) if quick else (160_000_000, ROTATED_BYTES)
    for axis, sizes in (QUICK_SIZES if quick else SIZES).items():
        for size in sizes:
            yield limit_operations(limit_bytes) + step_operations(axis, size, rotated, quick)


def step_operations(axis: str, size: int, rotated: int, quick: bool) -> list[Operation]:
    torch._dynamo.reset()  # what was compiled for other shapes counts against torch's limit
    shapes = shapes_of(axis, size)
    contenders = peers.imbsam_contenders(len(shapes))
    if quick:
        contenders.pop(peers.COMPILED, None)  # 100 tensors take half a minute
    data = StepData(shapes, rotated_sets(shapes, rotated))
    return [
        data.step_operation(IMBSAM, contenders, label(axis, size)),
        data.step_operation(peers.SGD, peers.sgd_contenders(), label(axis, size)),
    ]


# ---------------------------------------------------------------- the fixed cost


class Line(NamedTuple):
    fixed_ms: float
    ms_each: float  # for one element, or one tensor


def fit(sizes: Sequence[float], ms: Sequence[float]) -> Line:
    """The line ms = fixed + each * size with the least sum of squared relative errors.

    Relative, since sizes span decades: the largest alone would decide otherwise.
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"sizes is {list(sizes)}, expected two or more that differ")
    weights = [1 / t**2 for t in ms]
    total = math.fsum(weights)
    x = math.fsum(w * s for w, s in zip(weights, sizes)) / total
    y = math.fsum(w * t for w, t in zip(weights, ms)) / total
    covariance = math.fsum(w * (s - x) * (t - y) for w, s, t in zip(weights, sizes, ms))
    each = covariance / math.fsum(w * (s - x) ** 2 for w, s in zip(weights, sizes))
    return Line(y - each * x, each)


def curves(timings: Sequence[Timing], axis: str) -> dict[tuple[str, str], dict[int, float]]:
    """(operation, contestant) -> size -> ms."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for t in timings:
        size = size_of(t, axis)
        if size is not None:
            found.setdefault((t.operation, t.contestant), {})[size] = t.ms
    return found


def summary(report: Report) -> list[str]:
    lines = []
    for axis in SIZES:
        for (operation, who), points in curves(report.timings, axis).items():
            line = fit(list(points), list(points.values()))
            unit, per_ms = UNITS[axis]
            lines.append(
                f"{operation}, {who}: {1e3 * line.fixed_ms:.0f} us and "
                f"{per_ms * line.ms_each:.3g} {unit} for each of the {axis}"
            )
    return lines


if __name__ == "__main__":
    sys.exit(run_script(__file__, groups, summary))

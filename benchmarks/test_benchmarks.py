"""The operations and steps of `imbsam-fast bench` and bench_step.py under pytest-benchmark, small.

    pytest benchmarks --benchmark-only [--benchmark-autosave] [--benchmark-compare]

A group is what is compared with each other. docs/performance.md says why published figures come
from the interleaved harness instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import pytest
import torch

from benchmarks import bench_step
from imbsam_fast.bench.cases import default_groups, limit_operations
from imbsam_fast.bench.measure import LIMIT, Operation, Stopwatch, measure, warm_up
from imbsam_fast.bench.process import keep_freed_memory

ROUNDS, WARM_UP = 15, 2
TRAINING_ROUNDS = 5  # of steps with forward and backward passes
LIMIT_BYTES = 1_000_000  # as `imbsam-fast bench --quick`: what is small is read from a cache


class LapClock:
    """Seconds of one call that contestants have timed themselves: their data costs no time."""

    __name__ = "seconds inside laps"

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def run(self, operation: Operation, contestant: str) -> None:
        watch = Stopwatch()
        operation.contestants[contestant](watch)
        self.seconds += sum(watch.laps.values()) / operation.calls


clock = LapClock()


def operations() -> Iterator[Operation]:
    """Each once, though `imbsam-fast bench` measures the limits beside every group."""
    torch.manual_seed(0)
    seen = set()
    for operation in chain.from_iterable((*default_groups(quick=True), *bench_step.groups(True))):
        if (operation.name, operation.size) not in seen:
            seen.add((operation.name, operation.size))
            yield operation


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = [
        pytest.param(operation, who, id=f"{operation.name} ({operation.size}): {who}")
        for operation in operations()
        for who in operation.contestants
    ]
    metafunc.parametrize(("operation", "contestant"), cases)


@pytest.fixture(scope="module")
def limit() -> float:
    """Bytes a second that this machine can move, the most of reading, copying and a triad."""
    keep_freed_memory()
    group = limit_operations(LIMIT_BYTES)
    warm_up(group)
    return max(t.bytes / t.ms * 1e3 for t in measure(group, ROUNDS) if t.bytes is not None)


@pytest.mark.benchmark(timer=clock)
def test_speed(benchmark, operation, contestant, limit):
    benchmark.group = f"{operation.name}, {operation.size}"
    training = operation.name == bench_step.STEP
    benchmark.pedantic(
        clock.run,
        args=(operation, contestant),
        rounds=TRAINING_ROUNDS if training else ROUNDS,
        warmup_rounds=WARM_UP,
    )
    if operation.bytes is None or benchmark.stats is None:  # None under --benchmark-disable
        return
    rate = operation.bytes / benchmark.stats.stats.median
    benchmark.extra_info.update(bytes=operation.bytes, gb_per_s=rate / 1e9)
    if operation.name != LIMIT:
        benchmark.extra_info["percent_of_limit"] = 100 * rate / limit
    if contestant in operation.moved:
        benchmark.extra_info["moved_bytes"] = operation.moved[contestant]

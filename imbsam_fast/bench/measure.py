"""Fair timings: contestants take turns in one process, and medians are compared.

In every round each contestant of a group runs once, in a new order. A group holds what is
compared with each other, and the machine's own limits beside it.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from .process import peak_memory

WARM_UP_ROUNDS = 2
LIMIT = "machine limit"  # operations of this name show what the memory of the machine can do


class Stopwatch:
    """Adds up the laps that a contestant times; what it does between them is not counted.

    A lap inside a lap counts for itself alone, so that the sum of the laps is the time taken.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.laps: dict[str, float] = {}  # seconds
        self._counted = 0.0

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Count the time inside the block under `name`, less what laps inside it count."""
        start, counted = self.clock(), self._counted
        yield
        took = self.clock() - start - (self._counted - counted)
        self._counted += took
        self.laps[name] = self.laps.get(name, 0.0) + took


Contestant = Callable[[Stopwatch], None]


@dataclass
class Operation:
    """One comparison; the first contestant is what the others are compared with."""

    name: str
    size: str
    contestants: dict[str, Contestant]
    bytes: int | None = None  # that one call cannot avoid to move
    moved: dict[str, int] = field(default_factory=dict)  # bytes that a contestant does move
    calls: int = 1  # that a contestant makes each time it runs
    memory: bool = False  # whether to look at the peak memory too


Group = Sequence[Operation]


@dataclass
class Timing:
    """One row of the table. Times are those of one call, in milliseconds."""

    operation: str
    size: str
    contestant: str
    ms: float  # the median over the rounds
    laps_ms: dict[str, float]  # the median of each lap
    samples_ms: list[float]  # one a round
    bytes: int | None
    moved_bytes: int | None
    ratio: float = 1.0  # ms over the ms of the operation's first contestant
    gb_per_s: float | None = None  # bytes over ms
    percent_of_limit: float | None = None  # of the best machine limit in the group
    peak_bytes: int | None = None  # of memory, above the level before the call
    group: int = 0  # which group of the run it was measured in


@dataclass
class Memory:
    """The bytes of a contestant's training step: weights, gradients, states and activations."""

    size: str
    contestant: str
    weight_bytes: int
    kept_bytes: int  # after a step
    peak_bytes: int


Ticked = Callable[[Operation], None]  # called after every run of a contestant, outside its time


def _unseen(operation: Operation) -> None:
    """Of who does not look at the progress."""


def warm_up(group: Group, rounds: int = WARM_UP_ROUNDS, ticked: Ticked = _unseen) -> None:
    """Run every contestant untimed: caches fill, compilers compile."""
    for _ in range(rounds):
        for operation in group:
            for contestant in operation.contestants.values():
                contestant(Stopwatch())
                ticked(operation)


def measure(
    group: Group,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
    ticked: Ticked = _unseen,
) -> list[Timing]:
    """Run every contestant `rounds` times, interleaved, and compare their medians."""
    entries = [(i, name) for i, op in enumerate(group) for name in op.contestants]
    laps: dict[tuple[int, str], list[dict[str, float]]] = {entry: [] for entry in entries}
    order = random.Random(seed)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for i, name in order.sample(entries, len(entries)):
                watch = Stopwatch(clock)
                group[i].contestants[name](watch)
                laps[i, name].append(watch.laps)
                ticked(group[i])
        timings = [_timing(group[i], name, laps[i, name]) for i, name in entries]
        # In a pass of its own, since looking at memory takes time.
        for t, (i, name) in zip(timings, entries):
            if group[i].memory:
                t.peak_bytes = peak_memory(partial(group[i].contestants[name], Stopwatch()))
    finally:
        gc.enable()
    _compare(timings)
    return timings


def _timing(op: Operation, contestant: str, laps: list[dict[str, float]]) -> Timing:
    per_call = 1e3 / op.calls
    samples = [per_call * sum(lap.values()) for lap in laps]
    medians = {name: per_call * statistics.median(lap[name] for lap in laps) for name in laps[0]}
    return Timing(
        op.name, op.size, contestant, statistics.median(samples), medians, samples,
        op.bytes, op.moved.get(contestant),
    )  # fmt: skip


def _compare(timings: list[Timing]) -> None:
    """Fill in the columns that follow from the medians of the group."""
    first: dict[tuple[str, str], float] = {}
    for t in timings:
        t.ratio = t.ms / first.setdefault((t.operation, t.size), t.ms)
        if t.bytes is not None:
            t.gb_per_s = t.bytes / t.ms / 1e6
    limit = max((t.gb_per_s or 0.0 for t in timings if t.operation == LIMIT), default=0.0)
    for t in timings:
        if limit and t.gb_per_s:
            t.percent_of_limit = 100 * t.gb_per_s / limit

"""Fair timings: contestants take turns in one process, and medians are compared.

In every round each contestant runs once, in a new order.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

WARM_UP_ROUNDS = 2
COPY = "streaming copy"  # the operation whose bandwidth is the machine's limit


class Stopwatch:
    """Adds up the laps that a contestant times; what it does between them is not counted."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.laps: dict[str, float] = {}  # seconds

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        start = self.clock()
        yield
        self.laps[name] = self.laps.get(name, 0.0) + self.clock() - start


Contestant = Callable[[Stopwatch], None]


@dataclass
class Operation:
    """One comparison; the first contestant is what the others are compared with."""

    name: str
    size: str
    contestants: dict[str, Contestant]
    bytes: int | None = None  # that one call has to move, whoever does it
    calls: int = 1  # that a contestant makes each time it runs


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
    ratio: float = 1.0  # ms over the ms of the operation's first contestant
    gb_per_s: float | None = None
    percent_of_copy: float | None = None


def measure(
    operations: Sequence[Operation],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> list[Timing]:
    """Run every contestant `rounds` times, interleaved, and compare their medians."""
    entries = [(i, name) for i, op in enumerate(operations) for name in op.contestants]
    laps: dict[tuple[int, str], list[dict[str, float]]] = {entry: [] for entry in entries}
    order = random.Random(seed)
    gc.collect()
    gc.disable()
    try:
        for number in range(-WARM_UP_ROUNDS, rounds):
            for i, name in order.sample(entries, len(entries)):
                watch = Stopwatch(clock)
                operations[i].contestants[name](watch)
                if number >= 0:
                    laps[i, name].append(watch.laps)
    finally:
        gc.enable()
    timings = [_timing(operations[i], name, laps[i, name]) for i, name in entries]
    _compare(timings)
    return timings


def _timing(op: Operation, contestant: str, laps: list[dict[str, float]]) -> Timing:
    per_call = 1e3 / op.calls
    samples = [per_call * sum(lap.values()) for lap in laps]
    medians = {name: per_call * statistics.median(lap[name] for lap in laps) for name in laps[0]}
    ms = statistics.median(samples)
    return Timing(op.name, op.size, contestant, ms, medians, samples, op.bytes)


def _compare(timings: list[Timing]) -> None:
    """Fill in the columns that follow from the medians of the run."""
    first: dict[tuple[str, str], float] = {}
    for t in timings:
        t.ratio = t.ms / first.setdefault((t.operation, t.size), t.ms)
        if t.bytes is not None:
            t.gb_per_s = t.bytes / t.ms / 1e6
    limit = next((t.gb_per_s for t in timings if t.operation == COPY), None)
    for t in timings:
        if limit and t.gb_per_s:
            t.percent_of_copy = 100 * t.gb_per_s / limit


# ---------------------------------------------------------------- the process


def keep_freed_memory() -> bool:
    """Make the C library keep what is freed instead of returning it to the system.

    Otherwise a freed gradient may be unmapped, and mapped and cleared again at the next
    backward, and which contestant pays for that depends on what else is on the heap. Returns
    whether it worked (glibc only).
    """
    trim_threshold, mmap_max = -1, -4  # names of mallopt's parameters
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(trim_threshold, -1)) and bool(mallopt(mmap_max, 0))


class OtherLoad:
    """How many cores other processes kept busy inside the `with` block, on average.

    Small operations on several threads suffer most from it, since every one of them waits for
    its slowest thread. None where the system does not tell (only Linux does).
    """

    cores: float | None = None

    def __enter__(self) -> OtherLoad:
        self._start = (time.perf_counter(), _busy_seconds(), _own_seconds())
        return self

    def __exit__(self, *exception: object) -> None:
        wall, busy, own = self._start
        busy_now = _busy_seconds()
        if busy is not None and busy_now is not None:
            others = (busy_now - busy) - (_own_seconds() - own)
            self.cores = max(others, 0.0) / (time.perf_counter() - wall)


def _busy_seconds() -> float | None:
    """CPU time since boot that was neither idle nor waiting for a disk."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    used = os.times()
    return used.user + used.system

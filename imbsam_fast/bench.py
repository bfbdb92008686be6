"""imbsam-fast bench: each operation beside its peers, in milliseconds and memory bandwidth.

Contestants take turns in one process: in every round each runs once, in a new order, and the
medians over the rounds are compared. What they compute is in `bench_cases.py` and `peers.py`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

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


@dataclass
class Report:
    """What one run measured."""

    title: str
    timings: list[Timing]
    summary: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def ms(self, operation: str, contestant: str, size: str | None = None) -> float:
        return next(
            t.ms
            for t in self.timings
            if (t.operation, t.contestant) == (operation, contestant) and size in (None, t.size)
        )


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


def settings(args: argparse.Namespace) -> dict[str, Any]:
    from .env import environment

    return {
        "rounds": args.rounds,
        "quick": args.quick,
        "freed_memory": "kept" if args.freed_memory_kept else "returned",
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "environment": environment(),
    }


# ---------------------------------------------------------------- output


def show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=report.title)
    for column in ("operation", "size", "contestant"):
        table.add_column(column)
    for column in ("ms", "GB/s", "% of copy", "ratio"):
        table.add_column(column, justify="right")
    previous = None
    for t in report.timings:
        key = (t.operation, t.size)
        if previous not in (None, key):
            table.add_section()
        table.add_row(
            *(key if previous != key else ("", "")),
            t.contestant,
            f"{t.ms:.3f}",
            *("" if x is None else f"{x:.1f}" for x in (t.gb_per_s, t.percent_of_copy)),
            f"{t.ratio:.2f}",
        )
        previous = key
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for line in report.summary:
        console.print(line, soft_wrap=True, highlight=False)


def save(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(report), indent=1) + "\n")


# ---------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=9, help="rounds to take the median over")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write everything")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument(
        "--return-memory",
        action="store_true",
        help="let the C library return freed memory to the system, and count what that costs",
    )


def run(
    args: argparse.Namespace,
    title: str,
    operations: Callable[[bool], list[Operation]],  # called with args.quick
    summary: Callable[[Report], list[str]],
) -> int:
    """Measure, print the table and write the JSON: what all benchmarks share."""
    if args.rounds < 1:
        raise SystemExit(f"--rounds is {args.rounds}, expected at least 1")
    if args.quick:
        args.rounds = min(args.rounds, 2)
    args.freed_memory_kept = not args.return_memory and keep_freed_memory()
    report = Report(title, [], settings=settings(args))
    report.timings = measure(operations(args.quick), args.rounds)
    report.summary = summary(report)
    show(report)
    if args.json is not None:
        save(report, args.json)
    return 0


def run_script(
    script: str,
    operations: Callable[[bool], list[Operation]],
    summary: Callable[[Report], list[str]],
) -> int:
    """`run` for one of benchmarks/: full-size results go to results/<script>.json beside it."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    args = parser.parse_args()
    path = Path(script)
    if args.json is None and not args.quick:
        args.json = path.parent / "results" / f"{path.stem}.json"
    return run(args, path.stem, operations, summary)


def main(args: argparse.Namespace) -> int:
    """`imbsam-fast bench`: the sizes of ResNet-50 with the 8,142 classes of iNaturalist 2018."""
    from . import bench_cases

    return run(
        args,
        f"ResNet-50, 8,142 classes, {torch.get_num_threads()} threads",
        bench_cases.default_operations,
        bench_cases.default_summary,
    )

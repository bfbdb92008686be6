"""imbsam-fast bench: each operation beside its peers, in milliseconds and memory bandwidth.

What is compared is in `cases.py`, `optimizers.py` and `peers.py`, how it is timed in `measure.py`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..env import environment
from . import cases
from .measure import Group, measure, warm_up
from .process import OtherLoad, keep_freed_memory, return_freed_memory
from .progress import progress_of
from .report import Report, limits, print_lines, save, show


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on, for the JSON file."""
    return {
        "rounds": args.rounds,
        "quick": args.quick,
        "freed_memory": "kept" if args.freed_memory_kept else "returned",
        "environment": environment(),
    }


def run(
    args: argparse.Namespace,
    title: str,
    groups: Callable[[bool], Iterator[Group]],  # called with args.quick
    summary: Callable[[Report], list[str]],
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Measure, print each group's table when it is there, and write the JSON.

    What all benchmarks share. Groups are made one after the other, each freed before the next is
    made.
    """
    if args.rounds < 1:
        raise SystemExit(f"--rounds is {args.rounds}, expected at least 1")
    if args.quick:
        args.rounds = min(args.rounds, 2)
    args.freed_memory_kept = not args.return_memory and keep_freed_memory()
    report = Report(title, [], settings=settings(args))
    others = OtherLoad()
    numbers = itertools.count()
    for group in groups(args.quick):  # not enumerate, which would hold on to the last one
        with progress_of(group, args.rounds) as ticked:
            warm_up(group, ticked=ticked)
            with others:
                timings = measure(group, args.rounds, clock, ticked=ticked)
        del group
        gc.collect()
        return_freed_memory()
        number = next(numbers)
        for t in timings:
            t.group = number
        report.timings += timings
        show(title, timings)
    report.settings["cores_used_by_others"] = others.cores
    report.summary = summary(report) + limits(report.timings) + _warnings(args.quick, others)
    print_lines(report.summary)
    if args.json is not None:
        save(report, args.json)
    return 0


def _warnings(quick: bool, others: OtherLoad) -> list[str]:
    small = ["Tiny sizes, which a cache holds, to see that it runs: no result."] if quick else []
    if others.cores is None or others.cores < 0.1:
        return small
    return [
        *small,
        f"Not a quiet machine: other processes kept {others.cores:.1f} cores busy, which slows "
        "the contestants with many small operations most. Do not quote these ratios.",
    ]


def default_run(args: argparse.Namespace) -> int:
    """`imbsam-fast bench`: the sizes of ResNet-50 with the 8,142 classes of iNaturalist 2018."""
    return run(
        args,
        f"imbsam-fast bench, {torch.get_num_threads()} threads",
        cases.default_groups,
        cases.default_summary,
    )

"""imbsam-fast bench: each operation beside its peers, in milliseconds and memory bandwidth.

What is compared is in `bench_cases.py`, `bench_optimizers.py` and `peers.py`, how it is timed in
`bench_measure.py`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .bench_measure import Group, Memory, Timing, measure, warm_up
from .bench_process import OtherLoad, keep_freed_memory, return_freed_memory


@dataclass
class Report:
    """What one run measured."""

    title: str
    timings: list[Timing]
    summary: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    memory: list[Memory] = field(default_factory=list)

    def ms(self, operation: str, contestant: str, size: str | None = None) -> float:
        return next(
            t.ms
            for t in self.timings
            if (t.operation, t.contestant) == (operation, contestant) and size in (None, t.size)
        )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    from .env import environment

    return {
        "rounds": args.rounds,
        "quick": args.quick,
        "freed_memory": "kept" if args.freed_memory_kept else "returned",
        "environment": environment(),
    }


# ---------------------------------------------------------------- output


def show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=report.title)
    for column in ("operation", "size", "contestant"):
        table.add_column(column)
    for column in ("ms", "GB/s", "% of limit", "ratio"):
        table.add_column(column, justify="right")
    previous = None
    for t in report.timings:
        key = (t.operation, t.size, t.group)
        if previous not in (None, key):
            table.add_section()
        table.add_row(
            *(key[:2] if previous != key else ("", "")),
            t.contestant,
            f"{t.ms:.3f}",
            *("" if x is None else f"{x:.1f}" for x in (t.gb_per_s, t.percent_of_limit)),
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


def load(path: Path) -> Report:
    """What `save` wrote."""
    found = json.loads(path.read_text())
    timings = [Timing(**t) for t in found["timings"]]
    memory = [Memory(**m) for m in found.get("memory", [])]
    return Report(**{**found, "timings": timings, "memory": memory})


# ---------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=15, help="rounds to take the median over")
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
    groups: Callable[[bool], Iterator[Group]],  # called with args.quick
    summary: Callable[[Report], list[str]],
) -> int:
    """Measure, print the table and write the JSON: what all benchmarks share.

    Groups are made one after the other, each freed before the next is made.
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
        warm_up(group)
        with others:
            timings = measure(group, args.rounds)
        del group
        gc.collect()
        return_freed_memory()
        number = next(numbers)
        for t in timings:
            t.group = number
        report.timings += timings
    report.settings["cores_used_by_others"] = others.cores
    report.summary = summary(report) + _warnings(others)
    show(report)
    if args.json is not None:
        save(report, args.json)
    return 0


def _warnings(others: OtherLoad) -> list[str]:
    if others.cores is None or others.cores < 0.1:
        return []
    return [
        f"Not a quiet machine: other processes kept {others.cores:.1f} cores busy, which slows "
        "the contestants with many small operations most. Do not quote these ratios."
    ]


def run_script(
    script: str,
    groups: Callable[[bool], Iterator[Group]],
    summary: Callable[[Report], list[str]],
) -> int:
    """`run` for one of benchmarks/: full-size results go to results/<script>.json beside it."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    args = parser.parse_args()
    path = Path(script)
    if args.json is None and not args.quick:
        args.json = path.parent / "results" / f"{path.stem}.json"
    return run(args, path.stem, groups, summary)


def main(args: argparse.Namespace) -> int:
    """`imbsam-fast bench`: the sizes of ResNet-50 with the 8,142 classes of iNaturalist 2018."""
    from . import bench_cases

    return run(
        args,
        f"imbsam-fast bench, {torch.get_num_threads()} threads",
        bench_cases.default_groups,
        bench_cases.default_summary,
    )

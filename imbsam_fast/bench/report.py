"""What one run of a benchmark measured, as a table and as a file."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .measure import LIMIT, Memory, Timing


@dataclass
class Report:
    """What one run measured."""

    title: str
    timings: list[Timing]
    summary: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    memory: list[Memory] = field(default_factory=list)

    def ms(self, operation: str, contestant: str, size: str | None = None) -> float:
        """The median milliseconds of one contestant."""
        return next(
            t.ms
            for t in self.timings
            if (t.operation, t.contestant) == (operation, contestant) and size in (None, t.size)
        )


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120)


def show(title: str, timings: list[Timing]) -> None:
    """Print the table of one or more groups."""
    table = Table(title=title)
    for column in ("operation", "size", "contestant"):
        table.add_column(column)
    for column in ("ms", "GB/s", "% of limit", "ratio"):
        table.add_column(column, justify="right")
    previous = None
    for t in timings:
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
    _console().print(table)


def print_lines(lines: list[str]) -> None:
    """Print each in a line, however long."""
    for line in lines:
        _console().print(line, soft_wrap=True, highlight=False)


def limits(timings: list[Timing]) -> list[str]:
    """What the memory of the machine can do, and why something seems to do more."""
    found = [t for t in timings if t.operation == LIMIT and t.gb_per_s]
    if not found:
        return []
    best = max(found, key=lambda t: t.gb_per_s or 0.0)
    of_group: dict[int, float] = {}
    for t in found:
        of_group[t.group] = max(of_group.get(t.group, 0.0), t.gb_per_s or 0.0)
    lines = [
        f"Machine limit, 100 %: {best.gb_per_s:.1f} GB/s of memory traffic (best of {best.size}, "
        f"{best.contestant}); measured anew beside every group, at worst "
        f"{min(of_group.values()):.1f} GB/s."
    ]
    more = [t for t in timings if t.operation != LIMIT and (t.percent_of_limit or 0) > 100]
    if more:
        lines.append(
            f"{len(more)} rows are above 100 %: the limit reads and writes one to three arrays "
            "that no cache holds, while an operation finds some of its data in a cache, or keeps "
            "more streams of memory busy at once by working on several lists."
        )
    return lines


def save(report: Report, path: Path) -> None:
    """Write the report to `path` as JSON; `load` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(report), indent=1) + "\n")


def load(path: Path) -> Report:
    """What `save` wrote."""
    found = json.loads(path.read_text())
    timings = [Timing(**t) for t in found["timings"]]
    memory = [Memory(**m) for m in found.get("memory", [])]
    return Report(**{**found, "timings": timings, "memory": memory})

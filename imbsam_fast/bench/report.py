"""What one run of a benchmark measured, as a table and as a file."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .measure import Memory, Timing


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


def show(report: Report) -> None:
    """Print the table and the summary."""
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
    """Write the report to `path` as JSON; `load` reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(report), indent=1) + "\n")


def load(path: Path) -> Report:
    """What `save` wrote."""
    found = json.loads(path.read_text())
    timings = [Timing(**t) for t in found["timings"]]
    memory = [Memory(**m) for m in found.get("memory", [])]
    return Report(**{**found, "timings": timings, "memory": memory})

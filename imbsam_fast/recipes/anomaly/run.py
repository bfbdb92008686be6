"""`imbsam-fast anomaly`: run a grid, show it beside the paper, save it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from . import grid
from .plots import aucpr_figure
from .settings import Fit, Settings
from .store import Store
from .tables import HEADER, Table, tables

RESULTS_FILE = "results.json"
DETECTORS_FOLDER = "detectors"
TERMINAL_FIELDS = (
    *("aucroc", "paper", "adbench", "aucroc_difference", "aucpr_anomaly", "aucpr_normal"),
)


@dataclass(frozen=True)
class Plan:
    """Which fits are wanted, and how they are run."""

    paths: list[Path]
    detectors: tuple[str, ...]
    methods: tuple[str, ...]
    protocols: tuple[str, ...]
    ratios: tuple[float, ...]
    seeds: int
    processes: int
    threads: int
    save: Path | None
    keep_detectors: bool


def run(plan: Plan, settings: Settings, console: Console) -> list[Fit]:
    """Make the fits that are missing, show the tables, and return all fits of the plan's grid."""
    store = Store(plan.save, settings)
    keep = None
    if plan.save is not None and plan.keep_detectors:
        keep = plan.save / DETECTORS_FOLDER
        keep.mkdir(exist_ok=True)
    todo = list(
        grid.jobs(
            store, settings, plan.paths, plan.protocols, plan.ratios, plan.seeds, plan.detectors,
            plan.methods, keep,
        )
    )  # fmt: skip
    _make(todo, plan, store, console)
    wanted = [fit for fit in store.fits if _is_wanted(fit, plan)]
    for table in tables(wanted, settings):
        _print(console, table)
    if plan.save is not None:
        _save(plan.save, store, settings, console)
    return wanted


def _make(todo: Sequence[grid.Job], plan: Plan, store: Store, console: Console) -> None:
    fits = sum(len(job.methods) for job in todo)
    if not fits:
        console.print("Every fit of this grid has been made.")
        return
    columns = TextColumn("fits"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=fits)
        for made in grid.run(todo, plan.processes, plan.threads):
            store.add(made)
            bar.advance(task, len(made))


def _is_wanted(fit: Fit, plan: Plan) -> bool:
    return (
        fit.set in {path.stem for path in plan.paths}
        and fit.protocol in plan.protocols
        and fit.ratio in plan.ratios
        and fit.seed < plan.seeds
        and fit.detector in plan.detectors
        and fit.method in plan.methods
    )


def _print(console: Console, table: Table) -> None:
    """Without the columns that a terminal has no room for; documents have all of them."""
    shown = RichTable(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    shown.add_column(HEADER.method, no_wrap=True)
    for field in TERMINAL_FIELDS:
        title = getattr(HEADER, field).replace(" ", "\n")
        shown.add_column(title, justify="right", no_wrap=True)
    sets = None
    for row in table.rows:
        if row.sets != sets:
            shown.add_row(f"[bold]{row.sets}")
            sets = row.sets
        shown.add_row(row.method, *(getattr(row, field) for field in TERMINAL_FIELDS))
    console.print(f"\n[bold]{table.title}")
    console.print(shown)


def results_dict(store: Store, settings: Settings) -> dict[str, Any]:
    """The content of results.json; areas in %. `Fit(*row)` reads a row."""
    return {
        "recipe": "anomaly",
        "settings": asdict(settings),
        "runs": store.runs,
        "fields": list(Fit._fields),
        "fits": [list(fit) for fit in sorted(store.fits)],
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """JSON with a line a fit."""
    head = json.dumps({**results, "fits": []}, indent=1)
    lines = ",\n".join(f"  {json.dumps(fit)}" for fit in results["fits"])
    path.write_text(head.replace('"fits": []', f'"fits": [\n{lines}\n ]') + "\n")


def _save(directory: Path, store: Store, settings: Settings, console: Console) -> None:
    write_results(directory / RESULTS_FILE, results_dict(store, settings))
    for protocol in dict.fromkeys(fit.protocol for fit in store.fits):
        figure = aucpr_figure(store.fits, settings, protocol)
        figure.savefig(directory / f"aucpr_{protocol}.png", dpi=150)
    console.print(f"Saved in {directory}: {', '.join(sorted(p.name for p in directory.iterdir()))}")

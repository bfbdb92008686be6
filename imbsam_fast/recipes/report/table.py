"""The accuracies of compared runs as tables: their content, and how a terminal shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..metrics import COLUMNS, accuracy_cell
from .comparison import CHECKPOINTS, Comparison, Group, Section, Value, differences
from .cost import Cost, cost
from .paper_results import SETTING, PaperResult, paper_result

NOTES = {
    "last": "after the last epoch",
    "best": "of the epoch that was best on the validation set",
}
MEANING = (
    "All is the mean of the per-class accuracies; mean ± standard deviation over the seeds. time: "
    "of an epoch, the median, in epochs of SGD; memory: the peak on a GPU in GB."
)
FLIP_MEANING = "flip: the logits of an image and of its mirror image are averaged."


def meaning(sections: Sequence[Section]) -> str:
    """What the tables of `sections` show, in a few sentences."""
    flip = any("flip" in section.views for section in sections)
    return f"{MEANING} {FLIP_MEANING}" if flip else MEANING


class AccuracyRow(NamedTuple):
    """A group's test accuracies in %, by view and then by COLUMNS, the paper's, and the cost."""

    group: Group
    views: dict[str, dict[str, Value | None]]
    paper: PaperResult | None
    cost: Cost


def accuracy_rows(section: Section, checkpoint: str) -> list[AccuracyRow]:
    """One row a group that has such a checkpoint, one of CHECKPOINTS."""
    papers = _paper_results(section)
    rows = []
    for group in section.groups:
        views = {
            view: table for view in section.views if (table := group.accuracy(checkpoint, view))
        }
        if views:
            rows.append(
                AccuracyRow(group, views, papers.get(group.label), cost(group, section.groups))
            )
    return rows


def _paper_results(section: Section) -> dict[str, PaperResult]:
    """Label -> the paper's row, given to the group whose rho and eta are nearest to the paper's."""
    found: dict[PaperResult, tuple[int, str]] = {}
    for group in section.finished:
        config = group.config
        if config.get("loss", "ce") != "ce":
            continue
        result = paper_result(
            section.dataset,
            section.imbalance_factor,
            str(config.get("method")),
            str(config.get("optimizer")),
            config.get("tail_weight") or 1,
        )
        if result is None:
            continue
        distance = (config.get("rho") != 0.05) + (config.get("eta") != 100)
        if result not in found or distance < found[result][0]:
            found[result] = (distance, group.label)
    return {label: result for result, (_, label) in found.items()}


def titles(borders: tuple[int, int]) -> dict[str, str]:
    """Two lines for each of COLUMNS: its name and the training images of its classes."""
    low, high = borders
    images = {"many": f"> {high}", "medium": f"{low} - {high}", "few": f"< {low}", "all": "classes"}
    return {column: f"{column.capitalize()}\n{images[column]}" for column in COLUMNS}


def paper_text(result: PaperResult | None, column: str) -> str:
    """As `accuracy_cell`, for one of COLUMNS of the paper's row; None where it has none."""
    accuracy = getattr(result, column, None)
    return "-" if accuracy is None else f"{accuracy:.1f}"


# ---------------------------------------------------------------- terminal


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Everything that fits a terminal; pictures are in the page."""
    for section in comparison.sections:
        console.print(f"\n[bold]{escape(section.title)}[/bold]")
        for checkpoint in CHECKPOINTS:
            if rows := accuracy_rows(section, checkpoint):
                title = f"Test accuracy in % {NOTES[checkpoint]}"
                console.print(_accuracy_table(rows, titles(section.borders), title))
        if section.finished:
            console.print(meaning([section]), style="dim")
        if any(row.paper for row in accuracy_rows(section, "last")):
            console.print(f"paper: its Tables 1 to 3; {SETTING}.", style="dim")
        _print_differences(console, section)
    for fault in comparison.faults:
        console.print(f"[yellow]{escape(str(fault.path))}[/yellow]: {escape(fault.what)}")


def _plain_table(title: str | None = None) -> Table:
    return Table(
        title=title, box=SIMPLE_HEAD, pad_edge=False, show_edge=False, title_justify="left"
    )


def _accuracy_table(rows: list[AccuracyRow], headings: dict[str, str], title: str) -> Table:
    table = _plain_table(title)
    table.add_column("")
    table.add_column("")
    for column in COLUMNS:
        table.add_column(headings[column], justify="right", no_wrap=True)
    for heading in ("seeds", "time", "memory"):
        table.add_column(heading, justify="right")
    for row in rows:
        views = row.views.values()
        lines = [[accuracy_cell(accuracies[c]) for c in COLUMNS] for accuracies in views]
        names = list(row.views)
        if row.paper is not None:
            lines.append([f"[dim]{paper_text(row.paper, column)}[/dim]" for column in COLUMNS])
            names.append("[dim]paper[/dim]")
        cells = ["\n".join(cell) for cell in zip(*lines)]
        seeds = str(len(row.group.finished))
        label = escape(row.group.label)
        table.add_row(label, "\n".join(names), *cells, seeds, *row.cost.texts())
    return table


def _print_differences(console: Console, section: Section) -> None:
    differing = differences(section.groups)
    if not differing:
        return
    table = _plain_table("Settings that differ")
    for heading in ("", *differing):
        table.add_column(heading, overflow="fold")
    for label, *texts in zip([g.label for g in section.groups], *differing.values()):
        table.add_row(*map(escape, (label, *texts)))
    console.print(table)

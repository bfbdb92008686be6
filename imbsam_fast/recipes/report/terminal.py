"""How a terminal shows a comparison."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..metrics import COLUMNS, accuracy_cell
from .accuracy import NOTES, AccuracyRow, accuracy_rows, meaning, paper_text, titles
from .comparison import CHECKPOINTS, Comparison, Section, differences
from .pairs import marks
from .paper_results import SETTING
from .tables import INTERVAL, VIEW_NAMES, difference_table


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Everything that fits a terminal; pictures are in the page."""
    for section in comparison.sections:
        console.print(f"\n[bold]{escape(section.title)}[/bold]")
        for checkpoint in CHECKPOINTS:
            if rows := accuracy_rows(section, checkpoint):
                title = f"Test accuracy in % {NOTES[checkpoint]}"
                best = {
                    view: marks([row.group for row in rows], checkpoint, view)
                    for view in section.views
                }
                console.print(_accuracy_table(rows, titles(section.borders), title, best))
                _print_pairs(console, section, checkpoint)
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


def _accuracy_table(
    rows: list[AccuracyRow],
    headings: dict[str, str],
    title: str,
    best: dict[str, dict[str, dict[str, str]]],
) -> Table:
    table = _plain_table(title)
    table.add_column("")
    table.add_column("")
    for column in COLUMNS:
        table.add_column(headings[column], justify="right", no_wrap=True)
    for heading in ("seeds", "time", "memory"):
        table.add_column(heading, justify="right")
    for row in rows:
        lines = [
            [
                f"[bold]{text}[/bold]" if best[view][row.group.label].get(c) == "best" else text
                for c in COLUMNS
                for text in [accuracy_cell(accuracies[c])]
            ]
            for view, accuracies in row.views.items()
        ]
        names = list(row.views)
        if row.paper is not None:
            lines.append([f"[dim]{paper_text(row.paper, column)}[/dim]" for column in COLUMNS])
            names.append("[dim]paper[/dim]")
        cells = ["\n".join(cell) for cell in zip(*lines)]
        seeds = str(len(row.group.finished))
        label = escape(row.group.label)
        table.add_row(label, "\n".join(names), *cells, seeds, *row.cost.texts())
    return table


def _print_pairs(console: Console, section: Section, checkpoint: str) -> None:
    """Differences to SGD and to the control, of the images as they are."""
    found = difference_table(section, checkpoint)
    if not found.rows:
        return
    kept = [i for i, column in enumerate(found.columns) if column.over != VIEW_NAMES["flip"]]
    table = _plain_table(f"{found.caption}, {VIEW_NAMES['plain']}")
    for i in kept:
        column = found.columns[i]
        table.add_column(column.title, justify="left" if column.kind == "text" else "right")
    for row in found.rows:
        texts = [(escape(row[i].text), row[i].mark == "clear") for i in kept]
        table.add_row(*(f"[bold]{text}[/bold]" if clear else text for text, clear in texts))
    console.print(table)
    _, *controls_of_nobody = found.notes
    for note in (f"In brackets the {INTERVAL}.", *controls_of_nobody):
        console.print(escape(note), style="dim")


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

"""The tables of a comparison: what a page shows of each, and what its CSV and JSON files hold."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from ..metrics import COLUMNS, accuracy_cell, group_of
from .accuracy import NOTES, AccuracyRow, accuracy_rows, meaning, paper_text, titles
from .comparison import CHECKPOINTS, ComparedRun, Comparison, Group, Section, Value, differences
from .pairs import Difference, baseline, control, marks, paired, paired_classes
from .paper_results import SETTING
from .repeat import command, shared_settings

VIEW_NAMES = {"plain": "images as they are", "flip": "flip average"}
WORST = 10  # classes
INTERVAL = "95 % interval over the seeds (Student's t, seed by seed)"


class Column(NamedTuple):
    """A column; in files its cells are under `name`, or `name` and a part of the value."""

    name: str
    title: str  # lines are parted by "\n"
    over: str = ""  # a heading that it shares with its neighbours
    kind: str = "number"  # or "text", "code"


class Cell(NamedTuple):
    """What is read, and what it is: a scalar, or a dictionary of scalars."""

    text: str
    value: Any
    mark: str = ""  # "best", "near", "paper"


class DataTable(NamedTuple):
    """Its first column names the row. `notes` are sentences below it."""

    name: str  # unique in its section; of its files too
    caption: str
    columns: list[Column]
    rows: list[list[Cell]]
    notes: list[str]
    shown: bool = True  # or in files alone

    def records(self) -> list[dict[str, Any]]:
        """One dictionary a row, by the columns' names."""
        return [
            {column.name: cell.value for column, cell in zip(self.columns, row)}
            for row in self.rows
        ]

    def json(self) -> str:
        """The caption and the records."""
        content = {"table": self.name, "caption": self.caption, "rows": self.records()}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def csv(self) -> str:
        """A line a row under one line of names; parts of a value are columns of their own."""
        flat = [_flat(record) for record in self.records()]
        file = io.StringIO()
        names = dict.fromkeys(name for record in flat for name in record)
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return file.getvalue()

    def files(self, section: int) -> dict[str, str]:
        """Name -> content of both, `section` being the number of its data set, from 1."""
        stem = f"data-{section}-{self.name}"
        return {f"{stem}.csv": self.csv(), f"{stem}.json": self.json()}


def write_tables(comparison: Comparison, directory: Path) -> list[Path]:
    """CSV and JSON of every table into `directory`, which is made; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for number, section in enumerate(comparison.sections, 1):
        for table in section_tables(section):
            for name, text in table.files(number).items():
                written.append(directory / name)
                written[-1].write_text(text, encoding="utf-8")
    return written


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in record.items():
        parts = value if isinstance(value, dict) else {"": value}
        found.update({f"{name} {part}".strip(): x for part, x in parts.items()})
    return found


def _text(value: Any) -> Cell:
    shown = "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return Cell(shown, value)


def _accuracy(value: Value | None, mark: str = "") -> Cell:
    mean, std = (None, None) if value is None else value
    return Cell(accuracy_cell(value), {"mean": mean, "std": std}, mark)


def _signed(number: float) -> str:
    """One digit after the point, and nothing before a 0."""
    text = f"{number:+.1f}"
    return "0.0" if text[1:] == "0.0" else text.replace("-", "\N{MINUS SIGN}")


def _difference(found: Difference | None) -> Cell:
    if found is None:
        return Cell("-", dict.fromkeys(("mean", "low", "high", "seeds")), "")
    text = _signed(found.mean)
    if found.low is not None and found.high is not None:
        text += f" ({_signed(found.low)} to {_signed(found.high)})"
    return Cell(text, found._asdict(), "clear" if found.clear else "")


def section_tables(section: Section) -> list[DataTable]:
    """All of them, those without rows left out."""
    tables = [
        *(accuracy_table(section, checkpoint) for checkpoint in CHECKPOINTS),
        *(difference_table(section, checkpoint) for checkpoint in CHECKPOINTS),
        worst_table(section),
        class_table(section),
        confusion_table(section),
        shared_table(section),
        differing_table(section),
        command_table(section),
        run_table(section),
    ]
    return [table for table in tables if table.rows]


# ---------------------------------------------------------------- accuracies


def accuracy_table(section: Section, checkpoint: str) -> DataTable:
    """A row a configuration: its cost, and its accuracies by view, the paper's beside them."""
    rows = accuracy_rows(section, checkpoint)
    has_paper = any(row.paper for row in rows)
    has_memory = any(row.cost.peak_bytes for row in rows)
    headings = titles(section.borders)
    columns = [Column("configuration", "configuration", kind="text"), Column("seeds", "seeds"),
               Column("time", "time a step\n(SGD steps)")]  # fmt: skip
    if has_memory:
        columns.append(Column("peak_gb", "peak memory\n(GB)"))
    for view in section.views:
        columns += [Column(f"{view} {c}", headings[c], VIEW_NAMES[view]) for c in COLUMNS]
    if has_paper:
        columns += [Column(f"paper {c}", headings[c], "the paper's") for c in COLUMNS]
    groups = [row.group for row in rows]
    marked = {view: marks(groups, checkpoint, view) for view in section.views}
    notes = [
        f"{meaning([section])} Bold: the best of a column. Dotted: not told from the best by "
        f"pairs, since the {INTERVAL} of their difference holds 0."
    ]
    if has_paper:
        notes.append(
            "The paper's columns hold its published numbers (Zhou et al., ICCV 2023, Tables 1 to "
            f"3; {SETTING}), not results of these runs."
        )
    cells = [_accuracy_cells(row, marked, has_paper, has_memory) for row in rows]
    caption = f"Test accuracy (%) {NOTES[checkpoint]}"
    return DataTable(f"accuracy-{checkpoint}", caption, columns, cells, notes)


def _accuracy_cells(
    row: AccuracyRow,
    marked: dict[str, dict[str, dict[str, str]]],
    has_paper: bool,
    has_memory: bool,
) -> list[Cell]:
    label = row.group.label
    time, memory = row.cost.texts()
    peak = row.cost.peak_bytes
    cells = [_text(label), _text(len(row.group.finished)), Cell(time, row.cost.time)]
    if has_memory:
        cells.append(Cell(memory, None if peak is None else peak / 1e9))
    for view, table in row.views.items():
        cells += [_accuracy(table[c], marked[view][label].get(c, "")) for c in COLUMNS]
    if has_paper:
        papers = [getattr(row.paper, c, None) for c in COLUMNS]
        cells += [Cell(paper_text(row.paper, c), x, "paper") for c, x in zip(COLUMNS, papers)]
    return cells


def difference_table(section: Section, checkpoint: str) -> DataTable:
    """Every configuration minus SGD, and minus its control, seed by seed."""
    headings = titles(section.borders)
    views = [
        view for view in section.views if any(g.tested(checkpoint, view) for g in section.groups)
    ]
    columns = [Column("configuration", "configuration", kind="text"),
               Column("against", "minus", kind="text"),
               Column("seeds", "seeds\nin pairs")]  # fmt: skip
    for view in views:
        columns += [Column(f"{view} {c}", headings[c], VIEW_NAMES[view]) for c in COLUMNS]
    rows = []
    controls = [control(group, section.groups) for group in section.finished]
    for group, its_control in zip(section.finished, controls):
        for other in (baseline(group, section.groups), its_control):
            found = [paired(group, other, checkpoint, view) for view in views] if other else []
            if other is None or not found or found[0] is None:
                continue
            all_ = found[0]["all"]
            cells = [_difference(table[c]) for table in found if table for c in COLUMNS]
            rows.append(
                [_text(group.label), _text(other.label), _text(all_ and all_.seeds), *cells]
            )
    notes = [
        f"Percentage points, and in brackets the {INTERVAL}. Bold: the interval does not hold 0. "
        "SGD with the same tail weight and no perturbation is the control: what is gained over it "
        "is gained by flatness, not by weight."
    ]
    notes += [
        f"{group.label} is nobody's control here: nothing else has its eta and tail weight. Where "
        "the tail weight is 1, as under the paper's preset, the control is SGD itself."
        for group in section.finished
        if group.config.get("optimizer") == "sgd-weighted" and group not in controls
    ]
    caption = f"Difference to SGD and to the control {NOTES[checkpoint]}"
    return DataTable(f"difference-{checkpoint}", caption, columns, rows, notes)


# ---------------------------------------------------------------- classes


def class_table(section: Section) -> DataTable:
    """For files: every class of every configuration, with its gain over SGD."""
    columns = [Column("configuration", ""), Column("class", ""), Column("name", ""),
               Column("training_images", ""), Column("group", ""), Column("accuracy", ""),
               Column("gain over SGD", "")]  # fmt: skip
    rows = []
    for group in section.finished:
        sgd = baseline(group, section.groups)
        gains = paired_classes(group, sgd) if sgd else []
        for k, value in enumerate(group.per_class()):
            count = (section.counts or [])[k]
            gain = _difference(gains[k] if gains else None)
            rows.append(
                [_text(group.label), _text(k), _text(section.class_names[k]), _text(count),
                 _text(group_of(count, section.borders)), _accuracy(value), gain]
            )  # fmt: skip
    caption = "Test accuracy (%) of every class after the last epoch, images as they are"
    return DataTable("classes", caption, columns, rows, [], shown=False)


def worst_table(section: Section) -> DataTable:
    """The classes with the lowest mean over the configurations, and what is seen in their place."""
    groups = [group for group in section.finished if group.per_class()]
    classes = {group.label: group.per_class() for group in groups}
    mistakes = _mistakes(groups)
    columns = [Column("class", "class", kind="text"), Column("training_images", "training\nimages")]
    if mistakes:
        columns.append(Column("taken_for", "most often\ntaken for", kind="text"))
    columns += [Column(group.label, group.label, "accuracy (%)") for group in groups]
    counts = section.counts or []

    def mean(k: int) -> float:
        return sum(values[k][0] for values in classes.values()) / len(classes)

    rows = []
    for k in sorted(range(len(counts)), key=mean)[:WORST] if classes else []:
        values = {label: found[k] for label, found in classes.items()}
        top = max(value[0] for value in values.values())
        cells = [_text(section.class_names[k]), _text(counts[k])]
        if mistakes:
            other = mistakes[k]
            cells.append(_text(None if other is None else section.class_names[other]))
        alone = len(values) > 1
        cells += [_accuracy(v, "best" if alone and v[0] == top else "") for v in values.values()]
        rows.append(cells)
    note = (
        "The classes with the lowest mean over all configurations, after the last epoch, images "
        "as they are; mean ± standard deviation over the seeds. Bold: the best of a class."
    )
    if mistakes:
        note += " Taken for: over all configurations and seeds that recorded it."
    return DataTable("worst-classes", "Worst classes", columns, rows, [note])


def _mistakes(groups: list[Group]) -> list[int | None]:
    """For each class the one it is most often taken for, None without mistakes; [] if unknown."""
    recorded = [cells for group in groups if (cells := group.confusion())]
    total = [[sum(counts) for counts in zip(*rows)] for rows in zip(*recorded)]
    found: list[int | None] = []
    for k, row in enumerate(total):
        wrong = [0 if i == k else count for i, count in enumerate(row)]
        found.append(wrong.index(max(wrong)) if any(wrong) else None)
    return found


def confusion_table(section: Section) -> DataTable:
    """For files: how many test images of a class were taken for which."""
    columns = [Column(name, "") for name in ("configuration", "class", "taken_for", "images")]
    rows = [
        [_text(x) for x in (group.label, section.class_names[i], section.class_names[k], count)]
        for group in section.finished
        for i, row in enumerate(group.confusion() or [])
        for k, count in enumerate(row)
        if count
    ]
    caption = "Test images by class and by what they were taken for, summed over the seeds"
    return DataTable("confusion", caption, columns, rows, [], shown=False)


# ---------------------------------------------------------------- settings and runs


def shared_table(section: Section) -> DataTable:
    """What all configurations have in common; seeds are not among it."""
    settings = shared_settings(section.groups)
    columns = [Column("setting", "setting", kind="text"), Column("value", "value", kind="text")]
    rows = [
        [_text(key), Cell(_text(x).text if x != "" else "-", x)]
        for key, x in settings.items()
        if x is not None and key not in ("seed",)
    ]
    return DataTable("settings", "Settings that all runs share", columns, rows, [])


def differing_table(section: Section) -> DataTable:
    """The settings that do not agree, a row a configuration."""
    differing = differences(section.groups)
    columns = [Column("configuration", "configuration", kind="text")]
    columns += [Column(key, key, kind="text") for key in differing]
    rows = [
        [_text(group.label), *(_text(texts[i]) for texts in differing.values())]
        for i, group in enumerate(section.groups)
        if differing
    ]
    return DataTable("differences", "Settings that differ", columns, rows, [])


def command_table(section: Section) -> DataTable:
    """The command that makes the runs of each configuration again."""
    columns = [Column("configuration", "configuration", kind="text"),
               Column("command", "command", kind="code")]  # fmt: skip
    lines = [(group.label, command(group)) for group in section.groups]
    rows = [[_text(label), _text(line)] for label, line in lines if line]
    note = (
        "Options that are not given have their defaults. The configuration file in a run's "
        "directory, after --config, says the same in full."
    )
    return DataTable("commands", "Commands that repeat the runs", columns, rows, [note])


def run_table(section: Section) -> DataTable:
    """A row a run: how far it came and where it lies."""
    columns = [
        Column("configuration", "configuration", kind="text"),
        Column("seed", "seed"),
        Column("epochs", "epochs"),
        Column("training_accuracy", "training\naccuracy (%)"),
        Column("training_loss", "training\nloss (nats)"),
        Column("hours", "hours"),
        Column("skipped_images", "skipped\nimages"),
        Column("commit", "commit", kind="code"),
        Column("directory", "directory", kind="code"),
    ]
    rows = [_run_cells(group, run) for group in section.groups for run in group.runs]
    return DataTable("runs", "Runs", columns, rows, [])


def _run_cells(group: Group, run: ComparedRun) -> list[Cell]:
    last = run.log[-1] if run.log else {}
    result = run.result or {}
    environment = result.get("environment") or {}

    def number(value: Any, form: str) -> Cell:
        known = isinstance(value, (int, float))
        return Cell(format(value, form) if known else "-", value if known else None)

    seconds = result.get("seconds")
    return [
        _text(group.label),
        _text(run.config.get("seed")),
        _text((result.get("last") or last).get("epoch", 0)),
        number(last.get("train_accuracy"), ".1f"),
        number(last.get("loss"), ".4f"),
        number(seconds / 3600 if isinstance(seconds, (int, float)) else None, ".2f"),
        number(result.get("skipped_images"), "d"),
        _text(str(environment.get("git_commit") or "-")[:12]),
        _text(str(run.path)),
    ]

"""The comparison of runs as one HTML page without anything outside it: no script, no network."""

from __future__ import annotations

import datetime
import io
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..analysis.figures import lines_figure, planes_figure, spectrum_figure
from ..metrics import COLUMNS, accuracy_cell
from .comparison import CHECKPOINTS, ComparedRun, Comparison, Group, Section, differences
from .figures import (
    ablation_figures,
    cost_figure,
    curves_figure,
    gain_figure,
    groups_figure,
    styles,
)
from .paper_results import SETTING
from .table import NOTES, AccuracyRow, accuracy_rows, meaning, paper_text, titles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Comparison of training runs"
VIEW_NAMES = {"plain": "images as they are", "flip": "flip average"}


class Picture(NamedTuple):
    """An SVG element and what it shows."""

    svg: str
    caption: str


def page(comparison: Comparison) -> str:
    """The HTML text. Needs jinja2 and matplotlib."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html").render(
        title=TITLE,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("imbsam-fast"),
        faults=comparison.faults,
        sections=[_section(section, i) for i, section in enumerate(comparison.sections)],
        meaning=meaning(comparison.sections),
        paper_setting=SETTING,
    )


def _section(section: Section, index: int) -> dict[str, Any]:
    return {
        "title": section.title,
        "tables": list(_tables(section)),
        "pictures": list(_pictures(section, f"section{index}")),
        "differences": differences(section.groups),
        "labels": [group.label for group in section.groups],
        "runs": [_run(group, run) for group in section.groups for run in group.runs],
    }


def _tables(section: Section) -> Iterator[dict[str, Any]]:
    for checkpoint in CHECKPOINTS:
        rows = accuracy_rows(section, checkpoint)
        if not rows:
            continue
        has_paper = any(row.paper for row in rows)
        yield {
            "note": NOTES[checkpoint],
            "views": [
                *(VIEW_NAMES[view] for view in section.views),
                *(["the paper's"] if has_paper else []),
            ],
            "columns": [title.split("\n") for title in titles(section.borders).values()],
            "has_paper": has_paper,
            "rows": [
                {
                    "label": row.group.label,
                    "seeds": len(row.group.finished),
                    "cost": row.cost.texts(),
                    "cells": _cells(row, has_paper),
                }
                for row in rows
            ],
        }


def _cells(row: AccuracyRow, has_paper: bool) -> list[dict[str, Any]]:
    """By view and then by column, the paper's last."""
    own = [accuracy_cell(table[column]) for table in row.views.values() for column in COLUMNS]
    papers = [paper_text(row.paper, column) for column in COLUMNS] if has_paper else []
    return [{"text": cell, "paper": False} for cell in own] + [
        {"text": cell, "paper": True} for cell in papers
    ]


def _run(group: Group, run: ComparedRun) -> dict[str, Any]:
    last = run.log[-1] if run.log else {}
    result = run.result or {}
    environment = result.get("environment") or {}

    def number(value: Any, form: str) -> str:
        return format(value, form) if isinstance(value, (int, float)) else "-"

    seconds = result.get("seconds")
    return {
        "label": group.label,
        "seed": run.config.get("seed", "-"),
        "epochs": (result.get("last") or last).get("epoch", 0),
        "accuracy": number(last.get("train_accuracy"), ".1f"),
        "loss": number(last.get("loss"), ".4f"),
        "hours": number(seconds / 3600 if seconds is not None else None, ".2f"),
        "skipped": number(result.get("skipped_images"), "d"),
        "commit": str(environment.get("git_commit") or "-")[:12],
        "path": str(run.path),
    }


# ---------------------------------------------------------------- pictures


def _pictures(section: Section, name: str) -> Iterator[tuple[str, list[Picture]]]:
    """(heading, pictures) for what the section's runs have."""
    if figure := groups_figure(section):
        caption = "Test accuracy by group of classes; bars are one standard deviation over seeds."
        yield "Accuracy by group", [_svg(figure, f"{name}-groups", caption)]
    if figure := cost_figure(section):
        caption = (
            "Test accuracy against the time of an epoch in epochs of SGD, images as they are, last "
            "epoch; bars are one standard deviation over seeds. Up and to the left is better."
        )
        yield "Accuracy against cost", [_svg(figure, f"{name}-cost", caption)]
    if figure := gain_figure(section):
        caption = (
            "Test accuracy of every class minus that of SGD, means over the seeds, images as "
            "they are, last epoch (as Fig. 2 of the paper)."
        )
        yield "Gain over SGD by class", [_svg(figure, f"{name}-gain", caption)]
    ablations = [
        _svg(
            figure,
            f"{name}-ablation{i}",
            f"{label}: test accuracy against rho and eta, images as they are, last epoch (as "
            "Fig. 4 of the paper); bars are one standard deviation over seeds.",
        )
        for i, (label, figure) in enumerate(ablation_figures(section).items())
    ]
    if ablations:
        yield "Accuracy against rho and eta", ablations
    if figure := curves_figure(section):
        caption = "Means over the seeds against the epoch; bands are one standard deviation."
        yield "Training curves", [_svg(figure, f"{name}-curves", caption)]
    yield from _analyses(section, name)


def _analyses(section: Section, name: str) -> Iterator[tuple[str, list[Picture]]]:
    """Hessians and landscapes of the first run of each group that has one."""
    looks = styles(section.groups)
    for kind, draw in (("hessian", _hessian_pictures), ("landscape", _landscape_pictures)):
        files = dict.fromkeys(
            file
            for group in section.groups
            for run in group.runs
            for file, content in run.analyses.items()
            if content["analysis"] == kind
        )
        for file in files:
            found = {
                group.label: next(run.analyses[file] for run in group.runs if file in run.analyses)
                for group in section.groups
                if any(file in run.analyses for run in group.runs)
            }
            yield draw(found, looks, f"{name}-{file}")


def _hessian_pictures(
    analyses: dict[str, dict[str, Any]], looks: Any, name: str
) -> tuple[str, list[Picture]]:
    first = next(iter(analyses.values()))
    caption = (
        "Spectral density of the Hessian of the mean training loss, its largest eigenvalue and "
        f"its trace with the standard error (as Fig. 3 of the paper). {_describe(analyses)}"
    )
    figure = spectrum_figure(analyses, looks)
    return f"Hessian on {first['classes']} classes", [_svg(figure, name, caption)]


def _landscape_pictures(
    analyses: dict[str, dict[str, Any]], looks: Any, name: str
) -> tuple[str, list[Picture]]:
    about = f"filter-normalised random directions (as Fig. 1 of the paper). {_describe(analyses)}"
    lines = lines_figure(analyses, looks)
    planes = planes_figure(analyses)
    return "Loss landscapes", [
        _svg(lines, f"{name}-line", f"Loss along one of the {about}"),
        _svg(planes, f"{name}-plane", f"Loss over two {about}"),
    ]


def _describe(analyses: dict[str, dict[str, Any]]) -> str:
    """What each analysis looked at, once where it is the same for all."""
    texts = {label: analysis["about"] for label, analysis in analyses.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return " ".join(f"{label}: {about}" for label, about in texts.items())


def _svg(figure: Figure, name: str, caption: str) -> Picture:
    """`name` is unique in the page: ids inside SVG elements are shared by the whole document."""
    import matplotlib

    file = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata=no_metadata)
    svg = file.getvalue()
    return Picture(svg[svg.index("<svg") :], caption)

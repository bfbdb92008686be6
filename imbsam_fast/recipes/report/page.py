"""The comparison of runs as one HTML page without anything outside it: no script, no network."""

from __future__ import annotations

import base64
import datetime
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from ..analysis.figures import lines_figure, planes_figure, spectrum_figure
from .comparison import Comparison, Section
from .figures import (
    Chart,
    Panel,
    ablation_charts,
    confusion_chart,
    cost_chart,
    curves_chart,
    gain_chart,
    groups_chart,
    styles,
)
from .svg import drawing, key, svg, variables
from .tables import INTERVAL, DataTable, section_tables

TITLE = "Comparison of training runs"
# Tables before the pictures; the others follow them.
FIRST = ("settings", "accuracy-", "difference-")
LAST = "images as they are, last epoch"


class Picture(NamedTuple):
    """Panels, each a heading and an SVG element, under one legend of (key, name)."""

    heading: str
    caption: str
    panels: list[tuple[str, str]]
    legend: list[tuple[str, str]]
    wide: bool = False  # too wide for a phone, which scrolls it


class Link(NamedTuple):
    """A file that the page holds."""

    file: str
    kind: str
    address: str


def page(comparison: Comparison) -> str:
    """The HTML text. Needs jinja2 and matplotlib."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    with drawing():
        sections = [_section(section, i) for i, section in enumerate(comparison.sections, 1)]
    return environment.get_template("page.html").render(
        title=TITLE,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("imbsam-fast"),
        faults=comparison.faults,
        sections=sections,
        light=variables(dark=False),
        dark=variables(dark=True),
    )


def _section(section: Section, number: int) -> dict[str, Any]:
    name = f"data-{number}"
    tables = section_tables(section)
    return {
        "id": name,
        "title": section.title,
        "first": [_table(t, number) for t in tables if t.name.startswith(FIRST)],
        "rest": [_table(t, number) for t in tables if not t.name.startswith(FIRST) and t.shown],
        "files": [(t.caption, _links(t, number)) for t in tables if not t.shown],
        "pictures": list(_pictures(section, name)),
    }


def _table(table: DataTable, section: int) -> dict[str, Any]:
    """Headings over several columns are counted: (text, columns), "" where there is none."""
    over: list[list[Any]] = []
    for column in table.columns:
        if over and column.over and over[-1][0] == column.over:
            over[-1][1] += 1
        else:
            over.append([column.over, 1])
    return {
        "id": f"data-{section}-{table.name}",
        "name": table.name,
        "caption": table.caption,
        "columns": table.columns,
        "over": over if any(text for text, _ in over) else [],
        "rows": table.rows,
        "notes": table.notes,
        "links": _links(table, section),
    }


def _links(table: DataTable, section: int) -> list[Link]:
    media = {"csv": "text/csv", "json": "application/json"}
    return [
        Link(file, kind.upper(), _address(text, media[kind]))
        for file, text in table.files(section).items()
        for kind in [file.rpartition(".")[2]]
    ]


def _address(text: str, media: str) -> str:
    return f"data:{media};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"


# ---------------------------------------------------------------- pictures


def _pictures(section: Section, name: str) -> Iterator[Picture]:
    """For what the section's runs have."""
    std = "bars are one standard deviation over the seeds"
    charts = (
        ("Accuracy by group of classes", groups_chart(section), f"Test accuracy, {LAST}; {std}."),
        (
            "Accuracy against cost",
            cost_chart(section),
            "Test accuracy against the time of a step in steps of SGD (medians of whole epochs), "
            f"{LAST}; {std}. Up and to the left is better; the dashed line joins what nothing "
            "beats in both.",
        ),
        (
            "Gain over SGD by class",
            gain_chart(section),
            f"Test accuracy of every class minus that of SGD, {LAST} (as Fig. 2 of the paper); "
            f"bars are the {INTERVAL}.",
        ),
        (
            "What is taken for what",
            confusion_chart(section),
            f"Of each class's test images, the share in % that was taken for each class, {LAST}, "
            "all seeds that recorded it. The diagonal is what is right.",
        ),
        *(
            (
                f"Accuracy against rho and eta: {label}",
                chart,
                f"Test accuracy, {LAST} (as Fig. 4 of the paper); {std}.",
            )
            for label, chart in ablation_charts(section).items()
        ),
        (
            "Training curves",
            curves_chart(section),
            "Means over the seeds against the epoch; bands are one standard deviation.",
        ),
    )
    for heading, chart, caption in charts:
        if chart is not None:
            yield _picture(heading, chart, caption, name)
    yield from _analyses(section, name)


def _picture(heading: str, chart: Chart, caption: str, name: str, wide: bool = False) -> Picture:
    place = f"{name}-{re.sub('[^a-z0-9]+', '-', heading.lower())}"
    panels = [
        (panel.title, svg(panel.figure, f"{place}-{i}", f"{heading}: {panel.title}"))
        for i, panel in enumerate(chart.panels)
    ]
    legend = [(key(style), label) for label, style in chart.legend.items()]
    return Picture(heading, caption, panels, legend, wide)


def _analyses(section: Section, name: str) -> Iterator[Picture]:
    """Hessians and landscapes of the first run of each group that has one."""
    looks = styles(section.groups)
    for kind, draw in (("hessian", _hessian), ("landscape", _landscapes)):
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
            heading, chart, caption = draw(found, looks)
            yield _picture(heading, chart, caption, f"{name}-{file}", wide=True)


def _hessian(analyses: dict[str, dict[str, Any]], looks: Any) -> tuple[str, Chart, str]:
    first = next(iter(analyses.values()))
    caption = (
        "Spectral density of the Hessian of the mean training loss, its largest eigenvalue and "
        f"its trace with the standard error (as Fig. 3 of the paper). {_describe(analyses)}"
    )
    panel = Panel("Spectral density", spectrum_figure(analyses, looks))
    return f"Hessian on {first['classes']} classes", Chart([panel], {}), caption


def _landscapes(analyses: dict[str, dict[str, Any]], looks: Any) -> tuple[str, Chart, str]:
    caption = (
        "Loss along one and over two filter-normalised random directions (as Fig. 1 of the "
        f"paper). {_describe(analyses)}"
    )
    panels = [
        Panel("Along one direction", lines_figure(analyses, looks)),
        Panel("Over two directions", planes_figure(analyses)),
    ]
    return "Loss landscapes", Chart(panels, {}), caption


def _describe(analyses: dict[str, dict[str, Any]]) -> str:
    """What each analysis looked at, once where it is the same for all."""
    texts = {label: analysis["about"] for label, analysis in analyses.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return " ".join(f"{label}: {about}" for label, about in texts.items())

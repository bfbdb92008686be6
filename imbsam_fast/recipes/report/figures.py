"""Pictures of compared runs, as in the paper's Figures 2 and 4: panels that a page arranges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from ..figures import DASHES, INK, MARKERS, PALETTE, Style, new_figure, plain_axes, styles_of
from ..metrics import GROUPS, group_of
from .comparison import Family, Group, Section, Value, families
from .cost import cost
from .pairs import Difference, baseline, paired_classes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BARS_UP_TO = 200  # classes; more are drawn as a moving average
NAMES_UP_TO = 24  # classes, each with its name on the axis; of more, as many
NUMBERS_UP_TO = 12  # classes of a confusion matrix, with the numbers in it
CONFUSION_UP_TO = 100  # classes of a confusion matrix
MUTED = "#505050"
ORDER = ("all", *GROUPS)  # of panels
WIDTH = 5.0  # inches of a panel; a phone shows it at about the size it is drawn in


class Panel(NamedTuple):
    """One picture of a chart, and its heading."""

    title: str
    figure: Figure


class Chart(NamedTuple):
    """Panels that share a legend, and what they show. Without a legend lines are named inside."""

    panels: list[Panel]
    legend: dict[str, Style]


def styles(groups: Sequence[Group]) -> dict[str, Style]:
    """The look of each group by its label."""
    return styles_of((group.label, group.config) for group in groups)


def _panel(height: float) -> tuple[Figure, Axes]:
    figure = new_figure(WIDTH, height)
    return figure, figure.subplots()


def _span(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """Limits that hold all of `values`, and a little more."""
    low, high = min(values), max(values)
    margin = share * (high - low) or 1.0
    return low - margin, high + margin


def _ends(value: Value) -> tuple[float, float]:
    mean, std = value
    return mean - (std or 0.0), mean + (std or 0.0)


# ---------------------------------------------------------------- gain over SGD (Fig. 2)


def gain_chart(section: Section) -> Chart | None:
    """Test accuracy of each class minus SGD's with its 95 % interval; None without a pair.

    Classes run from frequent to rare; all panels have one scale.
    """
    pairs = [(g, b) for g in section.finished if (b := baseline(g, section.groups)) is not None]
    if not pairs or section.counts is None:
        return None
    counts = section.counts
    order = sorted(range(len(counts)), key=lambda k: (-counts[k], k))
    look = styles(section.groups)
    gains = {group.label: paired_classes(group, sgd) for group, sgd in pairs}
    limits = _span([x for found in gains.values() for d in found for x in _shown_ends(d)] + [0.0])
    panels = []
    for group, sgd in pairs:
        figure, axes = _panel(3.4)
        found = [gains[group.label][k] for k in order]
        _draw_gains(axes, found, look[group.label].colour)
        _mark_groups(axes, [counts[k] for k in order], section.borders)
        _name_classes(axes, [f"{section.class_names[k]} ({counts[k]:,})" for k in order])
        axes.set(ylim=limits, ylabel="gain (percentage points)")
        plain_axes(axes)
        over = sgd.label if sgd.label == "SGD" else f"[{sgd.label}]"
        panels.append(Panel(f"{group.label}, minus {over}", figure))
    return Chart(panels, {})


def _shown_ends(gain: Difference) -> tuple[float, float]:
    """The ends of the interval, which two or three seeds stretch far, cut at twice the scale."""
    low = gain.mean if gain.low is None else max(gain.low, -100.0)
    high = gain.mean if gain.high is None else min(gain.high, 100.0)
    return low, high


def _mark_groups(axes: Axes, counts: Sequence[int], borders: tuple[int, int]) -> None:
    """Part the Many, Medium and Few classes of falling `counts` by lines, named on top."""
    members = [group_of(count, borders) for count in counts]
    for k, (before, after) in enumerate(pairwise(members)):
        if before != after:
            axes.axvline(k + 0.5, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    for group in GROUPS:
        places = [k for k, member in enumerate(members) if member == group]
        if places:
            axes.annotate(
                group.capitalize(),
                ((places[0] + places[-1]) / 2, 1.01),
                xycoords=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                color=MUTED,
            )


def _name_classes(axes: Axes, names: Sequence[str]) -> None:
    """Below the axis; where there are many, every few of them."""
    each = -(-len(names) // NAMES_UP_TO)
    at = range(0, len(names), each)
    short = [name if len(name) <= 28 else f"{name[:14]}…{name[-13:]}" for name in names]
    axes.set_xticks(at, [short[k] for k in at], rotation=90, fontsize="small")
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xlabel("class (training images)")


def _draw_gains(axes: Axes, gains: list[Difference], colour: str) -> None:
    axes.axhline(0, color=INK, linewidth=0.8, zorder=1)
    means = [gain.mean for gain in gains]
    if len(gains) <= BARS_UP_TO:
        axes.bar(range(len(gains)), means, 0.8, color=colour, zorder=2)
        bars = [(k, g.mean, *_shown_ends(g)) for k, g in enumerate(gains) if g.low is not None]
        if bars:
            x, y, low, high = zip(*bars)
            error = [[m - end for m, end in zip(y, low)], [end - m for m, end in zip(y, high)]]
            axes.errorbar(
                x, y, error, fmt="none", ecolor=INK, elinewidth=0.9, capsize=1.5, zorder=3
            )
        return
    window = len(gains) // 50
    parts = [means[i : i + window] for i in range(0, len(means), window)]
    heights = [sum(part) / len(part) for part in parts]
    axes.fill_between([window * (i + 0.5) for i in range(len(parts))], heights, color=colour)
    axes.annotate(f"means of {window} classes", (0.99, 0.03), xycoords="axes fraction", ha="right")


# ---------------------------------------------------------------- rho and eta (Fig. 4)


def ablation_charts(section: Section) -> dict[str, Chart]:
    """Accuracy against rho, a line an eta (against eta where rho does not vary), by family."""
    return {family.label: _ablation(family) for family in families(section.groups)}


def _ablation(family: Family) -> Chart:
    etas = sorted({eta for eta, _ in family.members})
    rhos = sorted({rho for _, rho in family.members})
    by_rho = len(rhos) > 1
    lines, along = (etas, rhos) if by_rho else (rhos, etas)
    tables = {key: g.accuracy("last", "plain") or {} for key, g in family.members.items()}
    ends = [x for table in tables.values() for v in table.values() if v for x in _ends(v)]
    looks = {
        f"{'eta' if by_rho else 'rho'} {line:g}": Style(
            PALETTE[i % len(PALETTE)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)]
        )
        for i, line in enumerate(lines)
    }
    panels = []
    for column in ORDER:
        figure, axes = _panel(3.2)
        for line, (label, style) in zip(lines, looks.items()):
            points = []
            for x in along:
                value = tables.get((line, x) if by_rho else (x, line), {}).get(column)
                if value is not None:
                    points.append((x, *value))
            if points:
                _line_with_errors(axes, points, style, label)
        axes.set(ylim=_span(ends), ylabel="test accuracy (%)")
        axes.set_xlabel("rho" if by_rho else "eta (training images)")
        plain_axes(axes)
        panels.append(Panel(f"{column.capitalize()} classes", figure))
    return Chart(panels, looks)


def _line_with_errors(
    axes: Axes, points: list[tuple[float, float, float | None]], style: Style, label: str
) -> None:
    x, mean, std = zip(*points)
    axes.errorbar(
        x,
        mean,
        yerr=[s or 0.0 for s in std] if any(s is not None for s in std) else None,
        color=style.colour,
        linestyle=style.dashes,
        marker=style.marker,
        markersize=5,
        capsize=2,
        elinewidth=1,
        label=label,
        zorder=2,
    )


# ---------------------------------------------------------------- training curves

# Keys of a log line -> title and axis.
CURVES = {
    "head": ("Head part of the training loss", "loss (nats)"),
    "tail": ("Tail part of the training loss", "loss (nats)"),
    "loss": ("Training loss", "loss (nats)"),
    "train_accuracy": ("Training accuracy", "accuracy (%)"),
    "validation": ("Validation accuracy, mean of classes", "accuracy (%)"),
}


def curves_chart(section: Section) -> Chart | None:
    """Means over the seeds against the epoch, with a band of one standard deviation."""
    look = styles(section.groups)
    panels, drawn = [], {}
    for key, (title, unit) in CURVES.items():
        curves = [(group, points) for group in section.groups if (points := group.curve(key))]
        if not curves:
            continue
        figure, axes = _panel(3.2)
        smallest = min((mean for _, points in curves for _, mean, _ in points), default=0.0)
        logarithmic = unit.startswith("loss") and smallest > 0
        for group, points in curves:
            drawn[group.label] = look[group.label]
            _curve(axes, points, look[group.label], smallest / 2 if logarithmic else -math.inf)
        axes.set(xlabel="epoch", ylabel=unit)
        axes.locator_params(axis="x", integer=True)
        if logarithmic:
            axes.set_yscale("log")
            axes.set_ylabel(f"{unit}, log scale")
        plain_axes(axes)
        panels.append(Panel(title, figure))
    return Chart(panels, drawn) if panels else None


def _curve(
    axes: Axes, points: list[tuple[int, float, float | None]], style: Style, floor: float
) -> None:
    """`floor` is where the band ends below, since a logarithm knows no 0."""
    epochs, mean, std = zip(*points)
    axes.plot(
        epochs,
        mean,
        color=style.colour,
        linestyle=style.dashes,
        linewidth=1.5,
        marker=style.marker,
        markersize=4,
        markevery=max(1, len(points) // 8),
    )
    if None not in std:
        low = [max(m - s, floor) for m, s in zip(mean, std)]
        high = [m + s for m, s in zip(mean, std)]
        axes.fill_between(epochs, low, high, color=style.colour, alpha=0.15, linewidth=0)


# ---------------------------------------------------------------- accuracy by group of classes


def groups_chart(section: Section, view: str = "plain") -> Chart | None:
    """All, Many, Medium and Few on one scale: points with the standard deviation over seeds."""
    tables = {g.label: table for g in section.finished if (table := g.accuracy("last", view))}
    if not tables:
        return None
    look = styles(section.groups)
    ends = [x for table in tables.values() for v in table.values() if v for x in _ends(v)]
    panels = []
    for column in ORDER:
        figure, axes = _panel(0.8 + 0.44 * len(tables))
        for y, (label, table) in enumerate(tables.items()):
            # The name stands above the point, so that a narrow page has room for both.
            axes.text(0, y - 0.18, label, transform=axes.get_yaxis_transform(), fontsize="small")
            value = table[column]
            if value is not None:
                mean, std = value
                style = look[label]
                axes.errorbar(
                    mean, y + 0.18, xerr=std, fmt=style.marker, color=style.colour, capsize=3
                )
        axes.set(xlabel="test accuracy (%)", xlim=_span(ends), ylim=(len(tables) - 0.4, -0.75))
        axes.set_yticks([])
        plain_axes(axes, "x")
        axes.spines["left"].set_visible(False)
        panels.append(Panel(f"{column.capitalize()} classes", figure))
    return Chart(panels, {})


# ---------------------------------------------------------------- accuracy against cost


def cost_chart(section: Section) -> Chart | None:
    """Accuracy against the time of a step in SGD steps; None for fewer than two such groups.

    A line joins those that nothing beats in both: the front.
    """
    tables = {g.label: t for g in section.finished if (t := g.accuracy("last", "plain"))}
    times = {
        g.label: time
        for g in section.finished
        if g.label in tables and (time := cost(g, section.groups).time)
    }
    if len(times) < 2:
        return None
    look = {label: s for label, s in styles(section.groups).items() if label in times}
    ends = [x for label in times for v in tables[label].values() if v for x in _ends(v)]
    panels = []
    for column in ORDER:
        figure, axes = _panel(3.2)
        points = {label: v for label in times if (v := tables[label][column]) is not None}
        _draw_front(axes, [(times[label], mean) for label, (mean, _) in points.items()])
        for label, (mean, std) in points.items():
            axes.errorbar(
                times[label], mean, yerr=std, fmt=look[label].marker, color=look[label].colour,
                markersize=7, capsize=3, zorder=2,
            )  # fmt: skip
        axes.set(xlabel="time a step (SGD steps)", ylabel="test accuracy (%)", ylim=_span(ends))
        axes.set_xlim(_span([0.9, *times.values()]))
        plain_axes(axes)
        panels.append(Panel(f"{column.capitalize()} classes", figure))
    return Chart(panels, look)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, accuracy) those without another that costs no more and is more accurate."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept


def _draw_front(axes: Axes, points: list[tuple[float, float]]) -> None:
    corners = front(points)
    x = [cost for cost, _ in corners]
    y = [accuracy for _, accuracy in corners]
    axes.step(x, y, where="post", color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)


# ---------------------------------------------------------------- what is taken for what


def confusion_chart(section: Section) -> Chart | None:
    """A matrix a configuration, in % of a class's test images; None where none is recorded."""
    names = section.class_names
    if len(names) > CONFUSION_UP_TO:
        return None
    panels = [
        Panel(group.label, _matrix(cells, names))
        for group in section.finished
        if (cells := group.confusion())
    ]
    return Chart(panels, {}) if panels else None


def _matrix(cells: list[list[int]], names: Sequence[str]) -> Figure:
    """Right ones blue, wrong ones orange, as opaque as the root of their share of the row."""
    from matplotlib.colors import to_rgb

    right, wrong = to_rgb(PALETTE[2]), to_rgb(PALETTE[3])
    shares = [[count / max(sum(row), 1) for count in row] for row in cells]
    figure, axes = _panel(WIDTH)
    axes.imshow(
        [
            [(*(right if i == k else wrong), share**0.5) for k, share in enumerate(row)]
            for i, row in enumerate(shares)
        ],
        interpolation="nearest",
    )
    at = range(0, len(names), -(-len(names) // NAMES_UP_TO))
    ticks = [names[k] if len(names[k]) <= 12 else f"{names[k][:11]}…" for k in at]
    axes.set_xticks(at, ticks, rotation=90, fontsize="small")
    axes.set_yticks(at, ticks, fontsize="small")
    axes.set(xlabel="taken for", ylabel="class")
    for i, row in enumerate(shares if len(names) <= NUMBERS_UP_TO else []):
        for k, share in enumerate(row):
            if share >= 0.005:
                ink = "white" if i == k and share > 0.25 else INK
                axes.text(
                    k, i, f"{100 * share:.0f}", ha="center", va="center", fontsize="small",
                    color=ink,
                )  # fmt: skip
    return figure

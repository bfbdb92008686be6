"""Pictures of compared runs, as in the paper's Figures 2 and 4."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..figures import DASHES, GRID, MARKERS, PALETTE, Style, new_figure, plain_axes, styles_of
from ..metrics import COLUMNS, GROUPS, group_of
from .comparison import Family, Group, Section, baseline, families
from .cost import cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BARS_UP_TO = 200  # classes; more are drawn as a moving average


def styles(groups: Sequence[Group]) -> dict[str, Style]:
    """One colour and line style for each group."""
    return styles_of([group.label for group in groups])


# ---------------------------------------------------------------- gain over SGD (Fig. 2)


def gain_figure(section: Section) -> Figure | None:
    """Per-class test accuracy minus SGD's, classes from frequent to rare; None without a pair."""
    pairs = [(g, b) for g in section.finished if (b := baseline(g, section.groups)) is not None]
    if not pairs or section.counts is None:
        return None
    order = sorted(range(len(section.counts)), key=lambda k: (-section.counts[k], k))  # type: ignore[index]
    figure = new_figure(10, 0.9 + 1.7 * len(pairs))
    rows = figure.subplots(len(pairs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    look = styles(section.groups)
    for axes, (group, sgd) in zip(rows, pairs):
        mean = {g.label: [value for value, _ in g.per_class()] for g in (group, sgd)}
        gains = [mean[group.label][k] - mean[sgd.label][k] for k in order]
        _draw_gains(axes, gains, look[group.label].colour)
        over = sgd.label if sgd.label == "SGD" else f"[{sgd.label}]"
        axes.set_title(f"{group.label}, minus {over}", loc="left", fontsize="medium")
        plain_axes(axes)
    for axes in rows:
        _mark_groups(axes, sorted(section.counts)[::-1], section.borders, axes is rows[0])
    rows[-1].set_xlabel("classes, from the most to the fewest training images")
    figure.supylabel("gain (percentage points)", fontsize="medium")
    return figure


def _mark_groups(axes: Axes, counts: Sequence[int], borders: tuple[int, int], named: bool) -> None:
    """Part the Many, Medium and Few classes of falling `counts` by lines; name them on top."""
    members = [group_of(count, borders) for count in counts]
    for k, (before, after) in enumerate(pairwise(members)):
        if before != after:
            axes.axvline(k + 0.5, color="#808080", linewidth=0.8, linestyle=(0, (4, 3)))
    for group in GROUPS if named else ():
        places = [k for k, member in enumerate(members) if member == group]
        if places:
            axes.annotate(
                group.capitalize(),
                ((places[0] + places[-1]) / 2, 0.98),
                xycoords=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                color="#505050",
            )


def _draw_gains(axes: Axes, gains: list[float], colour: str) -> None:
    axes.axhline(0, color="#404040", linewidth=0.8, zorder=1)
    axes.margins(x=0.01)
    if len(gains) <= BARS_UP_TO:
        axes.bar(range(len(gains)), gains, 0.85, color=colour, zorder=2)
        return
    window = len(gains) // 50
    means = [sum(part) / len(part) for part in _windows(gains, window)]
    axes.fill_between([window * (i + 0.5) for i in range(len(means))], means, color=colour)
    axes.annotate(f"means of {window} classes", (0.99, 0.03), xycoords="axes fraction", ha="right")


def _windows(values: list[float], size: int) -> list[list[float]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


# ---------------------------------------------------------------- rho and eta (Fig. 4)


def ablation_figures(section: Section) -> dict[str, Figure]:
    """Accuracy against rho, a line an eta (against eta where rho does not vary), by family."""
    return {family.label: _ablation(family) for family in families(section.groups)}


def _ablation(family: Family) -> Figure:
    etas = sorted({eta for eta, _ in family.members})
    rhos = sorted({rho for _, rho in family.members})
    by_rho = len(rhos) > 1
    lines, along = (etas, rhos) if by_rho else (rhos, etas)
    figure = new_figure(10, 6.4)
    panels = figure.subplots(2, 2).flat
    for axes, column in zip(panels, ("all", *GROUPS)):
        for i, line in enumerate(lines):
            points = []
            for x in along:
                group = family.members.get((line, x) if by_rho else (x, line))
                table = group.accuracy("last", "plain") if group else None
                value = table[column] if table else None
                if value is not None:
                    points.append((x, *value))
            if points:
                style = Style(PALETTE[i % len(PALETTE)], DASHES[i % len(DASHES)], MARKERS[i % 8])
                _line_with_errors(axes, points, style, f"{'eta' if by_rho else 'rho'} {line:g}")
        axes.set_title(f"{column.capitalize()} classes", loc="left", fontsize="medium")
        axes.set_xlabel("rho" if by_rho else "eta (training images)")
        axes.set_ylabel("test accuracy (%)")
        plain_axes(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=6, frameon=False)
    return figure


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


def curves_figure(section: Section) -> Figure | None:
    """Means over the seeds against the epoch, with a band of one standard deviation."""
    shown = {
        key: [(group, points) for group in section.groups if (points := group.curve(key))]
        for key in CURVES
    }
    shown = {key: curves for key, curves in shown.items() if curves}
    if not shown:
        return None
    columns = 2 if len(shown) > 1 else 1
    figure = new_figure(10, 0.6 + 2.9 * -(-len(shown) // columns))
    panels = list(figure.subplots(-(-len(shown) // columns), columns, squeeze=False).flat)
    look = styles(section.groups)
    labels: dict[str, Any] = {}
    for axes, (key, curves) in zip(panels, shown.items()):
        for group, points in curves:
            labels[group.label] = _curve(axes, points, look[group.label])
        title, unit = CURVES[key]
        axes.set_title(title, loc="left", fontsize="medium")
        axes.set(xlabel="epoch", ylabel=unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        plain_axes(axes)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    legend_below(figure, labels)
    return figure


def _curve(axes: Axes, points: list[tuple[int, float, float | None]], style: Style) -> Any:
    epochs, mean, std = zip(*points)
    (line,) = axes.plot(
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
        low = [m - s for m, s in zip(mean, std)]
        high = [m + s for m, s in zip(mean, std)]
        axes.fill_between(epochs, low, high, color=style.colour, alpha=0.18, linewidth=0)
    return line


def legend_below(figure: Figure, lines: dict[str, Any]) -> None:
    """One legend for all axes, below them."""
    figure.legend(
        list(lines.values()),
        list(lines),
        loc="outside lower center",
        ncols=min(len(lines), 3),
        frameon=False,
    )


# ---------------------------------------------------------------- accuracy by group of classes


def groups_figure(section: Section, view: str = "plain") -> Figure | None:
    """Many, Medium, Few and All as points with the standard deviation over seeds, a row a group."""
    groups = [g for g in section.finished if g.accuracy("last", view)]
    if not groups:
        return None
    figure = new_figure(10, 1.2 + 0.32 * len(groups))
    look = styles(section.groups)
    panels = figure.subplots(1, len(COLUMNS), sharey=True)
    for axes, column in zip(panels, COLUMNS):
        for y, group in enumerate(groups):
            value = (group.accuracy("last", view) or {})[column]
            if value is not None:
                style = look[group.label]
                axes.errorbar(
                    value[0], y, xerr=value[1], fmt=style.marker, color=style.colour, capsize=3
                )
        axes.set_title(column.capitalize(), loc="left", fontsize="medium")
        axes.set_xlabel("test accuracy (%)")
        axes.grid(axis="x", color=GRID, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(groups)), [group.label for group in groups])
    panels[0].set_ylim(len(groups) - 0.4, -0.6)
    return figure


# ---------------------------------------------------------------- accuracy against cost


def cost_figure(section: Section) -> Figure | None:
    """Accuracy against the time of an epoch in SGD epochs; None for fewer than two such groups."""
    times = {g.label: time for g in section.finished if (time := cost(g, section.groups).time)}
    groups = [g for g in section.finished if g.label in times and g.accuracy("last", "plain")]
    if len(groups) < 2:
        return None
    figure = new_figure(10, 6.4 + 0.2 * -(-len(groups) // 3))
    look = styles(section.groups)
    points: dict[str, Any] = {}
    for axes, column in zip(figure.subplots(2, 2).flat, ("all", *GROUPS)):
        for group in groups:
            value = (group.accuracy("last", "plain") or {})[column]
            if value is not None:
                style = look[group.label]
                points[group.label] = axes.errorbar(
                    times[group.label], value[0], yerr=value[1], fmt=style.marker,
                    color=style.colour, capsize=3,
                )  # fmt: skip
        axes.set_title(f"{column.capitalize()} classes", loc="left", fontsize="medium")
        axes.set(xlabel="time of an epoch (SGD epochs)", ylabel="test accuracy (%)")
        plain_axes(axes)
    legend_below(figure, points)
    return figure

"""Pictures of results. Needs matplotlib, no display, and changes no global setting of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .metrics import BORDERS, GROUPS, group_of, mean_and_std

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"sgd": "#9aa5b1", "sgd_weighted": "#c9a227", "sam": "#3d7ea6", "imbsam": "#c8553d"}


def per_class_figure(results: dict[str, Any]) -> Figure:
    """Bars of test accuracy per class, a colour a method, from the content of results.json.

    Bars are means over the seeds; with more than one seed a line marks the standard deviation.
    """
    from matplotlib.figure import Figure

    counts = results["data"]["class_counts"]
    methods = results["results"]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(methods)
    for i, (method, result) in enumerate(methods.items()):
        mean, std = _over_seeds([seed["per_class"] for seed in result["seeds"]])
        offset = (i - (len(methods) - 1) / 2) * width
        axes.bar(
            [k + offset for k in range(len(counts))],
            mean,
            0.92 * width,
            yerr=std,
            color=COLOURS[method],
            error_kw={"elinewidth": 1, "ecolor": "#40404080"},
            label=result["label"],
            zorder=2,
        )
    mark_groups(axes, counts)
    tail = set(results["data"]["tail_classes"])
    axes.set_xticks(
        range(len(counts)),
        [f"digit {k}\n{n} image{'s' * (n > 1)}{'*' * (k in tail)}" for k, n in enumerate(counts)],
    )
    axes.set_xlim(-0.5, len(counts) - 0.5)
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("test accuracy (%)")
    axes.set_xlabel("class and its training images (* tail class of ImbSAM)")
    axes.set_title(_title(results["settings"]), loc="left")
    axes.grid(axis="y", color="#e4e4e4", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=len(methods), frameon=False)
    return figure


def _title(settings: dict[str, Any]) -> str:
    seeds = settings["seeds"]
    over = f"mean ± std of {seeds} seeds" if seeds > 1 else "one seed"
    return f"Long-tailed digits, imbalance factor {settings['imbalance_factor']:g}, {over}"


def _over_seeds(per_class: list[list[float]]) -> tuple[list[float], list[float] | None]:
    pairs = [mean_and_std(accuracies) for accuracies in zip(*per_class)]
    std = [s for _, s in pairs if s is not None]
    return [mean for mean, _ in pairs], std or None


def mark_groups(
    axes: Axes, counts: Sequence[int], borders: tuple[int, int] = BORDERS, named: bool = True
) -> None:
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

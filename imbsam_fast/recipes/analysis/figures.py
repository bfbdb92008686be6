"""Pictures of analyses, one run or several side by side: the paper's Figures 1 and 3."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..figures import Style, new_figure, plain_axes
from .hessian import Spectrum, density

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 1000  # of a drawn density
WIDTH = 0.01  # of a node in the density, as a share of the drawn range
FLOOR = 1e-6  # of the drawn density, as a share of its peak
LEVELS = 12  # lines of equal loss
COLUMNS = 3


def spectrum_figure(analyses: Mapping[str, dict[str, Any]], looks: Mapping[str, Style]) -> Figure:
    """Spectral densities, one panel a run, on the same axes.

    `analyses` and `looks` are by the run's label; the analyses are what `hessian_analysis`
    returns.
    """
    spectra = {label: Spectrum(**analysis["density"]) for label, analysis in analyses.items()}
    nodes = [x for spectrum in spectra.values() for values in spectrum.values for x in values]
    low, high = min(nodes), max(nodes)
    span = (high - low) or max(abs(high), 1.0)
    at = torch.linspace(low - 0.05 * span, high + 0.05 * span, POINTS, dtype=torch.float64)
    curves = {label: density(s, at, WIDTH * span).tolist() for label, s in spectra.items()}
    peak = max(max(curve) for curve in curves.values())
    figure, panels = _panels(len(analyses), height=2.9)
    for axes, (label, curve) in zip(panels, curves.items()):
        colour = looks[label].colour
        axes.fill_between(at.tolist(), curve, FLOOR * peak, color=colour, alpha=0.25, linewidth=0)
        axes.plot(at.tolist(), curve, color=colour, linewidth=1.2)
        axes.set(yscale="log", ylim=(FLOOR * peak, 3 * peak))
        axes.set(xlabel="eigenvalue of the Hessian", ylabel="spectral density")
        axes.set_title(label, loc="left", fontsize="medium")
        axes.annotate(
            _sharpness(analyses[label]),
            (0.98, 0.96),
            xycoords="axes fraction",
            ha="right",
            va="top",
            fontsize="small",
        )
        plain_axes(axes)
    return figure


def _sharpness(analysis: dict[str, Any]) -> str:
    top, trace = analysis["lambda_max"], analysis["trace"]
    error = f" ± {trace['error']:.3g}" if trace["error"] is not None else ""
    return f"λmax = {top['value']:.4g}\nTr(H) = {trace['value']:.4g}{error}"


def _panels(number: int, height: float) -> tuple[Figure, list[Axes]]:
    """`number` panels on shared axes, COLUMNS a row."""
    columns = min(number, COLUMNS)
    rows = -(-number // columns)
    figure = new_figure(10 if columns > 1 else 6, height * rows)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in panels[number:]:
        axes.set_visible(False)
    return figure, panels


# ---------------------------------------------------------------- landscapes


def lines_figure(analyses: Mapping[str, dict[str, Any]], looks: Mapping[str, Style]) -> Figure:
    """The loss of the head and of the tail classes along one direction, a line a run."""
    parts = list(next(iter(analyses.values()))["groups"])
    figure = new_figure(10, 3.4 + 0.2 * (len(analyses) // 3))
    lines: dict[str, Any] = {}
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts):
        for label, analysis in analyses.items():
            steps, losses = analysis["line"]["steps"], _numbers(analysis["line"][part])
            look = looks[label]
            (lines[label],) = axes.plot(
                steps, losses, color=look.colour, linestyle=look.dashes, linewidth=1.5
            )
        axes.set_title(f"{part.capitalize()} classes", loc="left", fontsize="medium")
        axes.set(xlabel="step along a random direction, in filter norms", ylabel="loss (nats)")
        axes.set_yscale("log")  # it spans orders of magnitude
        plain_axes(axes)
    if len(lines) > 1:
        figure.legend(
            list(lines.values()),
            list(lines),
            loc="outside lower center",
            ncols=min(len(lines), 3),
            frameon=False,
        )
    return figure


def planes_figure(analyses: Mapping[str, dict[str, Any]]) -> Figure:
    """Lines of equal loss over two directions; a row a part of the classes, a column a run.

    Levels are shared in a row, so that equal colours mean equal losses.
    """
    from matplotlib.colors import LogNorm

    parts = list(next(iter(analyses.values()))["groups"])
    figure = new_figure(max(3.4 * len(analyses), 6.4), 3.2 * len(parts))
    rows = figure.subplots(len(parts), len(analyses), sharex=True, sharey=True, squeeze=False)
    for row, part in zip(rows, parts):
        levels = _levels([_grid(analysis, part) for analysis in analyses.values()])
        colours = {"cmap": "cividis", "norm": LogNorm(levels[0], levels[-1]), "extend": "min"}
        drawn = []
        for axes, (label, analysis) in zip(row, analyses.items()):
            steps = analysis["plane"]["steps"]
            losses = _grid(analysis, part)
            drawn.append(axes.contourf(steps, steps, losses, levels, **colours))
            axes.plot(0, 0, "+", color="white", markersize=9)
            axes.set_aspect("equal")
            axes.set_title(f"{label}\n{part} classes", loc="left", fontsize="medium")
        figure.colorbar(drawn[0], ax=list(row), label="loss (nats)", format="%.3g")
    figure.supxlabel("step along the second direction, in filter norms")
    figure.supylabel("step along the first direction, in filter norms")
    return figure


def _grid(analysis: dict[str, Any], part: str) -> list[list[float]]:
    return [_numbers(row) for row in analysis["plane"][part]]


def _numbers(values: Sequence[float | None]) -> list[float]:
    """None stands for a loss that is not finite."""
    return [math.nan if value is None else value for value in values]


def _levels(grids: Sequence[list[list[float]]]) -> list[float]:
    """LEVELS + 1 losses in equal ratios from the smallest to the largest of `grids`."""
    values = [x for grid in grids for row in grid for x in row if math.isfinite(x)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    low = max(low, 1e-4 * high, 1e-12)
    high = max(high, low) * 1.001  # the largest loss is inside, and there is a range
    return [low * (high / low) ** (i / LEVELS) for i in range(LEVELS + 1)]

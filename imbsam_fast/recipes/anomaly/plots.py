"""AUCPR against the anomaly ratio (the paper's Figure 5). Needs matplotlib, no display."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .settings import DETECTOR_NAMES, Fit, Settings, method_order, parsed_method
from .summary import Value, areas, at_every_ratio, over_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"sgd": "#9aa5b1", "sam": "#3d7ea6", "imbsam": "#c8553d"}
PANELS = {"aucpr_anomaly": "AUCPR of anomalies (%)", "aucpr_normal": "AUCPR of normal rows (%)"}


def aucpr_figure(fits: Sequence[Fit], settings: Settings, protocol: str) -> Figure:
    """A panel for anomalies and one for normal rows; a line a detector and method.

    Points are means over the seeds and sets that were run at every ratio, each counting alike;
    bars, the standard deviation over seeds. Ratios are spread evenly, as in the paper.
    """
    from matplotlib.figure import Figure

    own = at_every_ratio([fit for fit in fits if fit.protocol == protocol])
    ratios = sorted({fit.ratio for fit in own})
    detectors = sorted({fit.detector for fit in own})
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, 2), PANELS.items()):
        for detector in detectors:
            for method in sorted({f.method for f in own}, key=method_order):
                line = [f for f in own if (f.detector, f.method) == (detector, method)]
                _draw(axes, line, metric, ratios, detector, settings.label(method))
        axes.set_xticks(range(len(ratios)), [f"{100 * r:g} %" for r in ratios])
        axes.set_xlabel("labelled share of the training anomalies")
        axes.set_ylabel(label)
        axes.grid(axis="y", color="#e4e4e4")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    sets, seeds = (len({getattr(fit, field) for fit in own}) for field in ("set", "seed"))
    spread = "1 seed" if seeds == 1 else f"mean ± std over {seeds} seeds"
    title = f"{sets} sets, {protocol} protocol, {spread}"
    figure.suptitle(title, fontsize="medium")
    return figure


def _draw(
    axes: Any, fits: list[Fit], metric: str, ratios: list[float], detector: str, label: str
) -> None:
    points: dict[int, Value] = {}
    for i, ratio in enumerate(ratios):
        at = [fit for fit in fits if fit.ratio == ratio]
        if at:
            points[i] = over_seeds(areas(at, metric))
    if not points:
        return
    optimizer, weight = parsed_method(fits[0].method)
    axes.errorbar(
        list(points),
        [v.mean for v in points.values()],
        [v.std or 0.0 for v in points.values()],
        color=COLOURS[optimizer],
        linestyle=(0, (1, 1)) if weight != 1 else "-" if detector == "deepsad" else "--",
        marker="o" if detector == "deepsad" else "s",
        markersize=4,
        capsize=2,
        label=f"{DETECTOR_NAMES[detector]}, {label}",
    )

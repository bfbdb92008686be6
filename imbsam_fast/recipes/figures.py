"""How all pictures look. Needs matplotlib, no display.

Figures are drawn without global state. Colours are Okabe and Ito's, which stay apart for colour
blind readers; lines and points differ in dashes and markers too, for print.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#5b6770", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#000000")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MARKERS = "os^Dv*Px"
GRID = "#e4e4e4"


class Style(NamedTuple):
    """How a group looks in every picture of its section."""

    colour: str
    dashes: Any
    marker: str


def styles_of(labels: Sequence[str]) -> dict[str, Style]:
    """By label, in order."""
    return {
        label: Style(
            PALETTE[i % len(PALETTE)],
            DASHES[i // len(PALETTE) % len(DASHES)],
            MARKERS[i % len(MARKERS)],
        )
        for i, label in enumerate(labels)
    }


def new_figure(width: float, height: float) -> Figure:
    """Inches; drawn sizes follow in layout "constrained"."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plain_axes(axes: Axes) -> None:
    """Horizontal grid lines, and no frame above and on the right."""
    axes.grid(axis="y", color=GRID, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)

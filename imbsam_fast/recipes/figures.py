"""How all pictures look. Needs matplotlib, no display.

Figures are drawn without global state. Colours are Okabe and Ito's, which stay apart for colour
blind readers; lines and points differ in dashes and markers too, for print.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#5b6770", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8a6d3b")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MARKERS = "os^Dv*Px"
GRID = "#e4e4e4"
INK = "#1b1f23"  # of axes and their text

# A method has the same colour in every report, whatever it is compared with.
COLOURS = dict(
    zip(("sgd", "sgd-weighted", "sam", "imbsam", "sampled", "focal-sam", "every"), PALETTE)
)


class Style(NamedTuple):
    """How a configuration looks in every picture."""

    colour: str
    dashes: Any
    marker: str


def method_of(config: Mapping[str, Any]) -> str:
    """The key of COLOURS: the optimizer, and of ImbSAM how its step is made cheaper."""
    optimizer = str(config.get("optimizer"))
    if optimizer == "imbsam":
        if config.get("plan") == "sampled":
            return "sampled"
        if (config.get("perturb_every") or 1) != 1:
            return "every"
    return optimizer


def styles_of(configs: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Style]:
    """By label: the method's colour, and dashes and markers for those of one colour in order."""
    looks: dict[str, Style] = {}
    drawn: dict[str, int] = {}
    for label, config in configs:
        colour = COLOURS.get(method_of(config), INK)
        i = drawn[colour] = drawn.get(colour, -1) + 1
        first = PALETTE.index(colour) if colour in PALETTE else 0
        marker = MARKERS[(first + 3 * i) % len(MARKERS)]
        looks[label] = Style(colour, DASHES[i % len(DASHES)], marker)
    return looks


def new_figure(width: float, height: float) -> Figure:
    """Inches; drawn sizes follow in layout "constrained"."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plain_axes(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """Grid lines along one axis, and no frame above and on the right."""
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=GRID, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)

"""Figures as SVG elements of a page, in its fonts and in its colours, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from ..figures import GRID, INK, PALETTE, Style
from .figures import MUTED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colour of a figure -> the page's variable, and what that is in the dark.
THEME = {
    INK: ("ink", "#e6e9ec"),
    MUTED: ("muted", "#a8b1b9"),
    GRID: ("grid", "#363c42"),
    **{
        light: (f"colour-{i}", dark)
        for i, (light, dark) in enumerate(
            zip(
                PALETTE,
                ("#9fabb5", "#ffbf40", "#4ba3e3", "#ff8a4c", "#35c795", "#e59fc6", "#84cdf5",
                 "#c4a26a"),
            )
        )
    },
}  # fmt: skip

# As drawn around (0, 0), about 8 units wide.
MARKER_PATHS = {
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",
    "s": "M-4-4H4V4H-4Z",
    "^": "M0-4.5L4.5 4H-4.5Z",
    "v": "M0 4.5L4.5-4H-4.5Z",
    "D": "M0-5L5 0L0 5L-5 0Z",
    "*": "M0-5L1.4-1.6L5-1.5L2.2 .8L3.1 4.3L0 2.3L-3.1 4.3L-2.2 .8L-5-1.5L-1.4-1.6Z",
    "P": "M-1.7-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
    "x": "M-4-2.6L-2.6-4L0-1.4L2.6-4L4-2.6L1.4 0L4 2.6L2.6 4L0 1.4L-2.6 4L-4 2.6L-1.4 0Z",
}


@contextmanager
def drawing() -> Iterator[None]:
    """Inside the block figures are made for a page: its ink, and text that a phone shows."""
    import matplotlib

    ink: Any = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    plain: Any = {"figure.facecolor": "none", "axes.facecolor": "none", "font.size": 11}
    with matplotlib.rc_context({**ink, **plain}):
        yield


def variables(dark: bool) -> str:
    """CSS declarations of THEME."""
    return " ".join(f"--{name}: {d if dark else c};" for c, (name, d) in THEME.items())


def svg(figure: Figure, name: str, label: str) -> str:
    """An element whose text is text; `label` is what a screen reader says of it.

    `name` is unique in the page: ids inside SVG elements are shared by the whole document.
    """
    import matplotlib

    file = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata=no_metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :].strip()
    # Names of parts, such as "axes_1", are the same in every figure, and nothing refers to them.
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r"font: ([^']*?)'[^;\"]*", r"font: \1sans-serif", text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda m: _variable(m[0]), text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def _variable(colour: str) -> str:
    return f"var(--{THEME[colour][0]})" if colour in THEME else colour


def key(style: Style) -> str:
    """What a legend shows beside a name: a piece of the line, and the marker on it."""
    colour = _variable(style.colour)
    dashes = "none" if style.dashes == "-" else " ".join(str(2 * x) for x in style.dashes[1])
    return (
        f'<svg class="key" viewBox="-17 -6 34 12" aria-hidden="true" style="color: {colour}">'
        f'<path d="M-16 0H16" stroke="currentColor" stroke-width="2" stroke-dasharray="{dashes}"/>'
        f'<path d="{MARKER_PATHS[style.marker]}" fill="currentColor"/></svg>'
    )

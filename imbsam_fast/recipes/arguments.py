"""What the command lines of all recipes share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


class UsageError(Exception):
    """Something that the user can put right; its text is the whole message."""


def number(
    low: float, high: float = math.inf, above: bool = False, kind: type = float
) -> Callable[[str], float]:
    """An argparse type: a finite `kind` from `low` (or above it) to `high`."""
    noun = "a whole number" if kind is int else "a number"
    limits = f"> {low}" if above else f">= {low}" if high == math.inf else f"{low} to {high}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf or (above and value == low):
            raise argparse.ArgumentTypeError(f"is {text!r}, expected {noun} {limits}")
        return value

    return parse

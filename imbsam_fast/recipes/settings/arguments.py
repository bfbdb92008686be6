"""What the command lines of all recipes share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from importlib.util import find_spec

MAX_SEED = 2**62  # torch takes 63 bits, and some seeds follow one another
MAX_THREADS = 1024  # far more than help; the system refuses to start some number beyond
PACKAGES = {"sklearn": "scikit-learn", "yaml": "pyyaml"}  # by module, where the names differ


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


def require_extras(modules: list[str], extra: str = "recipes") -> None:
    """Raise UsageError, naming `extra` of this package, where one of `modules` is missing."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        names = " and ".join(PACKAGES.get(name, name) for name in missing)
        raise UsageError(f"{names} is not installed; pip install 'imbsam-fast[{extra}]'")


def check_device(device: str) -> None:
    """Raise UsageError where torch has no such device or the forced backend does not run on it."""
    import torch  # here, since most command lines are parsed without it

    from ...ops import dispatch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device is 'cuda', expected 'cpu': torch finds no CUDA device here")
    try:
        dispatch.backend_name(device)
    except (ValueError, RuntimeError) as error:  # IMBSAM_BACKEND
        raise UsageError(str(error)) from error

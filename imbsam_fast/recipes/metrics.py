"""Accuracy per class and over the Many, Medium and Few groups of classes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from torch import Tensor

GROUPS = ("many", "medium", "few")
COLUMNS = (*GROUPS, "all")


BORDERS = (20, 100)  # the paper's


def group_of(count: int, borders: tuple[int, int] = BORDERS) -> str:
    """The group of a class with `count` training images: few < low <= medium <= high < many."""
    low, high = borders
    return "many" if count > high else "medium" if count >= low else "few"


def shares(right: Tensor, rows: Tensor) -> list[float]:
    """right / rows in %, from counts (K,). Raises ValueError where a class has no row."""
    if len(right) != len(rows) or not rows.all():
        raise ValueError(
            f"targets has {rows.tolist()} rows per class, expected at least one for each of "
            f"{len(right)} classes"
        )
    return (100 * right.double() / rows).tolist()


def group_accuracies(
    per_class: Sequence[float], counts: Sequence[int], borders: tuple[int, int] = BORDERS
) -> dict[str, float | None]:
    """Mean of the per-class accuracies of each group and of all classes; None without a class.

    Keys are COLUMNS; `counts` holds the training images of each class.
    """
    accuracies: dict[str, float | None] = {}
    for group in GROUPS:
        members = [
            a for a, n in zip(per_class, counts, strict=True) if group_of(n, borders) == group
        ]
        accuracies[group] = fmean(members) if members else None
    return {**accuracies, "all": fmean(per_class)}


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation, None for a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def accuracy_cell(value: tuple[float, float | None] | None) -> str:
    """Mean and standard deviation for a table, "-" for a group without classes."""
    if value is None:
        return "-"
    mean, std = value
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ±{std:.1f}"

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


def confusion_rows(cells: Tensor) -> list[str]:
    """One text a class from counts (K, K), such as "0:48 7:2": 48 taken for 0 and 2 for 7."""
    return [
        " ".join(f"{k}:{int(row[k])}" for k in row.nonzero().flatten().tolist()) for row in cells
    ]


def read_confusion(rows: Sequence[str]) -> list[list[int]]:
    """The counts (K, K) that `confusion_rows` wrote. Raises ValueError for anything else."""
    cells = [[0] * len(rows) for _ in rows]
    for row, text in zip(cells, rows):
        for pair in text.split():
            k, _, count = pair.partition(":")
            if not (k.isdecimal() and count.isdecimal() and int(k) < len(rows)):
                raise ValueError(f"{pair!r} in a row of confusions, expected class:count")
            row[int(k)] = int(count)
    return cells


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation, None for a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def accuracy_cell(value: tuple[float, float | None] | None) -> str:
    """Mean and standard deviation for a table, "-" for a group without classes."""
    if value is None:
        return "-"
    mean, std = value
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ±{std:.1f}"

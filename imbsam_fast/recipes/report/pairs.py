"""What a configuration changes, seed by seed: against SGD, and against SGD with equal weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from ..metrics import COLUMNS
from .comparison import Group, differences

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom; `student` has the formula for more.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# Equal in a configuration and its control, so that both give every class the same weight.
WEIGHT_KEYS = ("eta", "inclusive", "tail_weight")


class Difference(NamedTuple):
    """Of two configurations, in percentage points: the mean over the seeds that both have.

    `low` and `high` are the ends of its 95 % interval (Student's t), None for fewer than two such
    seeds. Without any, `seeds` is 0 and `mean` the difference of the two means.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def student(freedom: int) -> float:
    """Student's t at 97.5 %, to 0.1 % (Cornish and Fisher's expansion from 10 degrees on)."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = 1.959964
    terms = (
        (z**3 + z) / (4 * freedom),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3),
    )
    return z + sum(terms)


def difference(values: Sequence[float]) -> Difference:
    """The mean of paired differences, at least one, and its interval."""
    mean, n = fmean(values), len(values)
    if n < 2:
        return Difference(mean, None, None, n)
    half = student(n - 1) * stdev(values) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def paired(
    group: Group, other: Group, checkpoint: str = "last", view: str = "plain"
) -> dict[str, Difference | None] | None:
    """`group` minus `other` by COLUMNS, None for a group without classes; None without accuracies.

    `checkpoint` and `view` are those of `Group.accuracy`.
    """
    ours, theirs = (g.tested(checkpoint, view) for g in (group, other))
    if not ours or not theirs:
        return None
    return {
        column: _minus(
            {seed: found[column] for seed, found in ours.items()},
            {seed: found[column] for seed, found in theirs.items()},
        )
        for column in COLUMNS
    }


def paired_classes(group: Group, other: Group) -> list[Difference]:
    """The same for every class, after the last epoch, images as they are."""
    ours, theirs = (g.tested("last", "plain") for g in (group, other))
    found = []
    for k in range(
        min((len(t["per_class"]) for t in (*ours.values(), *theirs.values())), default=0)
    ):
        one, two = (
            {seed: t["per_class"][k] for seed, t in tested.items()} for tested in (ours, theirs)
        )
        found.append(_minus(one, two) or Difference(0.0, None, None, 0))
    return found


def _minus(
    ours: dict[object, float | None], theirs: dict[object, float | None]
) -> Difference | None:
    """By seed; None where a side has no value."""
    one = {seed: value for seed, value in ours.items() if value is not None}
    two = {seed: value for seed, value in theirs.items() if value is not None}
    if not one or not two:
        return None
    shared = [one[seed] - two[seed] for seed in one if seed in two]
    if not shared:
        return Difference(fmean(one.values()) - fmean(two.values()), None, None, 0)
    return difference(shared)


# ---------------------------------------------------------------- whom it is compared with


def baseline(group: Group, groups: Sequence[Group]) -> Group | None:
    """The finished SGD group that differs from `group` in the fewest settings; None without one.

    It trains with the same method; an SGD group itself has none.
    """
    return _nearest(group, groups, "sgd", ())


def control(group: Group, groups: Sequence[Group]) -> Group | None:
    """SGD that gives every class the weight that `group` gives it; None without such a group.

    `sgd-weighted` with equal WEIGHT_KEYS. Where the tail weight is 1 that is SGD itself, and there
    is no other control, nor for a control.
    """
    if group.config.get("optimizer") in ("sgd", "focal-sam"):
        return None
    return _nearest(group, groups, "sgd-weighted", WEIGHT_KEYS)


def _nearest(
    group: Group, groups: Sequence[Group], optimizer: str, equal: Sequence[str]
) -> Group | None:
    if group.config.get("optimizer") == optimizer:
        return None
    same = [
        other
        for other in groups
        if other.config.get("optimizer") == optimizer
        and all(other.config.get(k) == group.config.get(k) for k in ("method", *equal))
        and other.finished
    ]
    return min(same, key=lambda other: len(differences([group, other])), default=None)


# ---------------------------------------------------------------- the best


def marks(groups: Sequence[Group], checkpoint: str, view: str) -> dict[str, dict[str, str]]:
    """Label -> column -> "best", or "near" where pairs do not tell it from the best.

    A column has marks where two groups have accuracies there. "near" needs two shared seeds.
    """
    found: dict[str, dict[str, str]] = {group.label: {} for group in groups}
    for column in COLUMNS:
        means = {}
        for group in groups:
            value = (group.accuracy(checkpoint, view) or {}).get(column)
            if value is not None:
                means[group.label] = (value[0], group)
        if len(means) < 2:
            continue
        _, best = max(means.values(), key=lambda pair: pair[0])
        for label, (mean, group) in means.items():
            if mean == means[best.label][0]:
                found[label][column] = "best"
                continue
            gap = (paired(best, group, checkpoint, view) or {}).get(column)
            if gap is not None and gap.seeds > 1 and not gap.clear:
                found[label][column] = "near"
    return found

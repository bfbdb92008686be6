"""Means over sets and seeds, and differences to the base with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, variance
from typing import NamedTuple

from ..metrics import mean_and_std
from .settings import Fit


class Value(NamedTuple):
    """An area over the sets of a family: the mean over seeds of the mean over sets."""

    mean: float
    std: float | None  # over seeds, None with a single one


class Difference(NamedTuple):
    """A method minus the base on the same set and seed, over the sets of a family."""

    mean: float
    error: float | None  # standard error of the mean for these sets; None with a single seed
    sets_better: int  # sets whose mean difference is above zero
    sets: int


# set -> seed -> area
Areas = dict[str, dict[int, float]]


def areas(fits: Iterable[Fit], metric: str) -> Areas:
    """The metric of every fit, by set and seed."""
    found: Areas = {}
    for fit in fits:
        found.setdefault(fit.set, {})[fit.seed] = getattr(fit, metric)
    return found


def at_every_ratio(fits: Sequence[Fit]) -> list[Fit]:
    """The fits that exist at every ratio, so that ratios can be compared."""
    run: dict[float, set[tuple[str, str, str, int]]] = {}
    for fit in fits:
        run.setdefault(fit.ratio, set()).add(_but_for_ratio(fit))
    everywhere = set.intersection(*run.values()) if run else set()
    return [fit for fit in fits if _but_for_ratio(fit) in everywhere]


def _but_for_ratio(fit: Fit) -> tuple[str, str, str, int]:
    return fit.detector, fit.method, fit.set, fit.seed


def over_seeds(found: Areas) -> Value:
    """Only seeds that every set has count."""
    seeds = common_seeds([found])
    return Value(*mean_and_std([fmean(of_set[s] for of_set in found.values()) for s in seeds]))


def difference(found: Areas, base: Areas) -> Difference:
    """Paired by set and seed. The sets are given, the seeds drawn: with v_s the variance of the
    differences of set s over its k seeds, the standard error over S sets is sqrt(sum v_s / k) / S.
    """
    seeds = common_seeds([found, base])
    pairs = [[found[name][s] - base[name][s] for s in seeds] for name in found]
    error = None
    if len(seeds) > 1:
        error = math.sqrt(sum(variance(d) / len(d) for d in pairs)) / len(pairs)
    means = [fmean(d) for d in pairs]
    return Difference(fmean(means), error, sum(m > 0 for m in means), len(means))


def common_seeds(several: Sequence[Areas]) -> list[int]:
    """Raises ValueError where there is no seed that all sets have, or sets differ."""
    if len({frozenset(found) for found in several}) != 1:
        raise ValueError("expected the same sets, to compare them set by set")
    seeds = set.intersection(*(set(of_set) for found in several for of_set in found.values()))
    if not seeds:
        raise ValueError("expected at least one seed that was run on every set")
    return sorted(seeds)

"""The rows of result tables, as text, for the terminal and for documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from . import paper
from .settings import BASE_NAMES, DETECTOR_NAMES, Fit, Settings, method_order
from .summary import Areas, Difference, Value, areas, common_seeds, difference, over_seeds

NO_VALUE = "-"


class Row(NamedTuple):
    """Areas in % as "mean ± std over seeds", differences as "mean ± standard error"; the loss, of
    the last epoch, as a mean.
    """

    sets: str
    method: str
    aucroc: str
    paper: str  # the paper's AUCROC
    adbench: str  # ADBench's AUCROC
    aucroc_difference: str  # to the base
    sets_better: str  # in AUCROC
    aucpr_anomaly: str
    aucpr_anomaly_difference: str
    aucpr_normal: str
    train_loss: str


HEADER = Row(
    "sets", "method", "AUCROC", "paper", "ADBench", "minus base", "sets better", "AUCPR anomaly",
    "minus base", "AUCPR normal", "training loss",
)  # fmt: skip


class Family(NamedTuple):
    """The fits of one data family."""

    name: str  # as the paper has it
    title: str  # with the number of sets, or the name of the only one
    fits: list[Fit]


class Table(NamedTuple):
    """One detector under one protocol at one ratio."""

    detector: str
    protocol: str
    ratio: float
    seeds: tuple[int, int]  # the fewest and the most that a family and method has
    base: str
    rows: list[Row]

    @property
    def title(self) -> str:
        """The line above the table."""
        least, most = self.seeds
        seeds = f"{most} seed{'s' if most > 1 else ''}"
        if least < most:
            seeds = f"{least} to {seeds}"
        return (
            f"{DETECTOR_NAMES[self.detector]}, {self.protocol} protocol, "
            f"{100 * self.ratio:g} % of the anomalies labelled, base {self.base}, {seeds}"
        )


def tables(fits: Sequence[Fit], settings: Settings) -> Iterator[Table]:
    """A table for each detector, protocol and ratio, with whatever methods and sets it has."""
    keys = dict.fromkeys((f.detector, f.protocol, f.ratio) for f in fits)
    for key in sorted(keys):
        own = [f for f in fits if (f.detector, f.protocol, f.ratio) == key]
        rows: list[Row] = []
        seeds = []
        for family in by_family(own):
            for method in {f.method for f in family.fits}:
                of_method = [f for f in family.fits if f.method == method]
                seeds.append(len(common_seeds([areas(of_method, "aucroc")])))
            rows += _family_rows(family, settings)
        base = BASE_NAMES[settings.base]
        if key[0] == "deepsad" and settings.pretrain_epochs == 0:
            base += ", not pre-trained"
        yield Table(*key, (min(seeds), max(seeds)), base, rows)


def by_family(fits: Sequence[Fit]) -> Iterator[Family]:
    """The fits of each family of sets, as the paper groups them."""
    for name in sorted({paper.family(f.set) for f in fits}):
        own = [f for f in fits if paper.family(f.set) == name]
        sets = {f.set for f in own}
        yield Family(name, f"{name}, {len(sets)} sets" if len(sets) > 1 else own[0].set, own)


def _family_rows(family: Family, settings: Settings) -> Iterator[Row]:
    for method in sorted({f.method for f in family.fits}, key=method_order):
        own = [f for f in family.fits if f.method == method]
        base = [f for f in family.fits if f.method == "sgd"]
        roc, anomaly = (
            _difference(areas(own, metric), areas(base, metric), method)
            for metric in ("aucroc", "aucpr_anomaly")
        )
        yield Row(
            next(by_family(own)).title,  # a method may not have all sets yet
            settings.label(method),
            value(over_seeds(areas(own, "aucroc"))),
            published(paper.reported(*_row_of(own[0], family))),
            published(paper.adbench_reported(*_row_of(own[0], family)), 2),
            NO_VALUE if roc is None else signed(roc),
            NO_VALUE if roc is None else f"{roc.sets_better} of {roc.sets}",
            value(over_seeds(areas(own, "aucpr_anomaly"))),
            NO_VALUE if anomaly is None else signed(anomaly),
            value(over_seeds(areas(own, "aucpr_normal"))),
            f"{over_seeds(areas(own, 'train_loss')).mean:.3f}",
        )


def _difference(own: Areas, base: Areas, method: str) -> Difference | None:
    if method == "sgd" or own.keys() != base.keys():
        return None
    return difference(own, base)


def _row_of(fit: Fit, family: Family) -> tuple[str, str, str, float]:
    return fit.detector, fit.method, family.name, fit.ratio


def published(area: float | None, digits: int = 1) -> str:
    """An area in %, with as many digits as its source has."""
    return NO_VALUE if area is None else f"{area:.{digits}f}"


def value(v: Value) -> str:
    """Mean ± standard deviation, in %."""
    return f"{v.mean:.1f}" if v.std is None else f"{v.mean:.1f} ± {v.std:.1f}"


def signed(d: Difference) -> str:
    """A difference with its sign ± its standard error."""
    return f"{d.mean:+.2f}" if d.error is None else f"{d.mean:+.2f} ± {d.error:.2f}"

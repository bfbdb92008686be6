"""The rows of result tables, as text, for the terminal and for documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from . import paper
from .settings import DETECTOR_NAMES, Fit, Settings, method_order
from .summary import Areas, Difference, Value, areas, common_seeds, difference, over_seeds

HEADER = (
    "sets",
    "method",
    "AUCROC",
    "paper",
    "AUCROC minus base",
    "sets better",
    "AUCPR anomaly",
    "AUCPR anomaly minus base",
    "AUCPR normal",
)
NO_VALUE = "-"


class Table(NamedTuple):
    """One detector under one protocol at one ratio; cells as in HEADER."""

    detector: str
    protocol: str
    ratio: float
    seeds: int
    rows: list[tuple[str, ...]]

    @property
    def title(self) -> str:
        seeds = "1 seed" if self.seeds == 1 else f"{self.seeds} seeds"
        return (
            f"{DETECTOR_NAMES[self.detector]}, {self.protocol} protocol, "
            f"{100 * self.ratio:g} % of the anomalies labelled, {seeds}"
        )


def tables(fits: Sequence[Fit], settings: Settings) -> Iterator[Table]:
    """A table for each detector, protocol and ratio, with whatever methods and sets it has."""
    keys = dict.fromkeys((f.detector, f.protocol, f.ratio) for f in fits)
    for key in sorted(keys):
        own = [f for f in fits if (f.detector, f.protocol, f.ratio) == key]
        rows: list[tuple[str, ...]] = []
        seeds = []
        for family in dict.fromkeys(sorted(map(paper.family, {f.set for f in own}))):
            of_family = [f for f in own if paper.family(f.set) == family]
            seeds.append(len(common_seeds([areas(of_family, "aucroc")])))
            rows += _family_rows(family, of_family, settings)
        yield Table(*key, min(seeds), rows)


def _family_rows(family: str, fits: list[Fit], settings: Settings) -> Iterator[tuple[str, ...]]:
    names = sorted({f.set for f in fits})
    name = names[0] if len(names) == 1 else f"{family}, {len(names)} sets"
    for method in sorted({f.method for f in fits}, key=method_order):
        own = [f for f in fits if f.method == method]
        base = [f for f in fits if f.method == "sgd"]
        roc, anomaly = (
            _difference(areas(own, metric), areas(base, metric), method)
            for metric in ("aucroc", "aucpr_anomaly")
        )
        yield (
            name,
            settings.label(method),
            value(over_seeds(areas(own, "aucroc"))),
            _paper(own[0], method, family),
            NO_VALUE if roc is None else signed(roc),
            NO_VALUE if roc is None else f"{roc.sets_better} of {roc.sets}",
            value(over_seeds(areas(own, "aucpr_anomaly"))),
            NO_VALUE if anomaly is None else signed(anomaly),
            value(over_seeds(areas(own, "aucpr_normal"))),
        )


def _difference(own: Areas, base: Areas, method: str) -> Difference | None:
    if method == "sgd" or own.keys() != base.keys():
        return None
    return difference(own, base)


def _paper(fit: Fit, method: str, family: str) -> str:
    found = paper.reported(fit.detector, method, family, fit.ratio)
    return NO_VALUE if found is None else f"{found:.1f}"


def value(v: Value) -> str:
    return f"{v.mean:.1f}" if v.std is None else f"{v.mean:.1f} ± {v.std:.1f}"


def signed(d: Difference) -> str:
    return f"{d.mean:+.2f}" if d.error is None else f"{d.mean:+.2f} ± {d.error:.2f}"

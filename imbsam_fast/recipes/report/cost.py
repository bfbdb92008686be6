"""What a configuration's training costs: the time of an epoch in SGD epochs, memory of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from .comparison import Group
from .pairs import baseline


class Cost(NamedTuple):
    """Of one group; None where its runs or SGD's do not tell."""

    time: float | None  # of a step in steps of the SGD group it is compared with
    peak_bytes: int | None  # of the runs' GPU memory, the most of any

    def texts(self) -> tuple[str, str]:
        """For a table: SGD steps, and GB."""
        return (
            "-" if self.time is None else f"{self.time:.2f}",
            "-" if self.peak_bytes is None else f"{self.peak_bytes / 1e9:.2f}",
        )


def cost(group: Group, groups: Sequence[Group]) -> Cost:
    """Medians over the epochs and seeds, since other work on a machine makes single ones slow."""
    sgd = group if group.config.get("optimizer") == "sgd" else baseline(group, groups)
    ours, theirs = _seconds(group), None if sgd is None else _seconds(sgd)
    peaks = [run.result.get("peak_bytes") for run in group.finished if run.result]
    known = [peak for peak in peaks if isinstance(peak, int)]
    return Cost(ours / theirs if ours and theirs else None, max(known, default=None))


def _seconds(group: Group) -> float | None:
    """Of an epoch of the first stage."""
    seconds = [
        row["seconds"]
        for run in group.finished
        for row in run.log
        if row.get("stage") in ("train", None) and isinstance(row.get("seconds"), (int, float))
    ]
    return median(seconds) if seconds else None

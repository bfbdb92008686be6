"""Fails where ours has lost more than a quarter of its advantage over peers since it was recorded.

    python -m benchmarks.guard            # in CI, under a minute
    python -m benchmarks.guard --record   # after a change that is meant to be slower, or faster

The quick sizes of `imbsam-fast bench`, on one thread and by the time of the processor, which busy
neighbours hardly change; what seems lost is measured again, and has to be lost both times. Ratios
are compared on the recorded processor and torch only: on another one it says so and passes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.compare import LOSS, Change, changes, differences
from imbsam_fast.bench.cases import default_groups
from imbsam_fast.bench.measure import measure, warm_up
from imbsam_fast.bench.process import keep_freed_memory
from imbsam_fast.bench.report import Report, load, save
from imbsam_fast.env import environment

RECORDED = Path(__file__).parent / "results" / "guard" / "quick.json"
ROUNDS = 31


def measured(rounds: int = ROUNDS) -> Report:
    """The quick sizes on one thread, in seconds of the processor."""
    torch.set_num_threads(1)
    keep_freed_memory()
    report = Report("guard", [], settings={"rounds": rounds, "environment": environment()})
    for number, group in enumerate(default_groups(quick=True)):
        warm_up(group)
        timings = measure(group, rounds, time.process_time)
        for t in timings:
            t.group = number
        report.timings += timings
    return report


def lost(old: Report, new: Report) -> dict[object, Change]:
    """What ours has lost too much of, by its key."""
    return {change.key: change for change in changes(old, new) if change.loss > LOSS}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", allow_abbrev=False)
    parser.add_argument("--record", action="store_true", help="write what later runs compare with")
    parser.add_argument("--recorded", type=Path, default=RECORDED, metavar="FILE")
    args = parser.parse_args(argv)
    if args.record:
        save(measured(), args.recorded)
        print(args.recorded)
        return 0
    old, new = load(args.recorded), measured()
    if different := differences(old, new):
        print("not compared, recorded elsewhere: " + "; ".join(different))
        return 0
    found = lost(old, new)
    if found:
        again = lost(old, measured())
        found = {key: change for key, change in again.items() if key in found}
    for change in found.values():
        print(f"more than {LOSS:.0%} slower beside its peers, twice: {change}")
    print(f"{len(changes(old, new))} advantages compared, {len(found)} lost")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())

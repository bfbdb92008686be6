"""Compares two recorded runs by how many times faster ours is than what was measured beside it.

    python -m benchmarks.compare OLD.json NEW.json [--loss 0.25]

Never absolute times: machines differ, and one machine from day to day. A peer's time over ours is
the median over the rounds of what both took in the same round; the advantage over all peers is the
median over them. Exits 1 where one is smaller than before by more than the share --loss.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imbsam_fast.bench.measure import LIMIT, Timing
from imbsam_fast.bench.report import Report, load

OURS = ("imbsam-fast", "ImbSAM")  # what our contestants are called begins with
LOSS = 0.25
Key = tuple[str, str, str]  # operation, size, which of ours


@dataclass
class Change:
    """The advantage of one of ours, then and now."""

    key: Key
    old: float
    new: float

    @property
    def loss(self) -> float:
        """The share of the old advantage that is gone; negative where ours became faster."""
        return 1 - self.new / self.old

    def __str__(self) -> str:
        operation, size, who = self.key
        return f"{operation} ({size}), {who}: {self.old:.2f} before, {self.new:.2f} now"


def times_faster(ours: Timing, peer: Timing) -> float:
    """The median of the peer's time over ours, round by round."""
    pairs = zip(ours.samples_ms, peer.samples_ms)
    return statistics.median(theirs / mine for mine, theirs in pairs)


def advantages(report: Report) -> dict[Key, dict[str, float]]:
    """Each of ours -> how many times faster than each of its peers.

    Where the first contestant is ours, as for all operations, all others are its peers, our own
    reference too; where it is not, as for training steps, each of ours has the others as peers.
    """
    groups: dict[tuple[str, str, int], list[Timing]] = {}
    for t in report.timings:
        if t.operation != LIMIT:
            groups.setdefault((t.operation, t.size, t.group), []).append(t)
    found = {}
    for (operation, size, _), timings in groups.items():
        if timings[0].contestant.startswith(OURS):
            ours, peers = timings[:1], timings[1:]
        else:
            ours = [t for t in timings if t.contestant.startswith(OURS)]
            peers = [t for t in timings if not t.contestant.startswith(OURS)]
        for mine in ours:
            beside = {peer.contestant: times_faster(mine, peer) for peer in peers}
            if beside:
                found[operation, size, mine.contestant] = beside
    return found


def changes(old: Report, new: Report) -> list[Change]:
    """Of what both runs have measured, over the peers that both have."""
    before, now = advantages(old), advantages(new)
    found = []
    for key in before.keys() & now.keys():
        if peers := before[key].keys() & now[key].keys():
            then, today = (statistics.median(x[key][p] for p in peers) for x in (before, now))
            found.append(Change(key, then, today))
    return sorted(found, key=lambda change: change.key)


def machine(report: Report) -> dict[str, object]:
    """What a ratio to a peer depends on besides the code of both."""
    e = report.settings["environment"]
    names = ("cpu", "cores", "torch_threads")
    found = {name: e["machine"][name] for name in names}
    return {**found, "isa": e["native"].get("isa_in_use"), "torch": e["versions"]["torch"]}


def differences(old: Report, new: Report) -> list[str]:
    """Between the machines of two runs, in words."""
    then, now = machine(old), machine(new)
    return [f"{name}: {then[name]}, now {now[name]}" for name in then if then[name] != now[name]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", allow_abbrev=False)
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument(
        "--loss", type=float, default=LOSS, help=f"share that may be lost, default {LOSS}"
    )
    args = parser.parse_args(argv)
    if not 0 <= args.loss < 1:
        parser.error(f"--loss is {args.loss}, expected at least 0 and less than 1")
    for path in (args.old, args.new):
        if not path.is_file():
            parser.error(f"{path} is no file, expected what a benchmark wrote with --json")
    old, new = load(args.old), load(args.new)
    for line in differences(old, new):
        print(f"not the same machine or torch: {line}")
    found = changes(old, new)
    if not found:
        print(f"{args.old} and {args.new} have no operation in common")
        return 2
    for change in found:
        print(f"{'LOSS  ' if change.loss > args.loss else '      '}{change}")
    return int(any(change.loss > args.loss for change in found))


if __name__ == "__main__":
    sys.exit(main())

"""Writes the recorded results of the anomaly recipe into docs/anomaly.md.

    python -m benchmarks.anomaly_report [--check] [--root DIR]

Tables go between `<!-- results: NAME -->` and `<!-- end -->`; the names are in TABLES. They come
from benchmarks/results/anomaly/results.json, which `imbsam-fast anomaly --save` wrote, and from
benchmarks/results/bench_anomaly.json. Exits 1 for an unknown name, with --check also where the
document says something else.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import report
from benchmarks.tables import Lines, markdown, milliseconds
from imbsam_fast import bench
from imbsam_fast.recipes.anomaly import paper
from imbsam_fast.recipes.anomaly.plots import aucpr_figure
from imbsam_fast.recipes.anomaly.settings import Fit, Settings
from imbsam_fast.recipes.anomaly.tables import HEADER, tables

DOCUMENT = "docs/anomaly.md"
GRID = "benchmarks/results/anomaly/results.json"
EPOCHS = "benchmarks/results/bench_anomaly.json"
PLOTS = "benchmarks/plots"
NOT_RECORDED = ["Not recorded yet."]


# ---------------------------------------------------------------- tables


def areas(root: Path, protocol: str, ratio: float = paper.RATIO) -> Lines:
    grid = load_grid(root)
    if grid is None:
        return NOT_RECORDED
    settings, fits, runs = grid
    own = [fit for fit in fits if fit.protocol == protocol and fit.ratio == ratio]
    if not own:
        return NOT_RECORDED
    lines: Lines = []
    for table in tables(own, settings):
        lines += [f"{table.title}:", "", *markdown(HEADER, table.rows), ""]
    leaks = _leaks(own)
    return lines + ([leaks, ""] if leaks else []) + _provenance(own, runs)


def ratios(root: Path) -> Lines:
    """AUCPR of anomalies at every ratio that was run under the clean protocol."""
    grid = load_grid(root)
    own = [] if grid is None else [fit for fit in grid[1] if fit.protocol == "clean"]
    if grid is None or len({fit.ratio for fit in own}) < 2:
        return NOT_RECORDED
    rows = [
        (f"{100 * table.ratio:g} %", table.title.partition(",")[0], row.sets, row.method,
         row.aucpr_anomaly, row.aucpr_anomaly_difference, row.aucpr_normal)
        for table in tables(own, grid[0])
        for row in table.rows
    ]  # fmt: skip
    header = ("labelled", "detector", "sets", "method", *HEADER[6:])
    return [*markdown(header, rows), "", *_provenance(own, grid[2])]


def epochs(root: Path) -> Lines:
    path = root / EPOCHS
    if not path.exists():
        return NOT_RECORDED
    measured = bench.load(path)
    contestants = list(dict.fromkeys(t.contestant for t in measured.timings))
    times = {(t.size, t.contestant): t for t in measured.timings}
    sizes = dict.fromkeys(t.size for t in measured.timings)
    rows = [
        (size, *(f"{milliseconds(times[size, c].ms)} ({times[size, c].ratio:.2f})"
                 for c in contestants))
        for size in sizes
    ]  # fmt: skip
    header = ("epoch, ms (in SGD epochs)", *contestants)
    return [*markdown(header, rows), "", *report.provenance([measured])]


TABLES: dict[str, Callable[[Path], Lines]] = {
    "anomaly-clean": partial(areas, protocol="clean"),
    "anomaly-adbench": partial(areas, protocol="adbench"),
    "anomaly-ratios": ratios,
    "anomaly-epoch": epochs,
}


def _leaks(fits: Sequence[Fit]) -> str:
    found: dict[str, list[float]] = {}
    for fit in fits:
        found.setdefault(paper.family(fit.set), []).append(fit.leaked)
    said = [
        f"{100 * fmean(shares):.0f} % of {family}'s test rows are training rows too"
        for family, shares in sorted(found.items())
        if any(shares)
    ]
    return "; ".join(said) + "." if said else ""


def _provenance(fits: Sequence[Fit], runs: Sequence[dict[str, Any]]) -> Lines:
    lines = []
    for number in sorted({fit.run for fit in fits}):
        e = runs[number]
        machine, versions = e["machine"], e["versions"]
        made = sum(fit.run == number for fit in fits)
        lines.append(
            f"{made} fits: {machine['cpu']}, {machine['torch_threads']} thread; imbsam-fast "
            f"{versions['imbsam-fast']}, torch {versions['torch']}, Python {versions['python']}; "
            f"commit {(e['git_commit'] or 'unknown')[:12]}, {e['date'][:10]}."
        )
    return lines


# ---------------------------------------------------------------- files


def load_grid(root: Path) -> tuple[Settings, list[Fit], list[dict[str, Any]]] | None:
    path = root / GRID
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    fits = [Fit(**dict(zip(content["fields"], row))) for row in content["fits"]]
    return Settings(**content["settings"]), fits, content["runs"]


def filled(text: str, root: Path) -> tuple[str, list[str]]:
    """The document with its tables made anew, and a complaint for each that has no maker."""
    complaints = []

    def fill(marker: re.Match[str]) -> str:
        start, name, _, end = marker.groups()
        if name not in TABLES:
            complaints.append(f"no table is called {name}; there are {', '.join(TABLES)}")
            return marker[0]
        return start + "\n".join(["", *TABLES[name](root), ""]) + "\n" + end

    return report.MARKER.sub(fill, text), complaints


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.anomaly_report", allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent, metavar="DIR")
    args = parser.parse_args(argv)
    path = args.root / DOCUMENT
    text = path.read_text()
    new, complaints = filled(text, args.root)
    if args.check and new != text:
        complaints.append("differs from the results; run python -m benchmarks.anomaly_report")
    if not args.check:
        path.write_text(new)
        _draw(args.root)
    for complaint in complaints:
        print(f"{DOCUMENT}: {complaint}")
    return int(bool(complaints))


def _draw(root: Path) -> None:
    grid = load_grid(root)
    if grid is None:
        return
    settings, fits, _ = grid
    (root / PLOTS).mkdir(parents=True, exist_ok=True)
    for protocol in dict.fromkeys(fit.protocol for fit in fits):
        path = root / PLOTS / f"anomaly_aucpr_{protocol}.png"
        aucpr_figure(fits, settings, protocol).savefig(path, dpi=150)
        print(path)


if __name__ == "__main__":
    sys.exit(main())

"""Writes the recorded results of the anomaly recipe into docs/results.md.

    python -m benchmarks.anomaly_report [--check] [--root DIR]

Tables go between `<!-- anomaly: NAME -->` and `<!-- end -->`; the names are in TABLES. They come
from results.json, levels.json and base_*.json in benchmarks/results/anomaly, which `imbsam-fast
anomaly --save` wrote, from rates_*.json, which anomaly_rates wrote, and from
benchmarks/results/bench_anomaly.json.
Exits 1 for an unknown name, with --check also where the document says something else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks import documents, report
from benchmarks.anomaly_rates import Trial, means
from benchmarks.tables import NO_VALUE, Lines, commit, markdown, milliseconds, software
from imbsam_fast.bench.report import load
from imbsam_fast.recipes.anomaly import paper
from imbsam_fast.recipes.anomaly.plots import PANELS, aucpr_figure
from imbsam_fast.recipes.anomaly.settings import (
    DETECTOR_NAMES,
    PROTOCOLS,
    Fit,
    Settings,
    method_order,
)
from imbsam_fast.recipes.anomaly.summary import (
    Areas,
    areas,
    at_every_ratio,
    common_seeds,
    difference,
    over_seeds,
)
from imbsam_fast.recipes.anomaly.tables import HEADER, by_family, published, signed, tables, value

DOCUMENT = "docs/results.md"
RESULTS = "benchmarks/results/anomaly"
GRID = "results.json"
LEVELS = "levels.json"
EPOCHS = "benchmarks/results/bench_anomaly.json"
PLOTS = "benchmarks/plots"
WORD = "anomaly"
MARKER = documents.marker(WORD)
NOT_RECORDED = ["Not recorded yet."]
# (a, b): a minus b. The last two are the controls of the tail weight.
COMPARED = (("sam", "sgd"), ("imbsam", "sgd"), ("imbsam", "sam"), ("sgd@2", "sgd"),
            ("imbsam@2", "sgd@2"))  # fmt: skip


# ---------------------------------------------------------------- tables


def protocol_tables(root: Path, protocol: str) -> Lines:
    grid = load_grid(root)
    own = [] if grid is None else at_the_papers_ratio(grid.fits, protocol)
    if grid is None or not own:
        return NOT_RECORDED
    lines: Lines = []
    for table in tables(own, grid.settings):
        lines += [f"{table.title}:", "", *markdown(HEADER, table.rows), ""]
    leaks = _leaks(own)
    return lines + ([leaks, ""] if leaks else []) + _provenance(own, grid.runs)


def comparisons(root: Path) -> Lines:
    """COMPARED in AUCROC under both protocols, beside the paper's differences."""
    grid = load_grid(root)
    own = [] if grid is None else at_the_papers_ratio(grid.fits)
    if grid is None or not own:
        return NOT_RECORDED
    rows = []
    for detector in dict.fromkeys(fit.detector for fit in own):
        for family in by_family([fit for fit in own if fit.detector == detector]):
            for a, b in COMPARED:
                cells = [_compared(at_the_papers_ratio(family.fits, p), a, b) for p in PROTOCOLS]
                if set(cells) == {NO_VALUE}:
                    continue
                label = f"{grid.settings.label(a)} minus {grid.settings.label(b)}"
                rows.append(
                    (DETECTOR_NAMES[detector], family.title, label, *cells,
                     _paper_difference(detector, family.name, a, b))
                )  # fmt: skip
    return markdown(("detector", "sets", "AUCROC", *PROTOCOLS, "paper"), rows)


def ratios(root: Path) -> Lines:
    """The areas of Figure 5: the base's, and the differences of the others to it."""
    grid = load_grid(root)
    own = [] if grid is None else [fit for fit in grid.fits if fit.protocol == "clean"]
    found = sorted({fit.ratio for fit in own})
    if grid is None or len(found) < 2:
        return NOT_RECORDED
    own = at_every_ratio(own)
    rows = []
    for detector in sorted({fit.detector for fit in own}):
        for family in by_family([fit for fit in own if fit.detector == detector]):
            for metric, title in PANELS.items():
                of_methods = _at_ratios(family.fits, metric, found)
                for method, cells in of_methods.items():
                    label = grid.settings.label(method)
                    if method != "sgd":
                        label = f"{label} minus {grid.settings.label('sgd')}"
                    rows.append((DETECTOR_NAMES[detector], family.title, title, label, *cells))
    seeds = len({fit.seed for fit in own})
    header = ("detector", "sets", "area", "method", *(f"{100 * r:g} %" for r in found))
    said = "1 seed:" if seeds == 1 else f"{seeds} seeds:"
    return [said, "", *markdown(header, rows), "", *_provenance(own, grid.runs)]


def levels(root: Path) -> Lines:
    """AUCROC against the share of labelled anomalies, beside other bases and ADBench's tables.

    A mean over some of the sets alone is left out.
    """
    grid = load_grid(root, LEVELS)
    if grid is None:
        return NOT_RECORDED
    found = sorted({fit.ratio for fit in grid.fits})
    rows = [
        (DETECTOR_NAMES[detector], label, *cells)
        for detector in sorted({fit.detector for fit in grid.fits})
        for label, cells in _levels_of(detector, grid, found, root)
        if set(cells) != {NO_VALUE}
    ]
    sets, seeds = {fit.set for fit in grid.fits}, {fit.seed for fit in grid.fits}
    said = f"{_number(sets, 'set')}, {_number(seeds, 'seed')}:"
    header = ("detector", "AUCROC", *(f"{100 * r:g} %" for r in found))
    return [said, "", *markdown(header, rows), "", *_provenance(grid.fits, grid.runs)]


def _number(things: set[Any], noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) > 1)}"


def _levels_of(
    detector: str, grid: Grid, ratios: Sequence[float], root: Path
) -> Iterator[tuple[str, list[str]]]:
    """Rows of a detector: a name, and a cell a ratio."""
    label, sets = grid.settings.label, {fit.set for fit in grid.fits}
    own = [fit for fit in grid.fits if fit.detector == detector]
    for method in sorted({fit.method for fit in own}, key=method_order):
        yield label(method), [_level(own, sets, ratio, method) for ratio in ratios]
    for a, b in COMPARED:
        yield f"{label(a)} minus {label(b)}", [_level(own, sets, r, a, b) for r in ratios]
    for other in _bases(root):
        alike = other.settings.pretrain_epochs == grid.settings.pretrain_epochs
        fits = [f for f in other.fits if f.detector == detector and (alike or detector == "devnet")]
        yield other.settings.label("sgd"), [_level(fits, sets, ratio, "sgd") for ratio in ratios]
    (family,) = {paper.family(name) for name in sets}
    at_ratios = (paper.adbench_reported(detector, "sgd", family, ratio) for ratio in ratios)
    yield "ADBench's tables", [published(area, 2) for area in at_ratios]


def _level(
    fits: Sequence[Fit], sets: set[str], ratio: float, method: str, minus: str | None = None
) -> str:
    """The mean area of a method at a ratio, or its paired difference to another method."""
    at = [fit for fit in fits if fit.ratio == ratio]
    found = [areas([fit for fit in at if fit.method == name], "aucroc") for name in (method, minus)]
    if minus is None:
        found = found[:1]
    if any(set(of_method) != sets for of_method in found):
        return NO_VALUE
    return value(over_seeds(found[0])) if minus is None else signed(difference(*found))


def other_bases(root: Path) -> Lines:
    """What the detectors reach without SGD."""
    lines: Lines = []
    for grid in _bases(root):
        for table in tables(grid.fits, grid.settings):
            lines += [f"{table.title}:", "", *markdown(HEADER, table.rows), ""]
        lines += [*_provenance(grid.fits, grid.runs), ""]
    return lines[:-1] or NOT_RECORDED


def pretraining(root: Path) -> Lines:
    """DeepSAD from an autoencoder minus DeepSAD from random weights, on the same sets and seeds."""
    grids = [grid for grid in (load_grid(root), load_grid(root, LEVELS)) if grid is not None]
    rows, made = [], []
    for first, second in itertools.permutations([*grids, *_bases(root)], 2):
        if not replace(first.settings, pretrain_epochs=0) == second.settings != first.settings:
            continue
        pair = [
            [f for f in at_the_papers_ratio(g.fits, "adbench") if f.detector == "deepsad"]
            for g in (first, second)
        ]
        for method in sorted({f.method for f in pair[0]}, key=method_order):
            own, other = (areas([f for f in p if f.method == method], "aucroc") for p in pair)
            if own.keys() & other.keys():
                rows.append((first.settings.label(method), *_changes(own, other)))
        made += [
            line for fits, g in zip(pair, (first, second)) for line in _provenance(fits, g.runs)
        ]
    header = ("optimizer", "sets", "seeds", "pre-trained minus not", "single fits")
    return [*markdown(header, rows), "", *dict.fromkeys(made)] if rows else NOT_RECORDED


def _changes(own: Areas, other: Areas) -> tuple[str, ...]:
    """Common sets and seeds, the mean paired difference, and the least and the greatest one."""
    own, other = ({k: v for k, v in found.items() if k in own.keys() & other.keys()}
                  for found in (own, other))  # fmt: skip
    seeds = common_seeds([own, other])
    single = [own[name][seed] - other[name][seed] for name in own for seed in seeds]
    extremes = f"{min(single):+.1f} to {max(single):+.1f}"
    return str(len(own)), str(len(seeds)), signed(difference(own, other)), extremes


def _bases(root: Path) -> list[Grid]:
    return [read_grid(path) for path in sorted((root / RESULTS).glob("base_*.json"))]


def rates(root: Path) -> Lines:
    """AUCROC on held-out training rows for each learning rate."""
    contents = [json.loads(p.read_text()) for p in sorted((root / RESULTS).glob("rates_*.json"))]
    if not contents:
        return NOT_RECORDED
    columns = means([Trial(*row) for content in contents for row in content["trials"]])
    keys = dict.fromkeys(key for areas in columns.values() for key in areas)
    rows = [
        (f"{DETECTOR_NAMES[name]}, {lr:g}",
         *(f"{areas[name, lr]:.1f}" for areas in columns.values()))
        for name, lr in keys
    ]  # fmt: skip
    header = ("detector, rate", *(f"{family}, {protocol}" for family, protocol in columns))
    made = [_made(f"{len(c['trials'])} fits", c["environment"]) for c in contents]
    return [*markdown(header, rows), "", *made]


def _at_ratios(fits: Sequence[Fit], metric: str, ratios: Sequence[float]) -> dict[str, list[str]]:
    """method -> a cell a ratio"""
    cells: dict[str, list[str]] = {}
    for method in sorted({fit.method for fit in fits}, key=method_order):
        for ratio in ratios:
            at = [fit for fit in fits if fit.ratio == ratio]
            own, base = (areas([f for f in at if f.method == m], metric) for m in (method, "sgd"))
            text = value(over_seeds(own)) if method == "sgd" else signed(difference(own, base))
            cells.setdefault(method, []).append(text)
    return cells


def _compared(fits: Sequence[Fit], a: str, b: str) -> str:
    """The mean paired difference with its standard error, and on how many sets it is positive."""
    first, second = (areas([f for f in fits if f.method == m], "aucroc") for m in (a, b))
    sets = {fit.set for fit in fits}
    if not sets or not first.keys() == second.keys() == sets:
        return NO_VALUE
    found = difference(first, second)
    if found.sets == 1:
        return signed(found)
    return f"{signed(found)}, {found.sets_better} of {found.sets} sets"


def _paper_difference(detector: str, family: str, a: str, b: str) -> str:
    first, second = (paper.reported(detector, m, family, paper.RATIO) for m in (a, b))
    return NO_VALUE if first is None or second is None else f"{first - second:+.1f}"


def epochs(root: Path) -> Lines:
    path = root / EPOCHS
    if not path.exists():
        return NOT_RECORDED
    measured = load(path)
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
    "comparisons": comparisons,
    "clean": partial(protocol_tables, protocol="clean"),
    "adbench": partial(protocol_tables, protocol="adbench"),
    "other-bases": other_bases,
    "rates": rates,
    "ratios": ratios,
    "levels": levels,
    "pretraining": pretraining,
    "epoch": epochs,
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
    """A line for each commit and day; a grid that was interrupted has several runs."""
    made: dict[str, int] = {}
    for fit in fits:
        facts = _made("", runs[fit.run])
        made[facts] = made.get(facts, 0) + 1
    return [f"{number} fits{facts}" for facts, number in sorted(made.items())]


def _made(what: str, environment: dict[str, Any]) -> str:
    machine = environment["machine"]
    return (
        f"{what}: {machine['cpu']}, {machine['torch_threads']} thread; {software(environment)}; "
        f"{commit(environment)}, {environment['date'][:10]}."
    )


# ---------------------------------------------------------------- files


class Grid(NamedTuple):
    settings: Settings
    fits: list[Fit]
    runs: list[dict[str, Any]]  # the environment of each


def load_grid(root: Path, name: str = GRID) -> Grid | None:
    path = root / RESULTS / name
    return read_grid(path) if path.exists() else None


def read_grid(path: Path) -> Grid:
    content = json.loads(path.read_text())
    fits = [Fit(**dict(zip(content["fields"], row))) for row in content["fits"]]
    return Grid(Settings(**content["settings"]), fits, content["runs"])


def at_the_papers_ratio(fits: Sequence[Fit], protocol: str | None = None) -> list[Fit]:
    return [f for f in fits if f.ratio == paper.RATIO and protocol in (None, f.protocol)]


def filled(text: str, root: Path) -> documents.Filled:
    """The document with its tables made anew, and a complaint for each that has no maker."""
    return documents.fill(text, WORD, TABLES, lambda name: TABLES[name](root))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.anomaly_report", allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent, metavar="DIR")
    args = parser.parse_args(argv)
    fine = documents.update(
        [args.root / DOCUMENT],
        args.root,
        partial(filled, root=args.root),
        args.check,
        "python -m benchmarks.anomaly_report",
    )
    if not args.check:
        _draw(args.root)
    return int(not fine)


def _draw(root: Path) -> None:
    grid = load_grid(root)
    if grid is None:
        return
    (root / PLOTS).mkdir(parents=True, exist_ok=True)
    for protocol in dict.fromkeys(fit.protocol for fit in grid.fits):
        path = root / PLOTS / f"anomaly_aucpr_{protocol}.png"
        aucpr_figure(grid.fits, grid.settings, protocol).savefig(path, dpi=150)
        print(path)


if __name__ == "__main__":
    sys.exit(main())

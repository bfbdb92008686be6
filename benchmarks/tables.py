"""The tables of the docs, from recorded results: markdown lines for each name of a marker."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks import bench_growth, bench_step, peers
from imbsam_fast.bench.cases import MASKS
from imbsam_fast.bench.measure import LIMIT, Timing
from imbsam_fast.bench.optimizers import AUTHORS, AUTHORS_FUSED, IMBSAM
from imbsam_fast.bench.report import Report

Lines = list[str]
Rows = dict[str, dict[str, Timing]]  # size -> contestant -> timing, in the order of the run

NO_VALUE = "-"
PHASES = ("squared_norm", "perturb_", "sgd_update_", "merge_", "grad_check")
STEPS = (IMBSAM, peers.SAM, peers.SGD, peers.ADAMW)
LOSS = "loss forward, head and tail backward"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Lines:
    """A table whose first column is text and whose other columns are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def by_size(report: Report, operation: str) -> Rows:
    found: Rows = {}
    for t in report.timings:
        if t.operation == operation:
            found.setdefault(t.size, {})[t.contestant] = t
    return found


def contestants(rows: Rows) -> list[str]:
    """Contestants that ran at any size; the others are compared with the first."""
    return list(dict.fromkeys(who for timings in rows.values() for who in timings))


def milliseconds(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def time_and_ratio(t: Timing | None) -> str:
    return NO_VALUE if t is None else f"{milliseconds(t.ms)} ({t.ratio:.2f})"


def percent(x: float | None) -> str:
    return NO_VALUE if x is None else f"{x:.0f} %"


# ---------------------------------------------------------------- the machine


def limits(report: Report) -> Lines:
    """Over the groups of a run: what the memory of the machine can do."""
    found: dict[tuple[str, str], list[float]] = {}
    for t in report.timings:
        if t.operation == LIMIT and t.gb_per_s is not None:
            found.setdefault((t.size, t.contestant), []).append(t.gb_per_s)
    return markdown(
        ("traffic", "GB/s, median of groups", "lowest", "highest"),
        (
            (f"{size}, {who}", *(f"{f(x):.1f}" for f in (statistics.median, min, max)))
            for (size, who), x in found.items()
        ),
    )


# ---------------------------------------------------------------- the optimizer


def phases(report: Report) -> Lines:
    rows = {phase: by_size(report, phase) for phase in PHASES}
    sizes = list(rows[PHASES[0]])

    def cell(phase: str, size: str) -> str:
        t = next(iter(rows[phase][size].values()))
        return f"{milliseconds(t.ms)} ({percent(t.percent_of_limit)})"

    return markdown(
        ("ms (of the limit)", *PHASES),
        ((size, *(cell(phase, size) for phase in PHASES)) for size in sizes),
    )


def optimizer(report: Report) -> Lines:
    return _step_table(report, "ms (times ours)", time_and_ratio)


def traffic(report: Report) -> Lines:
    """Bytes that each contestant moves itself, a second, as a share of the memory's speed."""

    def cell(t: Timing | None) -> str:
        if t is None or not (t.bytes and t.moved_bytes and t.percent_of_limit):
            return NO_VALUE
        return percent(t.percent_of_limit * t.moved_bytes / t.bytes)

    return _step_table(report, "of the limit", cell)


def host(report: Report) -> Lines:
    """The main thread's microseconds, and those of each call."""
    rows = []
    sizes = list(by_size(report, IMBSAM.name))
    for rules in (IMBSAM, peers.SAM, peers.SGD):
        timings = by_size(report, rules.name)
        for who in contestants(timings):
            at = [timings.get(size, {}).get(who) for size in sizes]
            rows.append((f"{rules.name}: {who}", *map(_microseconds, at)))
    return markdown(("microseconds (of each call)", *sizes), rows)


def _microseconds(t: Timing | None) -> str:
    if t is None:
        return NO_VALUE
    calls = " + ".join(f"{1e3 * ms:.0f}" for ms in t.laps_ms.values())
    return f"{1e3 * t.ms:.0f}" + (f" ({calls})" if len(t.laps_ms) > 1 else "")


def _step_table(report: Report, what: str, cell: Callable[[Timing | None], str]) -> Lines:
    rows = []
    sizes = list(by_size(report, IMBSAM.name))
    for rules in STEPS:
        timings = by_size(report, rules.name)
        for who in contestants(timings):
            at = [timings.get(size, {}).get(who) for size in sizes]
            rows.append((f"{rules.name}: {who}", _moves(rules.moves, at), *map(cell, at)))
    return markdown((what, "moves", *sizes), rows)


def _moves(fewest: int, at: Sequence[Timing | None]) -> str:
    """Such as 21n, from bytes that are known to be the operation's fewest times something."""
    for t in at:
        if t is not None and t.bytes and t.moved_bytes:
            return f"{round(fewest * t.moved_bytes / t.bytes)}n"
    return NO_VALUE


# ---------------------------------------------------------------- the loss


def loss(report: Report) -> Lines:
    rows = []
    operations = dict.fromkeys(t.operation for t in report.timings if t.operation != LIMIT)
    for operation in operations:
        timings = by_size(report, operation)
        for who in contestants(timings):
            cells = (time_and_ratio(at.get(who)) for at in timings.values())
            rows.append((f"{operation}: {who}", *cells))
    return markdown(("ms (times ours)", *by_size(report, LOSS)), rows)


# ---------------------------------------------------------------- training steps


def training(report: Report) -> Lines:
    return _training_table(report, "in SGD steps", lambda t: f"{t.ratio:.2f}", "SGD, ms")


def training_optimizer(report: Report) -> Lines:
    return _training_table(
        report, "ms in the optimizer's calls", lambda t: f"{t.laps_ms[bench_step.OPTIMIZER]:.2f}"
    )


def training_memory(report: Report) -> Lines:
    def megabytes(t: Timing) -> str:
        return NO_VALUE if t.peak_bytes is None else f"{t.peak_bytes / 1e6:.1f}"

    return _training_table(report, "MB at the peak, above the level before", megabytes)


def _training_table(
    report: Report, what: str, cell: Callable[[Timing], str], extra: str | None = None
) -> Lines:
    rows = by_size(report, bench_step.STEP)
    names = contestants(rows)
    return markdown(
        (what, *([extra] if extra else []), *names),
        (
            (
                size,
                *([milliseconds(at[bench_step.SGD].ms)] if extra else []),
                *(cell(at[who]) if who in at else NO_VALUE for who in names),
            )
            for size, at in rows.items()
        ),
    )


def added(report: Report) -> Lines:
    """What TrainStep adds to the passes of its plan, and the joint plan beside the authors'."""

    def excess(ms: float, over: float) -> str:
        return f"{100 * (ms / over - 1):+.1f} %"

    rows = []
    for size, at in by_size(report, bench_step.STEP).items():
        pairs = (
            (bench_step.SPLIT, bench_step.SPLIT_BY_HAND),
            (bench_step.JOINT, bench_step.JOINT_BY_HAND),
        )
        cells = [excess(at[a].ms, at[b].ms) if a in at else NO_VALUE for a, b in pairs]
        passes = at[bench_step.AUTHORS].laps_ms[bench_step.PASSES]
        rows.append((size, *cells, excess(at[bench_step.JOINT].ms, passes)))
    return markdown(
        (
            "TrainStep's time over",
            "split: its passes by hand",
            "joint: its passes by hand",
            "joint: authors' loop without its optimizer",
        ),
        rows,
    )


# ---------------------------------------------------------------- memory


def memory(report: Report) -> Lines:
    """In the bytes of all weights: what is alive at the peak of a step, and after it."""
    names = list(dict.fromkeys(m.contestant for m in report.memory))
    rows: dict[str, list[str]] = {}
    for what, kept in (("at the peak", False), ("from step to step", True)):
        for m in report.memory:
            label = f"{m.size}, n = {m.weight_bytes / 1e6:.1f} MB, {what}"
            found = m.kept_bytes if kept else m.peak_bytes
            rows.setdefault(label, []).append(f"{found / m.weight_bytes:.2f}")
    return markdown(("n", *names), ((label, *cells) for label, cells in rows.items()))


# ---------------------------------------------------------------- growth


def growth(report: Report) -> Lines:
    axes = list(bench_growth.SIZES)
    curves = {axis: bench_growth.curves(report.timings, axis) for axis in axes}
    rows = []
    for key in dict.fromkeys(key for axis in axes for key in curves[axis]):
        cells: list[str] = []
        for axis in axes:
            points = curves[axis].get(key, {})
            if len(points) < 2:
                cells += [NO_VALUE, NO_VALUE]
                continue
            line = bench_growth.fit(list(points), list(points.values()))
            per_ms = bench_growth.UNITS[axis][1]
            cells += [f"{1e3 * line.fixed_ms:.0f}", f"{per_ms * line.ms_each:.3g}"]
        rows.append((": ".join(key), *cells))
    header = ["straight line through the times"]
    for axis in axes:
        header += [f"{axis}: fixed, us", f"each, {bench_growth.UNITS[axis][0]}"]
    return markdown(header, rows)


# ---------------------------------------------------------------- README


def summary(optimizer: Report, loss: Report, step: Report) -> Lines:
    """One line for each of the three claims, at the size that users of this package have."""

    def others(at: dict[str, Timing], names: Sequence[str | None]) -> list[str]:
        return [f"{at[name].ratio:.2f}" if name in at else NO_VALUE for name in names]

    rows = []
    size, at = _at(by_size(optimizer, IMBSAM.name), "ResNet-50")
    ours = next(iter(at.values()))
    rows.append(
        (
            f"optimizer step, {size}",
            f"{milliseconds(ours.ms)} ms, {percent(ours.percent_of_limit)}",
            *others(at, (AUTHORS, AUTHORS_FUSED, peers.COMPILED)),
        )
    )
    size, at = _at(by_size(loss, LOSS), "512 x 8142")
    ours = next(iter(at.values()))
    rows.append(
        (
            f"{LOSS}, {size}",
            f"{milliseconds(ours.ms)} ms, {percent(ours.percent_of_limit)}",
            *others(at, (MASKS, None, peers.COMPILED_ROW_WEIGHTS)),
        )
    )
    size, at = _at(by_size(step, bench_step.STEP), "LayerNorm ViT")
    split = at[bench_step.SPLIT].ms
    rows.append(
        (
            f"training step, split plan, {size}",
            f"{milliseconds(split)} ms",
            f"{at[bench_step.AUTHORS].ms / split:.2f}",
            NO_VALUE,
            NO_VALUE,
        )
    )
    return markdown(
        (
            "CPU",
            "ours, share of the memory limit",
            "authors' time over ours",
            "with SGD(fused=True)",
            "torch.compile's time over ours",
        ),
        rows,
    )


def _at(rows: Rows, start: str) -> tuple[str, dict[str, Timing]]:
    """The last size whose label starts like this, or the last of all."""
    sizes = [size for size in rows if size.startswith(start)] or list(rows)
    return sizes[-1], rows[sizes[-1]]


# ---------------------------------------------------------------- by name


def software(environment: dict[str, Any]) -> str:
    versions = environment["versions"]
    return (
        f"imbsam-fast {versions['imbsam-fast']}, torch {versions['torch']}, "
        f"Python {versions['python']}"
    )


def commit(environment: dict[str, Any]) -> str:
    name = environment["git_commit"] or "unknown"
    dirty = " with uncommitted changes" if name.endswith("-dirty") else ""
    return f"commit {name[:12]}{dirty}"


class Table(NamedTuple):
    sources: tuple[str, ...]  # the results it is made from, arguments of `lines`
    lines: Callable[..., Lines]
    optional: bool = False  # whether documents may say that it was not measured


TABLES = {
    "limits": Table(("bench_optimizer",), limits),
    "phases": Table(("bench_optimizer",), phases),
    "optimizer": Table(("bench_optimizer",), optimizer),
    "traffic": Table(("bench_optimizer",), traffic),
    "host": Table(("bench_host",), host, optional=True),
    "loss": Table(("bench_split_cross_entropy",), loss),
    "training": Table(("bench_step",), training),
    "training-optimizer": Table(("bench_step",), training_optimizer),
    "training-memory": Table(("bench_step",), training_memory),
    "memory": Table(("bench_memory",), memory),
    "added": Table(("bench_step",), added),
    "growth": Table(("bench_growth",), growth),
    "summary": Table(("bench_optimizer", "bench_split_cross_entropy", "bench_step"), summary),
}

"""The tables of docs/gpu.md, from the results of benchmarks/bench_gpu*.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.gpu_timing import GpuReport, Result
from benchmarks.tables import NO_VALUE, Lines, Table, commit, markdown, milliseconds, percent

Cells = tuple[str, ...]


def operations(report: GpuReport) -> Lines:
    """Times are also compared with that of the first contestant, which is ours."""
    ours = {r.contest: r.ms for r in reversed(report.results)}

    def cells(r: Result) -> Cells:
        rate = NO_VALUE if r.gb_per_s is None else f"{r.gb_per_s:.0f}"
        ratio = f"{r.ms / ours[r.contest]:.2f}"
        return milliseconds(r.ms), ratio, str(r.launches), rate, percent(r.percent_of_copy)

    header = ("", "ms", "time over ours", "kernels and copies", "GB/s", "of the copy")
    return _by_contest(header, report, cells)


def steps(report: GpuReport) -> Lines:
    """Times are also counted in steps of SGD: eager, or compiled beside compiled steps."""
    unit = {r.contest: r.ms for r in report.results if r.contestant == "SGD"}
    eager = {contest.rpartition(": ")[0]: ms for contest, ms in reversed(unit.items())}

    def cells(r: Result) -> Cells:
        network, _, kind = r.contest.rpartition(": ")
        sgd = None if kind == "CUDA graph" else unit.get(r.contest)
        sgd = sgd or eager.get(network)
        in_sgd = NO_VALUE if sgd is None else f"{r.ms / sgd:.2f}"
        images = NO_VALUE if r.images_per_s is None else f"{r.images_per_s:.0f}"
        # What a graph needs it has held since it was captured.
        peak = NO_VALUE if r.contest.endswith("CUDA graph") else f"{r.peak_bytes / 1e9:.2f}"
        return milliseconds(r.ms), in_sgd, images, peak, str(r.launches)

    header = ("", "ms", "SGD steps", "images/s", "peak GB", "kernels and copies")
    return _by_contest(header, report, cells)


def summary(operations: GpuReport, steps: GpuReport) -> Lines:
    """What users of large models would look for, a line each."""
    at = {(r.contest, r.contestant): r for r in (*operations.results, *steps.results)}
    eager = ": eager"
    contests = [c for c in dict.fromkeys(c for c, _ in at) if c.endswith(eager) or ": " not in c]

    def row(start: str, ours: str, authors: Sequence[str], plain: str) -> Cells | None:
        """Of the last contest that starts so and has ours; times of the others over ours."""
        held = [name for name in contests if name.startswith(start) and (name, ours) in at]
        if not held:
            return None
        r = at[held[-1], ours]
        time = f"{milliseconds(r.ms)} ms"
        if r.percent_of_copy is not None:
            time += f", {percent(r.percent_of_copy)}"
        others = [at.get((held[-1], name)) for name in (*authors, plain)]
        what = f"{held[-1].removesuffix(eager)}: {ours.removeprefix('imbsam-fast').lstrip(', ')}"
        ratios = (NO_VALUE if other is None else f"{other.ms / r.ms:.2f}" for other in others)
        return (what.removesuffix(": "), time, *ratios)

    sequence, loop = ("authors' sequence", "authors' sequence, fused SGD"), ("authors' loop", "")
    wanted = [
        row("optimizer", "imbsam-fast", sequence, "foreach and fused SGD"),
        row("optimizer", "imbsam-fast, captured", ("", ""), "foreach and fused SGD, captured"),
        row("loss, ", "imbsam-fast", ("authors' boolean masks", ""), "cross_entropy, row weights"),
        row("ResNet-50", "ImbSAM, TrainStep joint", loop, ""),
        row("ConvNeXt-T", "ImbSAM, TrainStep split", loop, ""),
        row("ViT-B/16", "ImbSAM, TrainStep split", loop, ""),
    ]
    header = (
        "GPU", "ours, share of the copy bandwidth", "authors' time over ours",
        "with SGD(fused=True)", "plain torch's time over ours",
    )  # fmt: skip
    return markdown(header, filter(None, wanted))


def _by_contest(header: Cells, report: GpuReport, cells: Callable[[Result], Cells]) -> Lines:
    """The contestants below the name of their contest."""
    rows: list[Cells] = []
    contest = None
    for r in report.results:
        if r.contest != contest:
            contest = r.contest
            rows.append((f"**{contest}**", *[""] * (len(header) - 1)))
        rows.append((r.contestant, *cells(r)))
    return markdown(header, rows)


def provenance(report: GpuReport) -> str:
    e = report.environment
    gpus = [device["name"] for device in e["devices"] if device["type"] == "cuda"]
    versions = e["versions"]
    script = "bench_gpu_steps" if report.results[0].images_per_s is not None else "bench_gpu"
    facts = (
        ", ".join(gpus),
        f"copy {report.copy_gb_per_s:.0f} GB/s",
        f"imbsam-fast {versions['imbsam-fast']}, torch {versions['torch']}, "
        f"CUDA {versions['cuda']}, Python {versions['python']}",
        f"{commit(e)}, {e['date'][:10]}",
        f"{report.rounds} rounds",
    )
    note = f" {report.note}." if report.note else ""
    return f"Measured ({script}): {'; '.join(facts)}.{note}"


TABLES = {
    "gpu-operations": Table(("gpu/bench_gpu",), operations, optional=True),
    "gpu-steps": Table(("gpu/bench_gpu_steps",), steps, optional=True),
    "gpu-summary": Table(("gpu/bench_gpu", "gpu/bench_gpu_steps"), summary, optional=True),
}

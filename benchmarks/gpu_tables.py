"""The tables of docs/gpu.md, from the results of benchmarks/bench_gpu*.py."""

from __future__ import annotations

from benchmarks.gpu_timing import GpuReport, Result
from benchmarks.tables import NO_VALUE, Lines, Table, commit, markdown, milliseconds, percent


def operations(report: GpuReport) -> Lines:
    def cells(r: Result) -> tuple[str, ...]:
        rate = NO_VALUE if r.gb_per_s is None else f"{r.gb_per_s:.0f}"
        return milliseconds(r.ms), str(r.launches), rate, percent(r.percent_of_copy)

    header = ("contest: contestant", "ms", "launches", "GB/s", "of the copy")
    return markdown(header, ((f"{r.contest}: {r.contestant}", *cells(r)) for r in report.results))


def steps(report: GpuReport) -> Lines:
    """Times are also counted in steps of the SGD that ran in the same contest."""
    unit = {r.contest: r.ms for r in report.results if r.contestant == "SGD"}

    def cells(r: Result) -> tuple[str, ...]:
        in_sgd = f"{r.ms / unit[r.contest]:.2f}" if r.contest in unit else NO_VALUE
        images = NO_VALUE if r.images_per_s is None else f"{r.images_per_s:.0f}"
        return milliseconds(r.ms), in_sgd, images, f"{r.peak_bytes / 1e9:.2f}", str(r.launches)

    header = ("network: contestant", "ms", "SGD steps", "images/s", "peak GB", "launches")
    return markdown(header, ((f"{r.contest}: {r.contestant}", *cells(r)) for r in report.results))


def provenance(report: GpuReport) -> str:
    e = report.environment
    gpus = [device["name"] for device in e["devices"] if device["type"] == "cuda"]
    versions = e["versions"]
    facts = (
        ", ".join(gpus),
        f"copy {report.copy_gb_per_s:.0f} GB/s",
        f"imbsam-fast {versions['imbsam-fast']}, torch {versions['torch']}, "
        f"CUDA {versions['cuda']}, Python {versions['python']}",
        f"{commit(e)}, {e['date'][:10]}",
        f"{report.rounds} rounds",
    )
    return f"Measured: {'; '.join(facts)}."


TABLES = {
    "gpu-operations": Table(("gpu/bench_gpu",), operations, optional=True),
    "gpu-steps": Table(("gpu/bench_gpu_steps",), steps, optional=True),
}

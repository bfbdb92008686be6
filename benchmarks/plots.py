"""Pictures of recorded results, for looking at; they are made, not committed."""

from __future__ import annotations

from pathlib import Path

from benchmarks import bench_growth, bench_step
from benchmarks.tables import by_size, contestants
from imbsam_fast.bench.optimizers import IMBSAM
from imbsam_fast.bench.report import Report


def draw(results: dict[str, Report], directory: Path) -> list[Path]:
    """A PNG for each result that has one; returns their paths. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    if "bench_growth" in results:
        drawn += [_growth(results["bench_growth"], axis, directory) for axis in bench_growth.SIZES]
    for name, operation, label in (
        ("bench_optimizer", IMBSAM.name, "time of a step, times ours"),
        ("bench_step", bench_step.STEP, "time of a training step, in SGD steps"),
    ):
        if name in results:
            drawn.append(_ratios(results[name], operation, label, directory / f"{name}.png"))
    return drawn


def _growth(report: Report, axis: str, directory: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 6), layout="constrained")
    for (operation, who), points in bench_growth.curves(report.timings, axis).items():
        name = who if operation == IMBSAM.name else f"{operation}: {who}"
        axes.loglog(list(points), list(points.values()), marker="o", label=name)
    axes.set(xlabel=axis, ylabel="ms", title=f"One optimizer step against {axis}")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return _save(figure, directory / f"growth_{axis}.png")


def _ratios(report: Report, operation: str, label: str, path: Path) -> Path:
    from matplotlib import pyplot

    rows = by_size(report, operation)
    names = contestants(rows)
    figure, axes = pyplot.subplots(
        figsize=(9, 2 + 0.2 * len(rows) * len(names)), layout="constrained"
    )
    thickness = 0.8 / len(names)
    for i, who in enumerate(names):
        found = [(y, at[who].ratio) for y, at in enumerate(rows.values()) if who in at]
        axes.barh(
            [y + i * thickness for y, _ in found], [r for _, r in found], thickness, label=who
        )
    axes.set_yticks([y + 0.4 for y in range(len(rows))], list(rows))
    axes.invert_yaxis()
    axes.set(xlabel=label)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return _save(figure, path)


def _save(figure, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path

"""What a training run shows in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import dispatch
from .digits import LongTailData
from .metrics import COLUMNS
from .results import Run, summary
from .timing import Timings
from .training import Settings


def print_plan(console: Console, settings: Settings, data: LongTailData, model: dict) -> None:
    """What is about to be trained."""
    split = settings.split(data.counts)
    tail = (split.sharp > 0).nonzero().flatten().tolist()
    border = "at most" if settings.inclusive else "fewer than"
    tail_names = ", ".join(map(str, tail)) or "none: ImbSAM is SGD"
    if len(tail) == len(data.counts):
        tail_names = "all: ImbSAM is SAM"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    for name, value in {
        "data": f"{len(data.train_targets)} training images, {len(data.test_targets)} test images "
        f"({len(data.test_targets) // len(data.counts)} a class)",
        "class counts": " ".join(map(str, data.counts)),
        "tail classes": f"{tail_names} ({border} {settings.eta:g} images), "
        f"{100 * split.tail_fraction:.1f} % of the training images",
        "model": f"convolutional, {settings.norm} norm, {model['parameters']:,} parameters",
        "plan": f"{model['plan']} ({_why_plan(settings, model['plan'])})",
        "backend": _describe_backend(settings.device),
        "preset": f"{settings.preset}: tail weight {settings.tail_weight:g}, BatchNorm statistics "
        f"{settings.batch_norm} a step",
        "training": f"{_plural(settings.seeds, 'seed')} of {_plural(settings.epochs, 'epoch')}, "
        f"batch {settings.batch_size}, lr {settings.lr:g} cosine, rho {settings.rho:g}",
    }.items():
        table.add_row(name, value)
    console.print(table)


def _describe_backend(device: str) -> str:
    """The backend in use and, where a better one could not be taken, why."""
    used = dispatch.backend_name(device)
    if dispatch.forced_backend():
        return f"{used} on {device} (forced)"
    reasons = dispatch.available(device)
    passed_over = dispatch.BACKENDS[: dispatch.BACKENDS.index(used)]
    why = "; ".join(f"no {backend}: {reasons[backend]}" for backend in passed_over)
    return f"{used} on {device} ({why or 'chosen automatically'})"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _why_plan(settings: Settings, plan: str) -> str:
    if settings.plan == "auto":
        return "auto: rows of a batch " + (
            "share BatchNorm statistics" if plan == "joint" else "do not influence each other"
        )
    if plan == "split" and settings.norm == "batch":
        return "asked for; under BatchNorm each part is normalised by its own statistics"
    return "asked for"


def progress(console: Console) -> Progress:
    """A bar whose one task has the field `loss`, a text."""
    return Progress(
        TextColumn("{task.description:24}"),
        TextColumn("{task.fields[loss]:11}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def print_results(
    console: Console, settings: Settings, counts: list[int], runs: Sequence[Run], timings: Timings
) -> None:
    """Accuracy by group and time per step, a row a method."""
    backends = list(timings.relative["sgd"])
    table = Table(
        title="Test accuracy in % after the last epoch",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("", min_width=9)
    titles = ["Many\n> 100", "Medium\n20 - 100", "Few\n< 20", "All\nclasses"]
    for title in titles + [f"step time\n{backend}" for backend in backends]:
        table.add_column(title, justify="right", no_wrap=True)
    for method in settings.methods():
        columns = summary([run for run in runs if run.method == method], counts)
        times = [f"{timings.relative[method][b]:.2f}x" for b in backends]
        table.add_row(settings.label(method), *(accuracy_cell(columns[c]) for c in COLUMNS), *times)
    console.print(table)
    console.print(
        f"All is the mean of the per-class accuracies; mean ± standard deviation over "
        f"{settings.seeds} seeds.\n"
        if settings.seeds > 1
        else "All is the mean of the per-class accuracies.\n",
        f"1.00x is a plain torch.optim.SGD step, {timings.sgd_ms:.2f} ms; medians of "
        f"{timings.repetitions} interleaved repetitions of {timings.batches} batches.",
        style="dim",
        sep="",
    )


def accuracy_cell(value: tuple[float, float | None] | None) -> str:
    """Mean and standard deviation for a table, "-" for a group without classes."""
    if value is None:
        return "-"
    mean, std = value
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ±{std:.1f}"

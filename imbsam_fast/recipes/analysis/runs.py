"""`imbsam-fast analyze`: what a run's checkpoint says about sharpness, written beside it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ...env import environment
from ..data.datasets import load
from ..data.images import LongTailImages
from ..figures import styles_of
from ..metrics import GROUPS
from ..run_directory import RunDirectory, RunDirectoryError
from ..settings.config import RunConfig
from ..settings.datasets import DATASETS
from ..train.run import load_model
from .figures import lines_figure, planes_figure, spectrum_figure
from .measurements import (
    PARTS,
    Sample,
    choose_classes,
    draw,
    hessian_analysis,
    in_ranges,
    landscape_analysis,
)
from .settings import HESSIAN, LANDSCAPE, AnalysisSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = 1
Ticked = Callable[[str, int], Callable[[], None]]  # what, how often -> tick


@dataclass(frozen=True)
class Request:
    """What to analyse of each run; None takes the run's own."""

    classes: str
    kinds: Sequence[str]
    checkpoint: str  # "last" or "best"
    device: str
    eta: float | None
    data_dir: str | None


@dataclass
class TrainedRun:
    """A run's model at a checkpoint, and its training set."""

    config: RunConfig
    model: nn.Module
    data: LongTailImages
    tail: list[int]  # classes
    epoch: int


def open_run(directory: RunDirectory, request: Request) -> TrainedRun:
    """Raises RunDirectoryError or DataError for what is missing, damaged or does not fit."""
    values = dict(directory.config)
    if request.data_dir is not None:
        values["data_dir"] = request.data_dir
    if request.eta is not None:
        values["eta"] = request.eta
    try:
        config = RunConfig.from_dict({**values, "device": request.device})
    except (KeyError, TypeError, ValueError) as error:
        raise RunDirectoryError(
            f"the configuration of '{directory.path}' lacks or spoils {error}"
        ) from error
    if config.dataset not in DATASETS:
        raise RunDirectoryError(
            f"dataset of '{directory.path}' is {config.dataset!r}, expected one of "
            f"{', '.join(DATASETS)}"
        )
    best = request.checkpoint == "best"
    epoch = directory.load_checkpoint(best)["epoch"]
    data = load(config)
    try:
        model = load_model(directory, len(data.counts), best)
    except (KeyError, RuntimeError) as error:
        raise RunDirectoryError(
            f"the weights in '{directory.path}' are not those of its configuration: {error}"
        ) from error
    tail = (config.split(data.counts).sharp > 0).nonzero().flatten().tolist()
    return TrainedRun(config, model.to(request.device), data, tail, epoch)


def analyse(
    directory: RunDirectory,
    request: Request,
    settings: AnalysisSettings,
    out: Path,
    ticked: Ticked,
) -> list[Path]:
    """Write each analysis as JSON and pictures into `out`; returns the JSON files.

    Raises RunDirectoryError, DataError or ValueError before anything is computed.
    """
    run = open_run(directory, request)
    label = f"{run.config.label()}, seed {run.config.seed}"
    work: dict[str, Callable[[], dict[str, Any]]] = {}
    if HESSIAN in request.kinds:
        sample = _sample(run, request.classes, settings)
        name = f"{HESSIAN}-{file_part(request.classes, sample.classes)}"
        work[name] = lambda: _hessian(run, request, sample, settings, ticked)
    if LANDSCAPE in request.kinds:
        samples = _parts(run, settings)
        work[LANDSCAPE] = lambda: _landscape(run, request, samples, settings, ticked)
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"cannot write into '{out}': {error.strerror}") from error
    for name, compute in work.items():
        result = {
            "format": FORMAT,
            "label": label,
            "checkpoint": request.checkpoint,
            "epoch": run.epoch,
            "settings": asdict(settings),
            **compute(),
            "environment": environment(),
        }
        for suffix, figure in figures(label, result, directory.config).items():
            figure.savefig(out / f"{name}{suffix}.png", dpi=150)
        written.append(out / f"{name}.json")
        written[-1].write_text(json.dumps(result, allow_nan=False) + "\n")
    return written


def figures(label: str, result: dict[str, Any], config: dict[str, Any]) -> dict[str, Figure]:
    """File name suffix -> picture of one analysis of a run with `config`."""
    looks = styles_of([(label, config)])
    if result["analysis"] == HESSIAN:
        return {"": spectrum_figure({label: result}, looks)}
    return {
        "-line": lines_figure({label: result}, looks),
        "-plane": planes_figure({label: result}),
    }


def file_part(which: str, classes: Sequence[int]) -> str:
    """`which` where it is a word, else the classes, or a checksum of them where they are many."""
    if which in (*GROUPS, *PARTS):
        return which
    listed = "classes-" + in_ranges(classes).replace(", ", "_")
    return listed if len(listed) <= 60 else f"classes-{zlib.crc32(listed.encode()):08x}"


# ---------------------------------------------------------------- one analysis


def _sample(run: TrainedRun, which: str, settings: AnalysisSettings) -> Sample:
    classes = choose_classes(which, run.data.counts, run.tail, run.config.group_borders)
    return draw(run.data.train, classes, settings, run.config.device)


def _parts(run: TrainedRun, settings: AnalysisSettings) -> dict[str, Sample]:
    """Head and tail; only one of them where the other has no class."""
    tail = len(run.tail)
    present = {"head": tail < len(run.data.counts), "tail": tail > 0}
    return {part: _sample(run, part, settings) for part in PARTS if present[part]}


def _hessian(
    run: TrainedRun, request: Request, sample: Sample, settings: AnalysisSettings, ticked: Ticked
) -> dict[str, Any]:
    tick = ticked("Hessian", settings.hessian_ticks)
    return {
        **hessian_analysis(run.model, sample, settings, tick),
        "classes": request.classes,
        "class_list": sample.classes,
        "rows": sample.rows,
        "about": f"{_describe(request.classes, sample)} {_about(run, request, settings)}",
    }


def _landscape(
    run: TrainedRun,
    request: Request,
    samples: dict[str, Sample],
    settings: AnalysisSettings,
    ticked: Ticked,
) -> dict[str, Any]:
    tick = ticked("landscape", settings.landscape_ticks)
    classes = len(run.data.counts)
    described = " ".join(_describe(part, sample) for part, sample in samples.items())
    return {
        **landscape_analysis(run.model, samples, classes, settings, tick),
        "class_list": {part: sample.classes for part, sample in samples.items()},
        "rows": {part: sample.rows for part, sample in samples.items()},
        "about": f"{described} {_about(run, request, settings)}",
    }


def _describe(which: str, sample: Sample) -> str:
    share = "all" if sample.rows == sample.available else f"{sample.rows:,} of"
    return (
        f"{which.capitalize()} (classes {in_ranges(sample.classes)}): {share} "
        f"{sample.available:,} training images."
    )


def _about(run: TrainedRun, request: Request, settings: AnalysisSettings) -> str:
    by_batch = f"the statistics of each batch of {settings.batch_size}"
    normalised = "its running statistics" if settings.batch_norm == "running" else by_batch
    return (
        "Mean cross-entropy without augmentation, class weights or weight decay; BatchNorm by "
        f"{normalised}; {request.checkpoint} checkpoint, epoch {run.epoch}."
    )


# ---------------------------------------------------------------- progress


@contextmanager
def progress(console: Console, label: str) -> Iterator[Ticked]:
    """A bar for each analysis of one run, with the time left."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )

    def ticked(what: str, ticks: int) -> Callable[[], None]:
        task = bar.add_task(f"{label}: {what}", total=ticks)
        return lambda: bar.advance(task)

    with bar:
        yield ticked


def print_analysis(console: Console, file: Path) -> None:
    """One line on what was found, and where it stands."""
    result = json.loads(file.read_text())
    if result["analysis"] == HESSIAN:
        top, trace = result["lambda_max"], result["trace"]
        error = f" ± {trace['error']:.3g}" if trace["error"] is not None else ""
        found = (
            f"{result['classes']}: lambda_max {top['value']:.4g} (error at most {top['error']:.1g}"
            f"{'' if top['converged'] else ', not converged: more --lanczos-steps'}), trace "
            f"{trace['value']:.4g}{error}"
        )
    else:
        found = ", ".join(
            f"{part}: loss {_middle(result['line'], part)}" for part in result["groups"]
        )
    console.print(f"{result['label']}: {found}; {file}", highlight=False, soft_wrap=True)


def _middle(line: dict[str, Any], part: str) -> str:
    losses = line[part]
    ends = [loss for loss in (losses[0], losses[-1]) if loss is not None]
    away = f", up to {max(ends):.3g} at the ends" if ends else ""
    middle = losses[len(losses) // 2]
    return f"{'not finite' if middle is None else format(middle, '.3g')}{away}"

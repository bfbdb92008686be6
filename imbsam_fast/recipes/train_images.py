"""`imbsam-fast train` on images: one run after the other, and a table of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .config import RunConfig
from .datasets import load
from .image_data import LongTailImages
from .image_run import run_to_the_end
from .image_training import ImageTraining
from .metrics import COLUMNS, mean_and_std
from .ranks import ALONE, Ranks
from .report import accuracy_cell
from .run_directory import RunDirectory, RunDirectoryError
from .run_progress import RunProgress
from .stop_signals import StopSignals

# Settings that do not change what is computed, but for rounding.
_MACHINE = ("data_dir", "image_root", "workers", "threads", "device", "tensorboard", "compile")


def train_all(
    configs: Sequence[RunConfig],
    save: Path,
    resume: bool,
    console: Console,
    ranks: Ranks = ALONE,
) -> dict[str, list[dict[str, Any]]]:
    """Make every run of `configs`, which share their data, in a directory of its own in `save`.

    Returns label -> results of its runs. With `resume`, complete runs are read and others go
    on. SIGTERM and Ctrl-C end the run with a checkpoint, and raise InterruptedRun.
    """
    data = load(configs[0])
    directories = [_directory(config, save, resume, ranks) for config in configs]
    console.print(_describe(configs[0], data), style="dim")
    results: dict[str, list[dict[str, Any]]] = {}
    with _threads(configs[0].threads), StopSignals() as signals:
        for config, directory in zip(configs, directories):
            result = directory.result()
            if result is None:
                result = _run(config, data, directory, console, ranks, signals)
            console.print(_one_line(config, result), highlight=False)
            results.setdefault(config.label(), []).append(result)
    console.print(results_table(results))
    return results


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """`number` CPU threads of torch inside the block, and torch's generators left as they were."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)


def _directory(config: RunConfig, save: Path, resume: bool, ranks: Ranks) -> RunDirectory:
    path = save / config.directory_name()
    if not ranks.writes:  # rank 0 makes it
        return RunDirectory(path, config.to_dict())
    if resume and path.exists():
        directory = RunDirectory.open(path)
        _check_same(directory, config)
        return directory
    return RunDirectory.create(path, config.to_dict())


def _check_same(directory: RunDirectory, config: RunConfig) -> None:
    """A run can only go on as what it was begun as, though elsewhere."""
    begun_with = RunConfig.from_dict(directory.config).to_dict()
    for name, value in config.to_dict().items():
        begun = begun_with[name]
        if name not in _MACHINE and begun != value:
            raise RunDirectoryError(
                f"'{directory.path}' was begun with {name} = {begun!r}, expected the same with "
                f"--resume, not {value!r}"
            )


def _run(
    config: RunConfig,
    data: LongTailImages,
    directory: RunDirectory,
    console: Console,
    ranks: Ranks,
    signals: StopSignals,
) -> dict[str, Any]:
    training = ImageTraining(config, data, ranks)
    writes_scalars = config.tensorboard and ranks.writes
    with (
        RunProgress(training, console) as progress,
        _scalars(directory.path, writes_scalars) as on_epoch,
    ):
        return run_to_the_end(training, directory, progress, signals.arrived, on_epoch)


@contextmanager
def _scalars(path: Path, wanted: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What takes a line of the log and, if `wanted`, writes its numbers for TensorBoard."""
    if not wanted:
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter

    def write(row: dict[str, Any]) -> None:
        for name, value in {**row, **row.get("validation", {})}.items():
            if name != "epoch" and isinstance(value, float):
                writer.add_scalar(name, value, row["epoch"])

    with SummaryWriter(str(path / "tensorboard")) as writer:
        yield write


def _describe(config: RunConfig, data: LongTailImages) -> str:
    return (
        f"{config.dataset}: {len(data.train)} training images in {len(data.counts)} classes, "
        f"{len(data.test)} test images; {config.model}, {config.epochs} epochs"
    )


def _one_line(config: RunConfig, result: dict[str, Any]) -> str:
    tested = result["last"]["plain"]
    groups = " / ".join(_over([tested[column]]) for column in COLUMNS)
    return (
        f"{config.label()}, seed {config.seed}: {groups} (Many / Medium / Few / All), training "
        f"{result['train_accuracy']:.1f}, {result['seconds']:.0f} s"
    )


def results_table(results: dict[str, list[dict[str, Any]]]) -> Table:
    """Test accuracy after the last epoch: mean and standard deviation over the runs of a label."""
    table = Table(title="Test accuracy in % after the last epoch", box=SIMPLE_HEAD)
    table.add_column("")
    for title in ("Many", "Medium", "Few", "All", "All, flip", "training"):
        table.add_column(title, justify="right", no_wrap=True)
    for label, runs in results.items():
        cells = [_over([run["last"]["plain"][column] for run in runs]) for column in COLUMNS]
        cells.append(_over([run["last"]["flip"]["all"] for run in runs]))
        cells.append(_over([run["train_accuracy"] for run in runs]))
        table.add_row(label, *cells)
    return table


def _over(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return accuracy_cell(mean_and_std(known) if known else None)

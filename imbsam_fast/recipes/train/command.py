"""`imbsam-fast train`: one run after the other, and a table of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..data.datasets import load
from ..data.images import DataError, LongTailImages
from ..models.registry import check_image_size
from ..run_directory import RunDirectory, RunDirectoryError
from ..settings.arguments import UsageError
from ..settings.config import PERTURBING, RunConfig
from ..settings.datasets import DATASETS
from .dry_run import dry_run
from .progress import RunProgress
from .ranks import ALONE, Ranks, RanksError, joined
from .run import InterruptedRun, run_to_the_end
from .stop_signals import StopSignals
from .tables import one_line, plan_table, results_table
from .training import ImageTraining, TrainingDivergedError

# Settings that do not change what is computed, but for rounding.
_MACHINE = (
    "data_dir",
    "image_root",
    "check_files",
    "workers",
    "threads",
    "device",
    "tensorboard",
    "compile",
    "cuda_graph",
)


def run_command(configs: Sequence[RunConfig], save: Path | None, resume: bool) -> int:
    """Make the runs: 0, or 130 where a signal ended them. UsageError says what to change.

    Without `save` it is a dry run.
    """
    try:
        with joined(configs[0].distributed, configs[0].device) as ranks:
            console = Console(quiet=not ranks.writes)
            if save is None:
                with _threads(configs[0].threads):
                    data = load(configs[0])
                    check_network(configs[0], data)
                    check_capture(configs, data, ranks)
                    dry_run(configs, data, console, ranks)
            else:
                train_all(configs, save, resume, console, ranks)
    except InterruptedRun as interruption:
        print(f"interrupted; '{interruption}' goes on with --resume")
        return 130
    except (DataError, RunDirectoryError, TrainingDivergedError, RanksError) as error:
        raise UsageError(str(error)) from error
    return 0


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
    check_network(configs[0], data)
    with _threads(configs[0].threads):
        check_capture([c for c in configs if not _is_complete(c, save, resume)], data, ranks)
    directories = [_directory(config, save, resume, ranks) for config in configs]
    console.print(plan_table(configs, data), highlight=False)
    results: dict[str, list[dict[str, Any]]] = {}
    try:
        with _threads(configs[0].threads), StopSignals() as signals:
            for config, directory in zip(configs, directories):
                result = directory.result()
                if result is None:
                    result = _run(config, data, directory, console, ranks, signals)
                console.print(one_line(config, result), highlight=False)
                results.setdefault(config.label(), []).append(result)
    finally:
        data.train.close()
    console.print(results_table(results, DATASETS[configs[0].dataset].mirrored))
    return results


def check_network(config: RunConfig, data: LongTailImages) -> None:
    """Raise UsageError where the network cannot take images of their size."""
    try:
        check_image_size(config.model, config.norm, len(data.counts), data.train.size)
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_capture(configs: Sequence[RunConfig], data: LongTailImages, ranks: Ranks) -> None:
    """Raise UsageError where TrainStep cannot capture these runs, alike but for the method."""
    captured = (c for c in configs if c.cuda_graph and c.optimizer in PERTURBING)
    config = next(captured, None)
    if config is None:
        return
    try:
        ImageTraining(config, data, ranks)
    except ValueError as error:
        raise UsageError(str(error)) from error


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


def _is_complete(config: RunConfig, save: Path, resume: bool) -> bool:
    path = save / config.directory_name()
    return resume and RunDirectory(path, config.to_dict()).result() is not None


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
        directory.in_use() if ranks.writes else nullcontext(),
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
        for split, values in (("train", row), ("validation", row.get("validation", {}))):
            for name, value in values.items():
                if name != "epoch" and isinstance(value, float):
                    writer.add_scalar(f"{split}/{name}", value, row["epoch"])

    with SummaryWriter(str(path / "tensorboard")) as writer:
        yield write

"""`imbsam-fast train` on images: one run after the other, and a table of all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .config import RunConfig
from .datasets import load
from .image_data import LongTailImages
from .image_training import ImageTraining, run_to_the_end
from .metrics import COLUMNS, mean_and_std
from .report import accuracy_cell
from .run_directory import RunDirectory
from .run_progress import RunProgress
from .stop_signals import StopSignals


def train_all(
    configs: Sequence[RunConfig], save: Path, resume: bool, console: Console
) -> dict[str, list[dict[str, Any]]]:
    """Make every run of `configs` in a directory of its own in `save`.

    Returns label -> results of its runs. With `resume`, complete runs are read and others go
    on. SIGTERM and Ctrl-C end the run with a checkpoint, and raise InterruptedRun.
    """
    torch.set_num_threads(configs[0].threads)
    directories = [_directory(config, save, resume) for config in configs]
    data = load(configs[0])
    console.print(_describe(configs[0], data), style="dim")
    results: dict[str, list[dict[str, Any]]] = {}
    with StopSignals() as signals:
        for config, directory in zip(configs, directories):
            result = directory.result()
            if result is None:
                training = ImageTraining(config, data)
                with RunProgress(training, console) as progress:
                    result = run_to_the_end(training, directory, progress, signals.arrived)
            console.print(_one_line(config, result), highlight=False)
            results.setdefault(config.label(), []).append(result)
    console.print(results_table(results))
    return results


def _directory(config: RunConfig, save: Path, resume: bool) -> RunDirectory:
    path = save / config.directory_name()
    if resume and path.exists():
        return RunDirectory.open(path)
    return RunDirectory.create(path, config.to_dict())


def _describe(config: RunConfig, data: LongTailImages) -> str:
    return (
        f"{config.dataset}: {len(data.train)} training images in {len(data.counts)} classes, "
        f"{len(data.test)} test images; {config.model}, {config.epochs} epochs"
    )


def _one_line(config: RunConfig, result: dict[str, Any]) -> str:
    tested = result["last"]["plain"]
    groups = " / ".join(accuracy_cell((tested[c], None) if tested[c] is not None else None)
                        for c in COLUMNS)  # fmt: skip
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

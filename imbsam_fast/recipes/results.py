"""What a training run leaves behind: results.json and one checkpoint a method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..env import environment
from .digits import LongTailData
from .metrics import COLUMNS, group_accuracies, mean_and_std
from .timing import Timings
from .training import Settings, Trained

RESULTS_FILE = "results.json"
PICTURE_FILE = "per_class_accuracy.png"


class Run(NamedTuple):
    """One method trained on one seed, tested after the last epoch."""

    method: str
    seed: int
    train_loss: float  # mean over the last epoch
    per_class: list[float]  # test accuracy in %


def summary(
    runs: Sequence[Run], counts: Sequence[int]
) -> dict[str, tuple[float, float | None] | None]:
    """Mean and standard deviation over `runs` for each of COLUMNS, None for an empty group."""
    accuracies = [group_accuracies(run.per_class, counts) for run in runs]
    columns: dict[str, tuple[float, float | None] | None] = {}
    for column in COLUMNS:
        values = [value for a in accuracies if (value := a[column]) is not None]
        columns[column] = mean_and_std(values) if values else None
    return columns


def results_dict(
    settings: Settings, data: LongTailData, model: dict[str, Any], runs: list[Run], timings: Timings
) -> dict[str, Any]:
    """The content of results.json; accuracies in %, times in ms or relative to SGD."""
    split = settings.split(data.counts)
    return {
        "recipe": "digits",
        "settings": asdict(settings),
        "data": {
            "train_images": len(data.train_targets),
            "test_images": len(data.test_targets),
            "class_counts": data.counts,
            "tail_classes": (split.sharp > 0).nonzero().flatten().tolist(),
            "tail_fraction": split.tail_fraction,
        },
        "model": model,
        "results": {
            method: _method_results(settings.label(method), method, runs, data.counts)
            for method in settings.methods()
        },
        "timing": timings._asdict(),
        "environment": environment(),
    }


def _method_results(label: str, method: str, runs: list[Run], counts: list[int]) -> dict[str, Any]:
    own = [run for run in runs if run.method == method]
    columns = summary(own, counts)
    return {
        "label": label,
        "mean": {c: value and value[0] for c, value in columns.items()},
        "std": {c: value and value[1] for c, value in columns.items()},
        "seeds": [
            {
                "seed": run.seed,
                "train_loss": run.train_loss,
                "per_class": run.per_class,
                **group_accuracies(run.per_class, counts),
            }
            for run in own
        ],
    }


def write_results(directory: Path, results: dict[str, Any]) -> None:
    (directory / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n")


def checkpoint_path(directory: Path, method: str) -> Path:
    return directory / f"checkpoint_{method}.pt"


def write_checkpoint(
    directory: Path, method: str, seed: int, trained: Trained, settings: Settings
) -> None:
    """The state after the last epoch, of plain values that torch.load takes with weights_only."""
    config = asdict(settings)
    config["optimizers"] = list(settings.optimizers)
    torch.save(
        {
            "method": method,
            "seed": seed,
            "epoch": settings.epochs,
            "config": config,
            "per_class_accuracy": trained.per_class,
            "model": trained.model.state_dict(),
            "optimizer": trained.optimizer.state_dict(),
        },
        checkpoint_path(directory, method),
    )

"""The data sets of the image recipes: their published settings, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import packed_jpeg
from .config import FULL, SMALL, Dataset, RunConfig
from .digits import long_tail_counts
from .image_data import DataError, LongTailImages

# CIFAR100-LT's, from the code of the baselines. Momentum is that of all data sets.
CIFAR_DEFAULTS: dict[str, Any] = {
    "images": FULL,
    "imbalance_factor": 100.0,
    "model": "resnet32",
    "norm": "batch",
    "epochs": 200,
    "warmup_epochs": 0,
    "batch_size": 64,
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 1e-3,
    "group_borders": (20, 100),
}


def load(config: RunConfig) -> LongTailImages:
    """The images that `config` names. Raises DataError."""
    return DATASETS[config.dataset].load(config)


def _cifar10(config: RunConfig) -> LongTailImages:
    directory = Path(config.data_dir)
    if not (directory / packed_jpeg.TRAIN_FILE).exists():
        raise DataError(
            f"--data-dir is '{directory}', expected a directory with {packed_jpeg.TRAIN_FILE} and "
            f"{packed_jpeg.TEST_FILE}"
        )
    largest = 500 if config.images == SMALL else 5000
    return packed_jpeg.load(directory, long_tail_counts(largest, config.imbalance_factor, 10))


DATASETS = {
    "cifar10-lt": Dataset(
        "CIFAR-10, made long-tailed",
        _cifar10,
        CIFAR_DEFAULTS,
        # Ten times the images, ten times the borders of the groups; eta as in a first look.
        {FULL: {"group_borders": (200, 1000), "eta": 400.0}},
    ),
}

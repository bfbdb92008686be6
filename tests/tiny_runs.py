"""Runs of the real training code on tiny images, and run directories with numbers made up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from imbsam_fast.recipes.data import datasets
from imbsam_fast.recipes.data.images import CIFAR_STATISTICS, LongTailImages, MemoryImages
from imbsam_fast.recipes.metrics import group_accuracies
from imbsam_fast.recipes.run_directory import RunDirectory
from imbsam_fast.recipes.settings.config import Dataset, RunConfig, resolve
from imbsam_fast.recipes.settings.datasets import CIFAR_DEFAULTS, DATASETS
from imbsam_fast.recipes.train.run import run_to_the_end
from imbsam_fast.recipes.train.training import ImageTraining

COUNTS = [8, 120, 5, 40]  # few, many, few, medium: not in the order of their sizes
TEST_PER_CLASS = 5


def _images(counts: Sequence[int], seed: int) -> MemoryImages:
    """8x8, each class of another brightness."""
    random = torch.Generator().manual_seed(seed)
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    noise = torch.randint(0, 120, (len(targets), 3, 8, 8), generator=random)
    pixels = (noise + 40 * targets[:, None, None, None]).to(torch.uint8)
    return MemoryImages(pixels, targets, CIFAR_STATISTICS[10])


def tiny_images(config: RunConfig | None = None) -> LongTailImages:
    test = _images([TEST_PER_CLASS] * len(COUNTS), seed=1)
    return LongTailImages(_images(COUNTS, seed=0), test, None, COUNTS, None)


TINY = Dataset(
    "tiny images",
    {
        **CIFAR_DEFAULTS,
        "data_dir": "",
        "model": "resnet8",
        "epochs": 2,
        "batch_size": 64,
        "lr": 0.05,
    },
)


@contextmanager
def tiny_data_set() -> Iterator[None]:
    """Inside the block there is a data set "tiny"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "tiny", TINY)
        patch.setitem(datasets.LOADERS, "tiny", tiny_images)
        yield


def train(root: Path, optimizer: str, seed: int = 0, **settings: Any) -> RunDirectory:
    """A complete run in a new directory of `root`."""
    given = {"dataset": "tiny", "optimizer": optimizer, "seed": seed, **settings}
    config = resolve(TINY, given)
    directory = RunDirectory.create(root / config.directory_name(), config.to_dict())
    run_to_the_end(ImageTraining(config, tiny_images()), directory)
    return directory


def write_run(
    path: Path,
    per_class: Sequence[float] | None,
    counts: Sequence[int] = (200, 10, 50),
    log: Sequence[dict[str, Any]] = (),
    **config: Any,
) -> RunDirectory:
    """A run with these accuracies, one point higher with the flip average; None: not finished."""
    defaults = {
        "label": "SGD",
        "dataset": "cifar100-lt",
        "imbalance_factor": 100.0,
        "method": "ce",
        "optimizer": "sgd",
        "rho": 0.05,
        "eta": 100.0,
        "epochs": 3,
        "group_borders": [20, 100],
        "seed": 0,
    }
    directory = RunDirectory.create(path, {**defaults, **config})
    for row in log:
        directory.append_log(row)
    if per_class is None:
        return directory
    borders = tuple(directory.config["group_borders"])
    tested = {
        view: {"per_class": values, **group_accuracies(values, counts, borders)}
        for view, values in (("plain", list(per_class)), ("flip", [a + 1 for a in per_class]))
    }
    directory.write_result(
        {
            "class_counts": list(counts),
            "last": {"epoch": 3, **tested},
            "best": None,
            "seconds": 60.0,
            "skipped_images": 0,
            "environment": {"git_commit": "0123456789abcdef"},
        }
    )
    return directory

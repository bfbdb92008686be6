"""CIFAR-10 and CIFAR-100, made long-tailed from the folders that torchvision unpacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .images import (
    CIFAR_STATISTICS,
    DataError,
    LongTailImages,
    MemoryImages,
    long_tailed,
)


def folder(num_classes: int) -> str:
    """The folder inside the data directory, as the archive unpacks it."""
    return _dataset(num_classes).base_folder


def load(
    directory: Path, num_classes: int, counts: Sequence[int], validation: int
) -> LongTailImages:
    """The first counts[k] training images of class k and the whole test set.

    Args:
        directory: holds `cifar-10-batches-py` or `cifar-100-python`.
        num_classes: 10 or 100.
        counts: (K,), training images of each class.
        validation: images of each class after those, for choosing a checkpoint.

    Raises DataError for a file that is missing or differs from the published one.
    """
    dataset = _dataset(num_classes)
    _check_files(dataset, directory)
    statistics = CIFAR_STATISTICS[num_classes]
    train = dataset(str(directory), train=True)
    source = MemoryImages(*_tensors(train), statistics)
    test = MemoryImages(*_tensors(dataset(str(directory), train=False)), statistics)
    return long_tailed(source, test, counts, validation, list(train.classes))


def _dataset(num_classes: int) -> Any:
    from torchvision.datasets import CIFAR10, CIFAR100

    return CIFAR10 if num_classes == 10 else CIFAR100


def _tensors(source: Any) -> tuple[Tensor, Tensor]:
    """uint8 (n, 3, 32, 32) and int64 (n,)."""
    pixels = torch.from_numpy(np.ascontiguousarray(source.data.transpose(0, 3, 1, 2)))
    return pixels, torch.tensor(source.targets, dtype=torch.int64)


def _check_files(dataset: Any, directory: Path) -> None:
    """torchvision only says that something is wrong, not with which file."""
    from torchvision.datasets.utils import check_integrity

    meta = (dataset.meta["filename"], dataset.meta["md5"])
    for name, md5 in [*dataset.train_list, *dataset.test_list, meta]:
        file = directory / dataset.base_folder / name
        if not file.exists():
            raise DataError(
                f"'{file}' does not exist; --data-dir must hold the folder {dataset.base_folder}, "
                f"unpacked from {dataset.url}"
            )
        if not check_integrity(str(file), md5):
            raise DataError(
                f"'{file}' is damaged (its MD5 sum is not {md5}); unpack {dataset.url} again"
            )

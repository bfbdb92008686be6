"""CIFAR-10 as JPEG files packed end to end into .npz archives.

An archive has `jpeg` (uint8, all files end to end), `offsets` (int64, n + 1), `labels` (int64, n)
and `class_names`. The training archive is long-tailed already: the first int(5000 IF^(-k/9))
images of class k at IF = 100.
"""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .decoding import decode
from .images import (
    CIFAR10_STATISTICS,
    DataError,
    LongTailImages,
    MemoryImages,
    check_every_class,
    long_tailed,
)

TRAIN_FILE = "cifar10_train_if100.npz"
TEST_FILE = "cifar10_test.npz"


def load(directory: Path, counts: Sequence[int], validation: int) -> LongTailImages:
    """CIFAR10-LT from the archives in `directory`, with the first counts[k] images of class k.

    `validation` images of each class after those are set aside. Raises DataError for a file that
    is missing, damaged or smaller than asked for.
    """
    pixels, targets, names = read(directory / TRAIN_FILE)
    test_pixels, test_targets, _ = read(directory / TEST_FILE)
    train = MemoryImages(pixels, targets, CIFAR10_STATISTICS)
    check_every_class(test_targets.tolist(), len(counts), f"'{directory / TEST_FILE}'")
    test = MemoryImages(test_pixels, test_targets, CIFAR10_STATISTICS)
    return long_tailed(train, test, counts, validation, names)


def read(path: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Pixels uint8 (n, 3, H, W), targets int64 (n,) and class names of one archive."""
    if not path.exists():
        raise DataError(f"'{path}' does not exist, expected a packed JPEG archive; see --data-dir")
    try:
        with np.load(path) as archive:
            jpeg, offsets, labels = archive["jpeg"], archive["offsets"], archive["labels"]
            names = [str(name) for name in archive["class_names"]]
        _check_labels(labels, offsets, len(names))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(
            f"'{path}' is damaged ({error}), expected an .npz archive with jpeg, offsets, labels "
            "and class_names; copy it again"
        ) from error
    images: list[Tensor] = []
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        try:
            image = decode(jpeg[start:end].tobytes())
            if images and image.shape != images[0].shape:
                raise ValueError("it is not as large as the others")
            images.append(image)
        except (OSError, ValueError) as error:
            raise DataError(
                f"image {i} of '{path}' is damaged ({error}); copy the archive again"
            ) from error
    return torch.stack(images), torch.from_numpy(labels.astype(np.int64)), names


def _check_labels(labels: np.ndarray, offsets: np.ndarray, num_classes: int) -> None:
    if labels.dtype.kind not in "iu" or offsets.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype}, offsets {offsets.dtype}, not whole numbers")
    if len(labels) == 0 or len(offsets) != len(labels) + 1:
        raise ValueError(f"{len(labels)} labels and {len(offsets)} offsets")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels are {labels.min()} to {labels.max()}, {num_classes} class names")

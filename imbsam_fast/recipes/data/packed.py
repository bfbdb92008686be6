"""Small images held in memory, from files packed end to end into .npz archives.

An archive has `files` (uint8, all files end to end; `jpeg` in older ones), `offsets` (int64,
n + 1), `labels` (int64, n) and `class_names`; all images are of one size. pack.py makes them. The
CIFAR archives for training are long-tailed already: the first int(N IF^(-k/(K-1))) images of class
k, N = 5000 and IF = 100 for CIFAR-10, N = 500 and IF = 50 for CIFAR-100.
"""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .decoding import decode
from .images import (
    CIFAR_STATISTICS,
    DataError,
    LongTailImages,
    MemoryImages,
    Statistics,
    check_every_class,
    class_counts,
    long_tailed,
)
from .lists import few

CIFAR_FILES = {
    10: ("cifar10_train_if100.npz", "cifar10_test.npz"),
    100: ("cifar100_train_if50.npz", "cifar100_test.npz"),
}
TRAIN_FILE, TEST_FILE, VALIDATION_FILE = "train.npz", "test.npz", "validation.npz"


class Archive(NamedTuple):
    """What an archive holds, decoded."""

    path: Path
    pixels: Tensor  # uint8 (n, 3, H, W)
    targets: Tensor  # int64 (n,)
    class_names: list[str]

    def images(self, statistics: Statistics) -> MemoryImages:
        """The images as training takes them, normalised by `statistics`."""
        return MemoryImages(self.pixels, self.targets, statistics)


def load_cifar(
    directory: Path, num_classes: int, counts: Sequence[int], validation: int
) -> LongTailImages:
    """CIFAR10-LT or CIFAR100-LT from the archives in `directory`.

    The first counts[k] images of class k are for training; `validation` images of each class after
    those are set aside. Raises DataError for a file that is missing, damaged or smaller than asked
    for.
    """
    train, test = (read(directory / name) for name in CIFAR_FILES[num_classes])
    if len(train.class_names) != num_classes:
        raise DataError(
            f"'{train.path}' has {len(train.class_names)} classes, expected {num_classes}"
        )
    _check_same_classes(train, test)
    statistics = CIFAR_STATISTICS[num_classes]
    source, tested = train.images(statistics), test.images(statistics)
    return long_tailed(source, tested, counts, validation, train.class_names)


def load_own(directory: Path) -> LongTailImages:
    """train.npz, test.npz and, where it is there, validation.npz in `directory`, as they are.

    Pixels are normalised by the mean and standard deviation of the training images.
    """
    train, test = read(directory / TRAIN_FILE), read(directory / TEST_FILE)
    held_out = None
    if (directory / VALIDATION_FILE).exists():
        held_out = read(directory / VALIDATION_FILE)
    check_every_class(train.targets.tolist(), len(train.class_names), f"'{train.path}'")
    for other in (test, held_out) if held_out else (test,):
        _check_same_classes(train, other)
        if other.pixels.shape[1:] != train.pixels.shape[1:]:
            raise DataError(
                f"images of '{other.path}' are {_size(other)}, expected {_size(train)} as in "
                f"'{train.path}'; pack them with the same --image-size"
            )
    statistics = statistics_of(train.pixels)
    return LongTailImages(
        train.images(statistics),
        test.images(statistics),
        held_out.images(statistics) if held_out else None,
        class_counts(train.targets, len(train.class_names)),
        train.class_names,
    )


def _size(archive: Archive) -> str:
    return "x".join(map(str, archive.pixels.shape[2:]))


def statistics_of(pixels: Tensor) -> Statistics:
    """Mean and standard deviation of each channel of `pixels`, uint8 (n, 3, H, W), from 0 to 1."""
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in pixels.unbind(1)])
    shares = counts.double() / counts.sum(dim=1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ values
    std = (shares @ values**2 - mean**2).clamp(min=1e-6).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def _check_same_classes(train: Archive, other: Archive) -> None:
    if other.class_names != train.class_names:
        only = [
            sorted(set(one.class_names) - set(two.class_names))
            for one, two in ((train, other), (other, train))
        ]
        raise DataError(
            f"'{train.path}' and '{other.path}' have different classes, expected the same: "
            f"{few(only[0])} only in the first, {few(only[1])} only in the second"
        )
    check_every_class(other.targets.tolist(), len(train.class_names), f"'{other.path}'")


def read(path: Path) -> Archive:
    """One archive. Raises DataError where it is missing or damaged."""
    if not path.exists():
        raise DataError(
            f"'{path}' does not exist, expected an archive of images; see --data-dir, and "
            "`imbsam-fast pack`, which makes them"
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            files = archive["jpeg" if "jpeg" in archive.files else "files"]
            offsets, labels = archive["offsets"], archive["labels"]
            names = [str(name) for name in archive["class_names"]]
        _check_labels(labels, offsets, len(names))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(
            f"'{path}' is damaged ({error}), expected an .npz archive with files, offsets, labels "
            "and class_names; copy it again"
        ) from error
    images: list[Tensor] = []
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        try:
            image = decode(files[start:end].tobytes())
            if images and image.shape != images[0].shape:
                raise ValueError("it is not as large as the others")
            images.append(image)
        except (OSError, ValueError) as error:
            raise DataError(
                f"image {i} of '{path}' is damaged ({error}); copy the archive again"
            ) from error
    return Archive(path, torch.stack(images), torch.from_numpy(labels.astype(np.int64)), names)


def _check_labels(labels: np.ndarray, offsets: np.ndarray, num_classes: int) -> None:
    if labels.dtype.kind not in "iu" or offsets.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype}, offsets {offsets.dtype}, not whole numbers")
    if len(labels) == 0 or len(offsets) != len(labels) + 1:
        raise ValueError(f"{len(labels)} labels and {len(offsets)} offsets")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels are {labels.min()} to {labels.max()}, {num_classes} class names")

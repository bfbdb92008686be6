"""The handwritten digits that scikit-learn brings along, made long-tailed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..settings.datasets import DIGITS_PER_CLASS as MAX_PER_CLASS

NUM_CLASSES = 10
TEST_PER_CLASS = 50


class LongTailData(NamedTuple):
    """Images are float32 (n, 1, 8, 8) from -1 to 1, targets int64 (n,)."""

    train_images: Tensor
    train_targets: Tensor
    test_images: Tensor
    test_targets: Tensor
    counts: list[int]  # training images per class


def long_tail_counts(n_max: int, imbalance_factor: float, num_classes: int) -> list[int]:
    """n_k = int(n_max IF^(-k / (K - 1))), falling from n_max to n_max / IF.

    Raises ValueError where the last class would be empty.
    """
    if not 1 <= imbalance_factor <= n_max:
        raise ValueError(
            f"imbalance_factor is {imbalance_factor!r}, expected 1 to {n_max}, the images of the "
            "largest class"
        )
    last = max(num_classes - 1, 1)
    # The tiny term keeps a whole number from being rounded to just below itself.
    return [int(n_max * imbalance_factor ** (-k / last) + 1e-9) for k in range(num_classes)]


def split_rows(
    targets: Tensor, test_per_class: int, counts: Sequence[int], seed: int
) -> tuple[Tensor, Tensor]:
    """Rows for training and for testing: int64 (sum of counts,) and (K test_per_class,).

    The test rows are drawn first, the same number for every class; the training rows are
    drawn from what is left, counts[k] of class k. `targets` holds integer labels (n,). Raises
    ValueError where a class has too few rows.
    """
    shuffle = torch.Generator().manual_seed(seed)
    train, test = [], []
    for k, count in enumerate(counts):
        rows = (targets == k).nonzero().squeeze(1)
        if len(rows) < test_per_class + count:
            raise ValueError(
                f"class {k} has {len(rows)} rows, expected at least {test_per_class + count}: "
                f"{test_per_class} for the test and {count} for training"
            )
        rows = rows[torch.randperm(len(rows), generator=shuffle)]
        test.append(rows[:test_per_class])
        train.append(rows[test_per_class : test_per_class + count])
    return torch.cat(train), torch.cat(test)


def read() -> tuple[Tensor, Tensor]:
    """Pixels uint8 (1797, 8, 8), from 0 to 16, and digits int64 (1797,). Needs scikit-learn."""
    from sklearn.datasets import load_digits

    source = load_digits()
    return torch.from_numpy(source.images).byte(), torch.from_numpy(source.target).long()


def load(imbalance_factor: float, seed: int) -> LongTailData:
    """Long-tailed training digits and a balanced test set of 50 digits a class.

    Which images are in which set depends on `seed` alone. Needs scikit-learn.
    """
    pixels, targets = read()
    images = pixels.float().unsqueeze(1) / 8 - 1
    counts = long_tail_counts(MAX_PER_CLASS, imbalance_factor, NUM_CLASSES)
    train, test = split_rows(targets, TEST_PER_CLASS, counts, seed)
    return LongTailData(images[train], targets[train], images[test], targets[test], counts)

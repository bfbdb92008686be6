"""Accuracy of a model on images, with and without the flip average."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data.images import DataError, Images
from ..metrics import BORDERS, group_accuracies, shares
from .ranks import ALONE, Ranks

BATCH_SIZE = 500  # images of a rank


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Images,
    counts: Sequence[int],
    borders: tuple[int, int] = BORDERS,
    ranks: Ranks = ALONE,
    between: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """{"plain": groups, "flip": groups} as run_directory.py describes them, in %.

    "flip" averages the logits of an image and of its mirror image, as the authors' code does, where
    `images.mirrored`, and is "plain" elsewhere. The model runs in eval mode, in its own dtype, and
    its mode is left as it was. Every rank tests its share, and all call `between` after every
    batch. Raises DataError where no image of a class could be read.
    """
    hits = torch.zeros(3, len(counts), dtype=torch.float64, device=ranks.device)
    with in_eval_mode(model):
        for x, targets, counted in ranks.agreed(_batches(images, ranks)):
            logits = model(x)
            averaged = logits + model(x.flip(3)) if images.mirrored else logits
            for i, right in enumerate(
                (counted, logits.argmax(dim=1) == targets, averaged.argmax(dim=1) == targets)
            ):
                hits[i] += torch.bincount(targets[right & counted], minlength=len(counts))
            between()
    rows, plain, flip = ranks.sum_(hits).cpu()
    if not rows.all():
        k = int((rows == 0).nonzero()[0])
        raise DataError(
            f"no image of class {k} could be read for testing, expected at least one; see "
            "--test-list and --validation-list"
        )
    return {
        name: {"per_class": accuracy, **group_accuracies(accuracy, counts, borders)}
        for name, accuracy in (("plain", shares(plain, rows)), ("flip", shares(flip, rows)))
    }


def _batches(images: Images, ranks: Ranks) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, targets and which rows count, (b,) bool, on the rank's device.

    Every rank gets as many batches: what is missing is filled with rows that do not count.
    """
    n = len(images)
    order = torch.arange(-(-n // ranks.world) * ranks.world).split(BATCH_SIZE * ranks.world)
    found = images.batches([rows % n for rows in order], part=ranks.part, device=ranks.device)
    for rows, (x, targets) in zip(order, found):
        # Fewer images than rows: corrupt ones were left out.
        whole = len(rows[ranks.part]) == len(targets)
        counted = rows[ranks.part] < n if whole else torch.ones_like(targets).bool()
        yield x, targets.to(ranks.device), counted.to(ranks.device)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside the block every module of `model` is in eval mode; afterwards as it was."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True

"""Accuracy of a model on images, with and without the flip average."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data.images import DataError, Images
from ..metrics import BORDERS, confusion_rows, group_accuracies, shares
from .ranks import ALONE, Ranks

BATCH_SIZE = 500  # images of a rank
CONFUSION_UP_TO = 100  # classes; what is taken for what of more would be most of a result


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Images,
    counts: Sequence[int],
    borders: tuple[int, int] = BORDERS,
    ranks: Ranks = ALONE,
    between: Callable[[], None] = lambda: None,
    confusion: bool = False,
) -> dict[str, dict[str, Any]]:
    """{"plain": groups, "flip": groups} as run_directory.py describes them, in %.

    With `confusion`, and at most CONFUSION_UP_TO classes, each says what was taken for what.

    "flip" averages the logits of an image and of its mirror image, as the authors' code does, where
    `images.mirrored`, and is "plain" elsewhere. The model runs in eval mode, in its own dtype, and
    its mode is left as it was. Every rank tests its share, and all call `between` after every
    batch. Raises DataError where no image of a class could be read.
    """
    classes = len(counts)
    seen = torch.zeros(classes, dtype=torch.float64, device=ranks.device)
    # By the view, and then by the class: right ones, or with `confusion` every class taken for it.
    wide = classes if confusion and classes <= CONFUSION_UP_TO else 1
    hits = torch.zeros(2, classes * wide, dtype=torch.float64, device=ranks.device)
    with in_eval_mode(model):
        for x, targets, counted in ranks.agreed(_batches(images, ranks)):
            logits = model(x)
            averaged = logits + model(x.flip(3)) if images.mirrored else logits
            seen += torch.bincount(targets[counted], minlength=classes)
            for i, predicted in enumerate((logits.argmax(dim=1), averaged.argmax(dim=1))):
                rows = counted if wide > 1 else counted & (predicted == targets)
                cells = targets * wide + (predicted if wide > 1 else 0)
                hits[i] += torch.bincount(cells[rows], minlength=hits.shape[1])
            between()
    seen = ranks.sum_(seen).cpu()
    if not seen.all():
        k = int((seen == 0).nonzero()[0])
        raise DataError(
            f"no image of class {k} could be read for testing, expected at least one; see "
            "--test-list and --validation-list"
        )
    tested: dict[str, dict[str, Any]] = {}
    for view, cells in zip(("plain", "flip"), ranks.sum_(hits).cpu().view(2, classes, wide)):
        accuracy = shares(cells.diagonal() if wide > 1 else cells[:, 0], seen)
        tested[view] = {"per_class": accuracy, **group_accuracies(accuracy, counts, borders)}
        if wide > 1:
            tested[view]["confusion"] = confusion_rows(cells)
    return tested


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

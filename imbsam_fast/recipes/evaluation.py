"""Accuracy of a model on images, with and without the flip average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .image_data import Images
from .metrics import group_accuracies, per_class_accuracy

BATCH_SIZE = 500


@torch.no_grad()
def evaluate(
    model: nn.Module, images: Images, counts: Sequence[int], borders: tuple[int, int]
) -> dict[str, dict[str, Any]]:
    """{"plain": groups, "flip": groups} as run_directory.py describes them, in %.

    "flip" averages the logits of an image and of its mirror image, as the authors' code does. The
    model runs in eval mode, in its own dtype, and its mode is left as it was.
    """
    plain, flip = [], []
    order = torch.arange(len(images)).split(BATCH_SIZE)
    with in_eval_mode(model):
        for x, _ in images.batches(order):
            logits, mirrored = model(x), model(x.flip(3))
            plain.append(logits.argmax(dim=1))
            flip.append((logits + mirrored).argmax(dim=1))
    return {
        "plain": _groups(torch.cat(plain).cpu(), images.targets, counts, borders),
        "flip": _groups(torch.cat(flip).cpu(), images.targets, counts, borders),
    }


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


def _groups(
    predictions: Tensor, targets: Tensor, counts: Sequence[int], borders: tuple[int, int]
) -> dict[str, Any]:
    per_class = per_class_accuracy(predictions, targets, len(counts))
    return {"per_class": per_class, **group_accuracies(per_class, counts, borders)}

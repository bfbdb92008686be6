"""Sums over the steps of an epoch: its losses and how many rows were right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("rows", "loss", "head", "head_rows", "tail", "tail_rows", "right")


class EpochSums:
    """Sums over the images of an epoch, kept on the device so that no step waits for it.

    Args:
        tail: bool (K,), which classes are tail.
        device: where logits will be.
    """

    def __init__(self, tail: Tensor, device: torch.device) -> None:
        self.tail = tail.to(device)
        self.values = torch.zeros(len(NAMES), dtype=torch.float64, device=device)
        self.seconds = 0.0

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """One step: its loss (), logits (b, K) and labels (b,), before the update."""
        targets = targets.to(logits.device, non_blocking=True)
        losses = F.cross_entropy(logits.float(), targets, reduction="none").double()
        tail = self.tail[targets].double()
        self.values += torch.stack(
            [
                torch.full_like(loss, len(targets), dtype=torch.float64),
                loss.double() * len(targets),
                (losses * (1 - tail)).sum(),
                (1 - tail).sum(),
                (losses * tail).sum(),
                tail.sum(),
                (logits.argmax(dim=1) == targets).double().sum(),
            ]
        )

    def means(self) -> dict[str, float | None]:
        """loss, head and tail (mean cross-entropy of an image) and train_accuracy in %.

        None where there was no such image.
        """
        sums = dict(zip(NAMES, self.values.tolist()))

        def mean(name: str, rows: str) -> float | None:
            return sums[name] / sums[rows] if sums[rows] else None

        right = mean("right", "rows")
        return {
            "loss": mean("loss", "rows"),
            "head": mean("head", "head_rows"),
            "tail": mean("tail", "tail_rows"),
            "train_accuracy": None if right is None else 100 * right,
        }

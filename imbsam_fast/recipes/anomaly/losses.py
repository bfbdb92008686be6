"""The losses of the two detectors, one value a row, as split_loss takes them.

Labels are 1 for a labelled anomaly and 0 for every other row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]

MARGIN = 5.0  # of the deviation loss, in standard deviations
REFERENCE_SCORES = 5000  # draws from N(0, 1) that stand for the scores of normal rows


def squared_distance(codes: Tensor, centre: Tensor) -> Tensor:
    """||code - centre||^2 of each row: codes (N, D), centre (D,), the result (N,)."""
    return (codes - centre).square().sum(dim=1)


def deepsad_loss(centre: Tensor, eta: float = 1.0, epsilon: float = 1e-6) -> PerSampleLoss:
    """Deep SAD (Ruff et al., ICLR 2020, Eq. 7): d for an unlabelled row, eta / (d + epsilon)
    for a labelled anomaly, with d the squared distance from `centre`.
    """

    def loss(codes: Tensor, labels: Tensor) -> Tensor:
        distance = squared_distance(codes, centre)
        return torch.where(labels == 0, distance, eta / (distance + epsilon))

    return loss


def deviation_loss(mean: float, std: float, margin: float = MARGIN) -> PerSampleLoss:
    """DevNet (Pang et al., KDD 2019, Eq. 6-7): with dev = (score - mean) / std, |dev| for an
    unlabelled row and max(0, margin - dev) for a labelled anomaly.
    """

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        deviation = (scores - mean) / std
        return torch.where(labels == 0, deviation.abs(), (margin - deviation).clamp(min=0))

    return loss

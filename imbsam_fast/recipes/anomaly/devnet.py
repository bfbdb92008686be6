"""DevNet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .detector import LARGE, Detector
from .losses import REFERENCE_SCORES, PerSampleLoss, deviation_loss
from .networks import Scorer
from .training import balanced_batches


@dataclass(kw_only=True, repr=False, eq=False)
class DevNet(Detector):
    """Deviation networks (Pang et al., KDD 2019), with ADBench's network of one hidden layer.

    The score of an unlabelled row is drawn to the mean of 5,000 draws from N(0, 1), that of a
    labelled anomaly to 5 of their standard deviations above it. Batches hold unlabelled rows and
    anomalies in turn, drawn with replacement, so half of the rows are tail. No layer looks at
    other rows, so both plans are exact; plan "auto" is the joint plan, which has fewer passes.

    Args:
        batches_per_epoch: how many batches make an epoch.
        l2: coefficient of the squared weights of the hidden layer in the loss.
        Others: see `Detector`.
    """

    batches_per_epoch: int = 20
    l2: float = 0.01

    def _initial_network(self, rows: Tensor) -> nn.Module:
        return self._seeded(lambda: self._make_network(rows.shape[1]))

    def _make_loss(self, rows: Tensor) -> PerSampleLoss:
        generator = torch.Generator().manual_seed(int(self.random_state))
        scores = torch.randn(REFERENCE_SCORES, generator=generator)
        return deviation_loss(scores.mean().item(), scores.std(correction=0).item())

    @property
    def _default_lr(self) -> dict[str, float]:
        return {"sgd": 1e-3, "adam": 1e-3, "rmsprop": 1e-3}

    def _make_network(self, features: int) -> Scorer:
        return Scorer(features)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        decayed = self.network_.get_parameter("hidden.weight")
        others = [p for p in self.network_.parameters() if p is not decayed]
        return [
            {"params": [decayed], "weight_decay": 2 * self.l2},  # the gradient of l2 w^2
            {"params": others, "weight_decay": 0.0},
        ]

    def _loss_state(self) -> dict[str, Any]:
        return {}

    def _load_loss_state(self, state: dict[str, Any]) -> None:
        pass

    def _epoch(self, labels: Tensor, generator: torch.Generator) -> list[Tensor]:
        return balanced_batches(labels, self.batch_size, self.batches_per_epoch, generator)

    def _to_scores(self, outputs: Tensor) -> Tensor:
        return outputs

    def _checked_labels(self, y: Any, rows: int) -> Tensor:
        labels = super()._checked_labels(y, rows)
        if not labels.any():
            raise ValueError("y holds only 0, expected at least one labelled anomaly for DevNet")
        return labels

    def _ranges(self) -> Iterator[tuple[str, float, float, type]]:
        yield from super()._ranges()
        yield from (("batches_per_epoch", 1, LARGE, int), ("l2", 0, LARGE, float))

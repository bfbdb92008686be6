"""DeepSAD."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .detector import LARGE, SMALL, Detector
from .losses import PerSampleLoss, deepsad_loss, squared_distance
from .networks import Decoder, Encoder
from .training import shuffled_batches


@dataclass(kw_only=True, repr=False, eq=False)
class DeepSAD(Detector):
    """Deep semi-supervised anomaly detection (Ruff et al., ICLR 2020), with ADBench's network.

    Rows are drawn to a centre in a space of ten dimensions and labelled anomalies pushed away
    from it; the score is the squared distance. The encoder starts from an autoencoder trained
    with Adam on all rows; the centre is the mean of its codes. The network has BatchNorm, so
    its rows influence each other and plan "auto" is the joint plan.

    Args:
        eta: factor on the loss of labelled anomalies in Deep SAD's objective.
        pretrain_epochs: of the autoencoder; 0 starts from random weights.
        pretrain_lr: Adam's learning rate for the autoencoder.
        weight_decay: for encoder and autoencoder.
        Others: see `Detector`.
    """

    eta: float = 1.0
    pretrain_epochs: int = 100
    pretrain_lr: float = 1e-3
    weight_decay: float = 1e-6

    def fit(self, X: Any, y: Any, encoder: Encoder | None = None) -> DeepSAD:
        """As `Detector.fit`; `encoder`, from `pretrain` of the same X with the same settings and
        random_state, saves the time of training another. It is copied.
        """
        if encoder is None:
            return super().fit(X, y)  # type: ignore[return-value]

        def copied(rows: Tensor) -> nn.Module:
            network = self._make_network(rows.shape[1])
            network.load_state_dict(encoder.state_dict())
            return network

        return self._fit(X, y, copied)  # type: ignore[return-value]

    def pretrain(self, X: Any) -> Encoder:
        """The encoder that `fit` of features X (n, F) would start from; leaves no trace here."""
        self._check_params()
        features = self._checked_features(X, fitting=True)
        twin = type(self)(**self.get_params())
        twin._set_scale(features)
        return twin._initial_network(twin._scaled(features))

    def _initial_network(self, rows: Tensor) -> Encoder:
        features = rows.shape[1]
        encoder, decoder = self._seeded(lambda: (Encoder(features), Decoder(features)))
        autoencoder = nn.Sequential(encoder, decoder).train()
        adam = torch.optim.Adam(
            autoencoder.parameters(),
            self.pretrain_lr,
            weight_decay=self.weight_decay,
            fused=True,  # a third of Adam's time with networks so small
        )
        order = torch.Generator().manual_seed(int(self.random_state))
        for _ in range(self.pretrain_epochs):
            for batch in shuffled_batches(len(rows), self.batch_size, order):
                loss = F.mse_loss(autoencoder(rows[batch]), rows[batch])
                adam.zero_grad()
                loss.backward()
                adam.step()
        adam.zero_grad()  # a training step refuses gradients that are not its own
        return encoder

    def _make_loss(self, rows: Tensor) -> PerSampleLoss:
        self.centre_ = _centre(self.network_, rows)
        return deepsad_loss(self.centre_, self.eta)

    @property
    def _default_lr(self) -> dict[str, float]:
        return {"sgd": 1e-3, "adam": 1e-4, "rmsprop": 1e-4}

    def _make_network(self, features: int) -> Encoder:
        return Encoder(features)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.network_.parameters()), "weight_decay": self.weight_decay}]

    def _loss_state(self) -> dict[str, Any]:
        return {"centre": self.centre_}

    def _load_loss_state(self, state: dict[str, Any]) -> None:
        self.centre_ = state["centre"]

    def _epoch(self, labels: Tensor, generator: torch.Generator) -> list[Tensor]:
        return shuffled_batches(len(labels), self.batch_size, generator)

    def _to_scores(self, outputs: Tensor) -> Tensor:
        return squared_distance(outputs, self.centre_)

    def _check_params(self) -> None:
        super()._check_params()
        if self.plan == "split":
            raise ValueError(
                "plan is 'split', expected auto or joint for DeepSAD: its BatchNorm cannot "
                "normalise the one or two anomalies of a batch by themselves"
            )

    def _ranges(self) -> Iterator[tuple[str, float, float, type]]:
        yield from super()._ranges()
        yield from (
            ("eta", SMALL, LARGE, float),
            ("pretrain_epochs", 0, LARGE, int),
            ("pretrain_lr", SMALL, LARGE, float),
            ("weight_decay", 0, LARGE, float),
        )


@torch.no_grad()
def _centre(network: nn.Module, rows: Tensor, least: float = 0.1) -> Tensor:
    """The mean code of `rows` in eval mode, with every coordinate at least `least` from zero.

    A unit whose target is zero can be satisfied by zero weights.
    """
    mean = network.eval()(rows).mean(dim=0)
    return torch.where(mean.abs() < least, torch.full_like(mean, least).copysign(mean), mean)

"""The networks of the two detectors, as ADBench has them for feature vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = (100, 20)
CODE = 10
SCORER_HIDDEN = 20


class _Block(nn.Module):
    """Linear, BatchNorm, LeakyReLU. Neither layer has a bias or a scale of its own.

    With a bias DeepSAD's network could map every row to the centre.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.norm = nn.BatchNorm1d(outputs, eps=1e-4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.linear(x)))


class Encoder(nn.Sequential):
    """DeepSAD's network: features (N, F) to codes (N, 10), by way of 100 and 20 units."""

    def __init__(self, features: int) -> None:
        super().__init__(
            _Block(features, HIDDEN[0]),
            _Block(*HIDDEN),
            nn.Linear(HIDDEN[1], CODE, bias=False),
        )


class Decoder(nn.Sequential):
    """The mirror image of Encoder, ending in a sigmoid: codes (N, 10) to features in 0 .. 1."""

    def __init__(self, features: int) -> None:
        super().__init__(
            _Block(CODE, HIDDEN[1]),
            _Block(*reversed(HIDDEN)),
            nn.Linear(HIDDEN[0], features, bias=False),
            nn.Sigmoid(),
        )


class Scorer(nn.Module):
    """DevNet's network: features (N, F) to scores (N,), by way of 20 rectified units.

    Weights start as in the Keras original: Glorot's uniform distribution, biases zero.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, SCORER_HIDDEN)
        self.score = nn.Linear(SCORER_HIDDEN, 1)
        for layer in (self.hidden, self.score):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, D) to scores (N,)."""
        return self.score(torch.relu(self.hidden(x))).squeeze(1)

"""What long-tailed training minimises besides cross-entropy, one value a row for split_loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..settings.config import RunConfig


class LogitAdjusted(nn.Module):
    """Cross-entropy of logits + tau log(p), p_k = n_k / sum(n) being the share of class k.

    Logit adjustment: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, Eq. 10.
    With tau = 1 it is the balanced softmax of Ren et al., "Balanced meta-softmax for long-tailed
    visual recognition", NeurIPS 2020: the sum of the n_k cancels. Tests take the logits as they
    are.

    Args:
        counts: n, the training images of each class (K,), all above 0.
        tau: strength; 0 is cross-entropy.
    """

    adjustment: Tensor  # (K,), float32

    def __init__(self, counts: Sequence[int], tau: float = 1.0) -> None:
        super().__init__()
        n = torch.tensor(counts, dtype=torch.float64)
        self.register_buffer("adjustment", (tau * (n / n.sum()).log()).float())

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (N, K) and labels (N,) to the rows' losses (N,)."""
        return F.cross_entropy(logits + self.adjustment, targets, reduction="none")


def row_losses(config: RunConfig, counts: Sequence[int]) -> nn.Module:
    """`config.loss`, on the device of the run: logits (N, K) and labels (N,) to losses (N,)."""
    if config.loss == "ce":
        return nn.CrossEntropyLoss(reduction="none")
    return LogitAdjusted(counts, config.tau).to(config.device)

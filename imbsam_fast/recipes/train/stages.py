"""The stages of the methods CE, WB and LWS, and what each does to the network.

CE has one stage. WB (weight balancing, Alshammari et al., CVPR 2022) and LWS (learnable weight
scaling, Kang et al., ICLR 2020) have a second one, in which the features are frozen, with their
BatchNorm statistics, and only the classifier changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..models.registry import classifier, replace_module
from ..settings.config import RunConfig

# The share of the way from the smallest to the largest initial norm at which WB's cap lies.
MAX_NORM_SHARE = 0.1


class ScaledClassifier(nn.Module):
    """LWS: the logits of `linear`, bias included, times one scale a class, initially 1."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.scale = nn.Parameter(torch.ones_like(linear.weight[:, 0]))

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, F) to logits (N, K)."""
        return self.linear(features) * self.scale


@dataclass(frozen=True)
class Stage:
    """A part of a run with one optimizer and one schedule."""

    name: str  # "train", "classifier" (WB) or "scales" (LWS)
    config: RunConfig  # with the lr, weight decay, batch size and epochs of this stage
    first_epoch: int  # epochs of the run before it

    @property
    def end(self) -> int:
        """The epoch after the last one."""
        return self.first_epoch + self.config.epochs

    @property
    def trains_features(self) -> bool:
        """Whether the whole network is trained, not only its classifier."""
        return self.name == "train"

    def prepare(self, model: nn.Module) -> None:
        """Leave trainable what the stage trains; LWS puts its scales around the classifier."""
        if self.trains_features:
            return
        linear = classifier(model)
        trained: nn.Module = linear
        if self.name == "scales":
            trained = ScaledClassifier(linear)
            replace_module(model, linear, trained)
        model.requires_grad_(False)
        if isinstance(trained, ScaledClassifier):
            trained.scale.requires_grad_(True)
        else:
            trained.requires_grad_(True)

    def class_weight(self, counts: Sequence[int]) -> Tensor | None:
        """(K,), WB's class-balanced loss; None where every class counts alike."""
        return class_balanced(counts, self.config.beta) if self.name == "classifier" else None

    def order(self, targets: Tensor, num_classes: int, random: torch.Generator) -> Tensor:
        """The rows of an epoch, int64 (n,): shuffled, or for LWS drawn class-aware."""
        if self.name == "scales":
            return class_aware(targets, num_classes, random)
        return torch.randperm(len(targets), generator=random)


def stages_of(config: RunConfig) -> list[Stage]:
    """The stages of `config.method`; the first is left out where another run made it."""
    stages = []
    if not config.stage1:
        stages.append(Stage("train", config, 0))
    if config.method != "ce":
        second = replace(
            config,
            epochs=config.stage2_epochs,
            warmup_epochs=0,
            lr=config.stage2_lr,
            weight_decay=config.stage2_weight_decay,
            batch_size=config.stage2_batch_size,
        )
        name = "classifier" if config.method == "wb" else "scales"
        stages.append(Stage(name, second, stages[-1].end if stages else 0))
    return stages


def class_balanced(counts: Sequence[int], beta: float) -> Tensor:
    """(1 - beta) / (1 - beta^n_k), scaled to a mean of 1 (Cui et al., CVPR 2019), float32 (K,)."""
    n = torch.tensor(counts, dtype=torch.float64)
    weights = (1 - beta) / (1 - beta**n)
    return (weights / weights.mean()).float()


def class_aware(targets: Tensor, num_classes: int, random: torch.Generator) -> Tensor:
    """As many rows as there are, int64 (n,): a class uniformly, then one of its rows.

    Classes without rows are left out.
    """
    counts = torch.bincount(targets, minlength=num_classes)
    by_class = targets.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    present = counts.nonzero().squeeze(1)
    drawn = present[torch.randint(len(present), (len(targets),), generator=random)]
    within = torch.rand(len(targets), dtype=torch.float64, generator=random) * counts[drawn]
    return by_class[starts[drawn] + within.long()]


def norm_cap(linear: nn.Linear) -> float:
    """WB's cap on the norm of a class's weights: min + 0.1 (max - min) of the norms now."""
    norms = linear.weight.detach().norm(dim=1)
    low, high = float(norms.min()), float(norms.max())
    return low + MAX_NORM_SHARE * (high - low)


@torch.no_grad()
def project_norms(linear: nn.Linear, cap: float) -> None:
    """Shorten the weights (K, features) of every class to a norm of at most `cap`."""
    norms = linear.weight.norm(dim=1, keepdim=True).clamp(min=1e-12)
    linear.weight.mul_((cap / norms).clamp(max=1))

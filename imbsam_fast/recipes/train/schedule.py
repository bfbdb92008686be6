"""The learning rate: linear warm-up, then a cosine to zero, a value a step."""

from __future__ import annotations

import math

import torch


def place_lr(optimizer: torch.optim.Optimizer, device: torch.device | None) -> None:
    """Learning rates as tensors on `device`, where a CUDA graph reads them; None: as numbers."""
    for group in optimizer.param_groups:
        lr = float(group["lr"])
        group["lr"] = lr if device is None else torch.tensor(lr, device=device)
        group.setdefault("initial_lr", lr)  # a scheduler's: it computes on the host


def cosine_with_warmup(
    optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Step i of `steps` has lr (i + 1) / warmup_steps, from there lr (1 + cos(pi t)) / 2.

    t goes from 0 at the first step after the warm-up to 1 after the last step.
    """

    def factor(i: int) -> float:
        if i < warmup_steps:
            return (i + 1) / warmup_steps
        t = (i - warmup_steps) / max(steps - warmup_steps, 1)
        return (1 + math.cos(math.pi * min(t, 1))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

"""A small network, its batches and its optimizer for the tests of TrainStep."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from imbsam_fast import ImbSAM

COUNTS = [500, 300, 200, 150, 120, 100, 50, 20, 10, 5]  # eta = 100: five head, five tail
LR, MOMENTUM, WEIGHT_DECAY, RHO = 0.05, 0.9, 5e-3, 0.05


def network(norm: str = "batch", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    norms = {"batch": nn.BatchNorm2d(8), "group": nn.GroupNorm(2, 8), "none": nn.Identity()}
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        norms[norm],
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    ).to(dtype)


def batches(steps: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    """Random images; every fifth batch has no tail row, every seventh no head row."""
    generator = torch.Generator().manual_seed(1)
    for i in range(steps):
        images = torch.randn(16, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
        low, high = (0, 5) if i % 5 == 4 else (5, 10) if i % 7 == 6 else (0, 10)
        yield images, torch.randint(low, high, (16,), generator=generator)


def imbsam(model: nn.Module, **settings) -> ImbSAM:
    base = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
    return ImbSAM(base, rho=RHO, **settings)


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values())
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs)

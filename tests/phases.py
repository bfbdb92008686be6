"""Parameters, gradients and steps for the tests of ImbSAM."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy

SHAPES = [(4, 3, 3, 3), (4,), (7, 5), (1,), (33,)]


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype))
        for s in SHAPES
    ]


def gradients(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [p.detach() for p in parameters(dtype, seed + 100)]


def fill(params: list[nn.Parameter], grads: list[Tensor | None]) -> None:
    for p, g in zip(params, grads):
        p.grad = None if g is None else g.clone()


def one_step(optimizer: ImbSAM, params: list[nn.Parameter], step: int = 0) -> None:
    for phase, call in enumerate(
        (optimizer.first_step, optimizer.second_step, optimizer.third_step)
    ):
        fill(params, gradients(3 * step + phase, params[0].dtype))
        call()


def equal(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def snapshot(tensors: list) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def epsilon(grads: list[Tensor | None], rho: float) -> list[Tensor | None]:
    norm = torch.sqrt(sum(g.square().sum() for g in grads if g is not None))
    return [None if g is None else rho * g / norm for g in grads]


def classifier() -> tuple[nn.Module, SplitCrossEntropy, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    criterion = SplitCrossEntropy(ClassSplit.from_counts([500, 200, 50, 10]))
    return model, criterion, torch.randn(12, 6).double(), torch.arange(12) % 4

"""What imbsam-fast is compared with: the authors' released sequence, plain PyTorch losses.

Written for this package, operation by operation like the originals; the tests hold them to the
same weights and losses as ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import SplitLoss
from ..split import ClassSplit


class AuthorsSequence:
    """The optimizer operations of the authors' released code, with its three calls.

    bytes: 27n moved with the default torch.optim.SGD, 21n with SGD(fused=True), n the
    elements over all parameters: 2n to hold; 8n for the norm (1), the copy (2), the scaling (2)
    and theta + epsilon (3); 6n to restore and to add; 11n or 5n for SGD itself.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        rho: float = 0.05,
        held: Sequence[Tensor] | None = None,  # memory for the copies
        epsilon: Sequence[Tensor] | None = None,
    ) -> None:
        self.base = base
        self.rho = rho
        self.params: list[Tensor] = [p for group in base.param_groups for p in group["params"]]
        self.held, self.epsilon = (
            [torch.empty_like(p) for p in self.params] if memory is None else memory
            for memory in (held, epsilon)
        )

    @torch.no_grad()
    def first_step(self) -> None:
        """Copy the head gradient aside."""
        for p, held in zip(self.params, self.held):
            held.copy_(p.grad)  # type: ignore[arg-type]
        self.base.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Add epsilon to the weights, and keep it."""
        norm = torch.norm(torch.stack([torch.norm(p.grad) for p in self.params])) + 1e-16
        for p, epsilon in zip(self.params, self.epsilon):
            epsilon.copy_(p.grad)  # type: ignore[arg-type]
            epsilon.mul_(self.rho / norm)
            p.add_(epsilon)
        self.base.zero_grad()

    @torch.no_grad()
    def third_step(self) -> None:
        """Take epsilon off, add the head gradient, step."""
        for p, held, epsilon in zip(self.params, self.held, self.epsilon):
            p.sub_(epsilon)
            p.grad.add_(held)  # type: ignore[union-attr]
        self.base.step()
        self.base.zero_grad()


class BooleanMasking(nn.Module):
    """The authors' loss: one cross-entropy a row, head and tail rows picked by a mask."""

    def __init__(self, split: ClassSplit) -> None:
        super().__init__()
        self.is_tail = split.sharp > 0

    def forward(self, logits: Tensor, targets: Tensor) -> SplitLoss:
        """Logits (N, K) and labels (N,) to the two losses."""
        losses = F.cross_entropy(logits, targets, reduction="none")
        tail = self.is_tail[targets]
        return SplitLoss(losses[~tail].sum() / len(targets), losses[tail].sum() / len(targets))


class RowWeights(nn.Module):
    """The best plain formulation: one cross-entropy a row, weighted twice."""

    def __init__(self, split: ClassSplit) -> None:
        super().__init__()
        self.plain, self.sharp = split.plain.float(), split.sharp.float()

    def forward(self, logits: Tensor, targets: Tensor) -> SplitLoss:
        """Logits (N, K) and labels (N,) to the two losses."""
        losses = F.cross_entropy(logits, targets, reduction="none")
        head, tail = self.plain[targets] * losses, self.sharp[targets] * losses
        return SplitLoss(head.sum() / len(targets), tail.sum() / len(targets))


def authors_training_step(
    model: nn.Module, criterion: Callable[..., SplitLoss], optimizer: AuthorsSequence
) -> Callable[[Tensor, Tensor], None]:
    """The authors' training loop: every pass with all rows, 2 forwards and 3 backwards."""

    def step(inputs: Tensor, targets: Tensor) -> None:
        loss = criterion(model(inputs), targets)
        loss.head.backward(retain_graph=True)
        optimizer.first_step()
        loss.tail.backward()
        optimizer.second_step()
        criterion(model(inputs), targets).tail.backward()
        optimizer.third_step()

    return step


def plain_training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[Tensor, Tensor], None]:
    """One SGD step, the unit in which the others are counted."""

    def step(inputs: Tensor, targets: Tensor) -> None:
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step

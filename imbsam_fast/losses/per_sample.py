"""A criterion from any loss with one value a row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..split import ClassSplit
from ..validation import check_batch_size
from .parts import (
    Parts,
    SplitLoss,
    check_no_target_gradient,
    check_split,
    check_tensors,
    checked_ignore_index,
    checked_tail_weight,
    split_loss_of,
    target_parts,
)


class _SplitPerSampleLoss(nn.Module):
    def __init__(
        self, per_sample_loss: Callable, split: ClassSplit, tail_weight: float, ignore_index: int
    ) -> None:
        super().__init__()
        self.per_sample_loss = per_sample_loss
        self.split = split
        self.tail_weight = tail_weight
        self.ignore_index = ignore_index

    def forward(
        self, outputs: Tensor, targets: Tensor, batch_size: float | None = None
    ) -> SplitLoss:
        check_tensors(outputs=outputs, targets=targets)
        check_batch_size("batch_size", batch_size)
        _check_targets(targets)
        targets = targets.to(outputs.device, non_blocking=True)
        losses = self.per_sample_loss(outputs, targets)
        if not isinstance(losses, Tensor):
            raise TypeError(
                f"per_sample_loss returned {type(losses).__name__}, expected a tensor like targets"
            )
        if targets.is_floating_point():
            w, counted = self._of_distributions(targets, losses)
        else:
            w, counted = self._of_labels(targets, losses)
        b = counted.sum().clamp(min=1) if batch_size is None else batch_size
        head, tail = (torch.where(w == 0, 0, w * losses).flatten(1).sum(1) / b).unbind()
        return split_loss_of(head, tail, self.tail_weight)

    def parts(self, targets: Tensor) -> Parts:
        """Which rows of a batch have weight in which part."""
        _check_targets(targets)
        if not targets.is_floating_point():
            targets = targets.long()
        return target_parts(self.split, targets, self.ignore_index)

    def _of_labels(self, targets: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of both parts, (2, *targets.shape), and which labels count."""
        if losses.shape != targets.shape:
            raise ValueError(
                f"per_sample_loss returned shape {tuple(losses.shape)}, expected "
                f"{tuple(targets.shape)}: one loss a row, as with reduction='none'"
            )
        targets = targets.long()  # 8 bits would take -100 for 156
        counted = targets != self.ignore_index
        weights = self.split.weights(self.split.plain.shape[0], losses.device, losses.dtype)
        if self.split.num_classes is None:  # all labels have the weights of the only class
            return torch.stack(weights).view(2, *[1] * targets.dim()) * counted, counted
        # index_select, unlike indexing, refuses negative labels.
        flat = targets.where(counted, 0).flatten()
        w = torch.stack([part.index_select(0, flat) for part in weights])
        return w.view(2, *targets.shape) * counted, counted

    def _of_distributions(self, q: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of both parts, (2, N) or (2, 1, K), and which rows count."""
        if losses.shape not in (q.shape, q.shape[:1]):
            raise ValueError(
                f"per_sample_loss returned shape {tuple(losses.shape)}, expected "
                f"{tuple(q.shape[:1])}, one loss a row, or {tuple(q.shape)}, the terms of its "
                "classes"
            )
        weights = torch.stack(self.split.weights(q.shape[1], losses.device, losses.dtype))
        counted = (q != 0).any(1)
        if losses.dim() == 2:
            return weights.unsqueeze(1), counted
        return weights @ q.to(losses.dtype).t(), counted


def split_loss(
    per_sample_loss: Callable[[Tensor, Tensor], Tensor],
    split: ClassSplit,
    tail_weight: float = 1.0,
    ignore_index: int = -100,
) -> nn.Module:
    """A criterion from any loss with one value a row.

    Args:
        per_sample_loss: `(outputs, targets) -> losses`, with losses shaped like labels (N,) or
            (N, d1, ...). Of label distributions (N, K) it returns either the terms of the classes,
            (N, K), each weighed as its class is, or one loss a row, (N,), whose parts are then
            in the ratio of sum_k q_k plain_k and sum_k q_k sharp_k. A module's parameters are part
            of the criterion.
        split: the class weights, looked up with integer labels.
        tail_weight: factor on the tail part.
        ignore_index: rows with this target count neither in the sums nor in b; per_sample_loss
            still sees them, and must be finite there with a finite derivative, as torch's losses
            are: an infinite one times 0 is not a number. Of distributions, rows of zeros.
    """
    check_split(split)
    if not callable(per_sample_loss):
        raise TypeError(f"per_sample_loss is {per_sample_loss!r}, expected a callable")
    tail_weight = checked_tail_weight(tail_weight)
    return _SplitPerSampleLoss(
        per_sample_loss, split, tail_weight, checked_ignore_index(ignore_index)
    )


def _check_targets(targets: Tensor) -> None:
    check_no_target_gradient(targets)
    no_number = targets.is_complex() or targets.dtype == torch.bool
    dims = (2,) if targets.is_floating_point() else range(1, targets.dim() + 1)
    if no_number or targets.dim() not in dims:
        raise ValueError(
            f"targets is {targets.dtype} {tuple(targets.shape)}, expected integer labels (N,) or "
            "(N, d1, ...), or label distributions (N, K), whose classes the split weighs; for "
            "other targets write a criterion with .split that returns a SplitLoss"
        )

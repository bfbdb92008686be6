"""Criteria that return the head and the tail part of a batch's loss.

A criterion is anything with `split: ClassSplit` and
`__call__(outputs, targets, batch_size=None) -> SplitLoss`. `batch_size` is b of docs/design.md
section 2, for when only some rows of the batch are passed; without it b is the number of
rows that count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .kernels.arithmetic import arithmetic_dtype
from .split import ClassSplit
from .validation import check_batch_size, check_number, check_weights, check_whole_number


class SplitLoss(NamedTuple):
    """The two parts of a loss, scalars of one dtype."""

    head: Tensor  # 1/b sum_i plain[y_i] l_i
    tail: Tensor  # 1/b sum_i sharp[y_i] l_i

    @property
    def total(self) -> Tensor:
        """head + tail."""
        return self.head + self.tail


def check_split_loss(name: str, loss: object) -> None:
    """Refuse what has no head and tail, each a scalar tensor."""
    parts = [getattr(loss, part, None) for part in ("head", "tail")]
    if not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(f"{name} returned {type(loss).__name__}, expected a SplitLoss")
    for part, tensor in zip(("head", "tail"), parts):
        if tensor.dim() != 0:  # type: ignore[union-attr]
            shape = tuple(tensor.shape)  # type: ignore[union-attr]
            raise ValueError(f"{name} returned a {part} of shape {shape}, expected a scalar")


class SplitCrossEntropy(nn.Module):
    """Cross-entropy in its head and tail part, from one fused pass over the logits.

    Takes logits (N, K) in float32, float64, bfloat16 or float16 and int64 targets (N,);
    returns float32 losses (float64 for float64). With `ClassSplit.none()` and no class weight,
    the head part is `torch.nn.functional.cross_entropy`.

    Args:
        split: the class weights `plain` and `sharp`.
        weight: (K,) class weight inside the per-row loss, as in torch.nn.CrossEntropyLoss
            with reduction "none": the mean divides by the number of rows, not by the sum of
            their weights.
        label_smoothing: between 0 and 1, as in torch.nn.CrossEntropyLoss.
        ignore_index: rows with this target count neither in the sums nor in b.
        tail_weight: factor on the tail part (2 in the authors' released code).

    Raises ValueError for arguments out of range, IndexError for a target outside 0 .. K-1.
    """

    weight: Tensor | None

    def __init__(
        self,
        split: ClassSplit,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        tail_weight: float = 1.0,
    ) -> None:
        super().__init__()
        _check_split(split)
        smoothing = check_number(
            "label_smoothing", label_smoothing, "0 to 1", lambda x: 0 <= x <= 1
        )
        if weight is not None:
            check_weights("weight", weight)
            if split.num_classes not in (None, len(weight)):
                raise ValueError(
                    f"weight has {len(weight)} classes, expected {split.num_classes} as in split"
                )
        self.split = split
        self.register_buffer("weight", weight)
        self.label_smoothing = smoothing
        self.ignore_index = _checked_ignore_index(ignore_index)
        self.tail_weight = _checked_tail_weight(tail_weight)

    def forward(
        self, logits: Tensor, targets: Tensor, batch_size: float | None = None
    ) -> SplitLoss:
        """Logits (N, K) and int64 targets (N,) to the head and the tail loss."""
        _check_tensors(logits=logits, targets=targets)
        if logits.dim() != 2:
            raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (N, K)")
        dtype = arithmetic_dtype(logits.dtype)
        plain, sharp = self.split.weights(logits.shape[-1], logits.device, dtype)
        weight = None if self.weight is None else self.weight.to(logits.device, dtype)
        head, tail = ops.split_cross_entropy(
            logits,
            targets.to(logits.device, non_blocking=True),
            plain,
            sharp,
            weight,
            self.label_smoothing,
            self.ignore_index,
            batch_size,
        )
        return SplitLoss(head, tail if self.tail_weight == 1 else self.tail_weight * tail)

    def extra_repr(self) -> str:
        """The settings, for print(criterion)."""
        return (
            f"label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}, "
            f"tail_weight={self.tail_weight}"
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
        _check_tensors(outputs=outputs, targets=targets)
        check_batch_size("batch_size", batch_size)
        _check_labels(targets)
        targets = targets.to(outputs.device, non_blocking=True)
        losses = self.per_sample_loss(outputs, targets)
        if not isinstance(losses, Tensor):
            raise TypeError(
                f"per_sample_loss returned {type(losses).__name__}, expected a tensor like targets"
            )
        if losses.shape != targets.shape:
            raise ValueError(
                f"per_sample_loss returned shape {tuple(losses.shape)}, expected "
                f"{tuple(targets.shape)}: one loss a row, as with reduction='none'"
            )
        counted = targets != self.ignore_index
        any_number = self.split.num_classes is None
        labels = torch.zeros_like(targets) if any_number else targets.where(counted, 0)
        labels = labels.long()
        b = counted.sum().clamp(min=1) if batch_size is None else batch_size

        weights = self.split.weights(self.split.plain.shape[0], losses.device, losses.dtype)
        # Both parts at once, (2, N). index_select, unlike indexing, refuses negative labels.
        w = torch.stack([part.index_select(0, labels) for part in weights]) * counted
        head, tail = (torch.where(w == 0, 0, w * losses).sum(1) / b).unbind()
        return SplitLoss(head, tail if self.tail_weight == 1 else self.tail_weight * tail)


def split_loss(
    per_sample_loss: Callable[[Tensor, Tensor], Tensor],
    split: ClassSplit,
    tail_weight: float = 1.0,
    ignore_index: int = -100,
) -> nn.Module:
    """A criterion from any loss with one value a row.

    Args:
        per_sample_loss: `(outputs, targets) -> losses`, with losses shaped like targets (N,);
            a module's parameters are part of the criterion.
        split: the class weights, looked up with the integer labels `targets`.
        tail_weight: factor on the tail part.
        ignore_index: rows with this target count neither in the sums nor in b; per_sample_loss
            still sees them.
    """
    _check_split(split)
    if not callable(per_sample_loss):
        raise TypeError(f"per_sample_loss is {per_sample_loss!r}, expected a callable")
    tail_weight = _checked_tail_weight(tail_weight)
    return _SplitPerSampleLoss(
        per_sample_loss, split, tail_weight, _checked_ignore_index(ignore_index)
    )


def _check_tensors(**arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}, expected a tensor")


def _check_labels(targets: Tensor) -> None:
    not_labels = targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool
    if targets.dim() != 1 or not_labels:
        raise ValueError(
            f"targets is {targets.dtype} {tuple(targets.shape)}, expected integer labels (N,), "
            "whose classes the split weighs; for other targets write a criterion with .split that "
            "returns a SplitLoss"
        )


def _check_split(split: object) -> None:
    if not isinstance(split, ClassSplit):
        raise TypeError(f"split is {type(split).__name__}, expected a ClassSplit")


def _checked_tail_weight(tail_weight: float) -> float:
    return check_number(
        "tail_weight", tail_weight, "a finite number > 0", lambda x: 0 < x < float("inf")
    )


def _checked_ignore_index(ignore_index: int) -> int:
    return check_whole_number("ignore_index", ignore_index, "an integer")

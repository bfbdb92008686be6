"""Multi-label classification: every class is a yes or no of its own, and head or tail."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.arithmetic import arithmetic_dtype
from ..split import ClassSplit
from ..validation import check_batch_size
from .parts import (
    Parts,
    SplitLoss,
    check_class_weight,
    check_no_target_gradient,
    check_split,
    check_tensors,
    checked_tail_weight,
    split_loss_of,
)


class SplitBCEWithLogits(nn.Module):
    """Binary cross-entropy of K yes-or-no questions a row, in its head and tail part.

    The term of row i and class k, for a yes as for a no, counts plain[k] in the head and sharp[k]
    in the tail:

        head = 1/(b K) sum_i sum_k plain[k] l_ik,    tail = 1/(b K) sum_i sum_k sharp[k] l_ik

    so that with `ClassSplit.none()` the head is torch.nn.BCEWithLogitsLoss. Takes logits (N, K) in
    float32, float64, bfloat16 or float16 and targets (N, K), 0 to 1, of any dtype; returns float32
    losses (float64 for float64). Made of torch's operations.

    Every row has terms of every class, and so belongs to both parts: the split plan runs all rows
    in all of its passes, 3 SGD steps, and `plan="auto"` takes the joint one.

    Args:
        split: the class weights `plain` and `sharp`; the counts that they come from are those of
            each class's yes.
        weight, pos_weight: (K,) as in torch.nn.BCEWithLogitsLoss.
        tail_weight: factor on the tail part.
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        split: ClassSplit,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        tail_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_split(split)
        for name, w in (("weight", weight), ("pos_weight", pos_weight)):
            check_class_weight(name, w, split)
            self.register_buffer(name, w)
        self.split = split
        self.tail_weight = checked_tail_weight(tail_weight)

    def forward(
        self, logits: Tensor, targets: Tensor, batch_size: float | None = None
    ) -> SplitLoss:
        """Logits (N, K) and targets (N, K) to the head and the tail loss; `batch_size` is b."""
        check_tensors(logits=logits, targets=targets)
        check_batch_size("batch_size", batch_size)
        if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
            raise ValueError(
                f"logits is {logits.dtype} {tuple(logits.shape)}, expected floating point (N, K)"
            )
        _check_targets(targets)
        if targets.shape != logits.shape:
            raise ValueError(
                f"targets is {targets.dtype} {tuple(targets.shape)}, expected "
                f"{tuple(logits.shape)} as logits"
            )
        dtype = arithmetic_dtype(logits.dtype)
        weight, pos_weight = (
            None if w is None else w.to(logits.device, dtype)
            for w in (self.weight, self.pos_weight)
        )
        terms = F.binary_cross_entropy_with_logits(
            logits.to(dtype),
            targets.to(logits.device, dtype, non_blocking=True),
            weight,
            pos_weight=pos_weight,
            reduction="none",
        )
        b = max(len(logits), 1) if batch_size is None else batch_size
        w = torch.stack(self.split.weights(logits.shape[1], logits.device, dtype))
        of_classes = terms.sum(0)
        head, tail = (torch.where(w == 0, 0, w * of_classes).sum(1) / (b * w.shape[1])).unbind()
        return split_loss_of(head, tail, self.tail_weight)

    def parts(self, targets: Tensor) -> Parts:
        """All rows, in every part that there are classes of."""
        _check_targets(targets)
        plain, sharp = self.split.weights(targets.shape[1], targets.device, torch.float64)
        head, tail = (
            (weights > 0).any().expand(len(targets)).clone() for weights in (plain, sharp)
        )
        yes = targets.sum(0, dtype=torch.float64)
        total = float(yes.sum())
        share = float(yes[sharp > 0].sum()) / total if total else 0.0
        return Parts(head, tail, len(targets), share)

    def extra_repr(self) -> str:
        """The settings, for print(criterion)."""
        return f"tail_weight={self.tail_weight}"


def _check_targets(targets: Tensor) -> None:
    check_no_target_gradient(targets)
    if targets.dim() != 2 or targets.is_complex():
        raise ValueError(
            f"targets is {targets.dtype} {tuple(targets.shape)}, expected 0 to 1 for every class, "
            "(N, K)"
        )

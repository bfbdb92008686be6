"""Cross-entropy in its head and tail part: labels, label distributions, dense labels."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from ..kernels.arithmetic import arithmetic_dtype
from ..split import ClassSplit
from ..validation import check_number
from .parts import (
    Parts,
    SplitLoss,
    check_class_weight,
    check_no_target_gradient,
    check_split,
    check_tensors,
    checked_ignore_index,
    checked_tail_weight,
    split_loss_of,
    target_parts,
)


class SplitCrossEntropy(nn.Module):
    """Cross-entropy in its head and tail part, from one fused pass over the logits.

    Takes logits (N, K) in float32, float64, bfloat16 or float16 and one of

    - int64 labels (N,);
    - label distributions q (N, K) in any floating dtype, as of Mixup, CutMix or a teacher: class k
      has q_k of the row, and its part of the row's loss is weighed as class k is. A row belongs to
      both parts where q does. A row of zeros is an ignored one. q is read as the logits are;
      another dtype than float32 (float64 beside float64 logits) is converted first. It is not
      checked: not negative, rows that sum to 1;
    - with logits (N, K, d1, ...), int64 labels (N, d1, ...) or distributions (N, K, d1, ...), as in
      torch. Every position is a row, and b counts them. Logits whose classes lie side by side
      (channels_last images, `logits.transpose(1, 2)` of (N, T, K)) are read as they are, others are
      copied once, and so is their gradient.

    Returns float32 losses (float64 for float64). With `ClassSplit.none()` and no class weight,
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
        check_split(split)
        smoothing = check_number(
            "label_smoothing", label_smoothing, "0 to 1", lambda x: 0 <= x <= 1
        )
        check_class_weight("weight", weight, split)
        self.split = split
        self.register_buffer("weight", weight)
        self.label_smoothing = smoothing
        self.ignore_index = checked_ignore_index(ignore_index)
        self.tail_weight = checked_tail_weight(tail_weight)

    def forward(
        self, logits: Tensor, targets: Tensor, batch_size: float | None = None
    ) -> SplitLoss:
        """Logits and targets to the head and the tail loss; `batch_size` is b."""
        check_tensors(logits=logits, targets=targets)
        logits, targets = _as_rows(logits, targets)
        dtype = arithmetic_dtype(logits.dtype)
        plain, sharp = self.split.weights(logits.shape[-1], logits.device, dtype)
        weight = None if self.weight is None else self.weight.to(logits.device, dtype)
        if targets.is_floating_point():
            q = targets.to(logits.device, dtype, non_blocking=True)
            head, tail = ops.split_soft_cross_entropy(
                logits, q, plain, sharp, weight, self.label_smoothing, batch_size
            )
        else:
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
        return split_loss_of(head, tail, self.tail_weight)

    def parts(self, targets: Tensor) -> Parts:
        """Which rows of a batch have weight in which part."""
        return target_parts(self.split, targets, self.ignore_index)

    def extra_repr(self) -> str:
        """The settings, for print(criterion)."""
        return (
            f"label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}, "
            f"tail_weight={self.tail_weight}"
        )


def _as_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (rows, K) with their targets, every position of (N, K, d1, ...) a row."""
    shape = tuple(logits.shape)
    if len(shape) < 2:
        raise ValueError(f"logits has shape {shape}, expected (N, K) or (N, K, d1, ...)")
    is_soft = targets.is_floating_point()
    if is_soft:
        check_no_target_gradient(targets)
    expected = shape if is_soft else (shape[0], *shape[2:])
    if targets.shape != expected and (is_soft or len(shape) > 2):
        meant = ""
        if len(shape) == 3 and targets.shape == shape[:2]:
            meant = "; logits (N, T, K) go in as logits.transpose(1, 2), which copies nothing"
        raise ValueError(
            f"targets is {targets.dtype} {tuple(targets.shape)}, expected {expected} for logits "
            f"{shape}, which are (N, K{', d1, ...' if len(shape) > 2 else ''}){meant}"
        )
    if len(shape) == 2:
        return logits, targets
    rows = logits.movedim(1, -1).reshape(-1, shape[1])
    return rows, targets.movedim(1, -1).reshape(rows.shape) if is_soft else targets.reshape(-1)

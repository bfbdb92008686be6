"""The two parts of a loss, and which rows of a batch belong to which, from the targets alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..split import ClassSplit
from ..validation import check_number, check_weights, check_whole_number

LABELS = "int64 labels (N,)"
TARGETS = f"{LABELS} or (N, d1, ...), or label distributions (N, K) or (N, K, d1, ...)"


class SplitLoss(NamedTuple):
    """The two parts of a loss, scalars of one dtype."""

    head: Tensor  # 1/b sum_i plain[y_i] l_i
    tail: Tensor  # 1/b sum_i sharp[y_i] l_i

    @property
    def total(self) -> Tensor:
        """head + tail."""
        return self.head + self.tail


def split_loss_of(head: Tensor, tail: Tensor, tail_weight: float) -> SplitLoss:
    """The parts, with the factor on the tail."""
    return SplitLoss(head, tail if tail_weight == 1 else tail_weight * tail)


def check_split_loss(name: str, loss: object) -> None:
    """Refuse what has no head and tail, each a scalar tensor."""
    parts = [getattr(loss, part, None) for part in ("head", "tail")]
    if not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(f"{name} returned {type(loss).__name__}, expected a SplitLoss")
    for part, tensor in zip(("head", "tail"), parts):
        if tensor.dim() != 0:  # type: ignore[union-attr]
            shape = tuple(tensor.shape)  # type: ignore[union-attr]
            raise ValueError(f"{name} returned a {part} of shape {shape}, expected a scalar")


# ---------------------------------------------------------------- rows of the parts


class Parts(NamedTuple):
    """Which rows have weight in which part: bool (N,), on the targets' device."""

    head: Tensor
    tail: Tensor  # a row may be in both, or in none
    counted: int  # b: the rows that count, or with labels (N, d1, ...) the labels
    tail_share: float  # of the counted labels, or of their mass


def is_labels(targets: Tensor) -> bool:
    """Whether these are int64 labels (N,)."""
    return targets.dim() == 1 and targets.dtype == torch.int64


def parts_of(criterion: Any, targets: Tensor) -> Parts:
    """Of `criterion.parts`, or of labels (N,) where it has none."""
    own = getattr(criterion, "parts", None)
    if own is not None:
        return own(targets)
    if not is_labels(targets):
        raise ValueError(
            f"targets is {targets.dtype} {tuple(targets.shape)}, expected {LABELS}; for others the "
            f"criterion needs parts(targets), and {type(criterion).__name__} has none"
        )
    return label_parts(criterion.split, targets, getattr(criterion, "ignore_index", None))


def target_parts(split: ClassSplit, targets: Tensor, ignore_index: int | None) -> Parts:
    """Of labels or label distributions."""
    if targets.is_floating_point() and targets.dim() > 1:
        return distribution_parts(split, targets)
    if targets.dim() == 0 or targets.dtype != torch.int64:
        raise ValueError(f"targets is {targets.dtype} {tuple(targets.shape)}, expected {TARGETS}")
    return label_parts(split, targets, ignore_index)


def label_parts(split: ClassSplit, targets: Tensor, ignore_index: int | None) -> Parts:
    """A row is in a part if one of its counted labels is."""
    head, tail = split.plain_mask(targets), split.tail_mask(targets)
    if ignore_index is None:
        b, of_tail = targets.numel(), int(tail.count_nonzero())
    else:
        counted = targets != ignore_index
        head, tail = head & counted, tail & counted
        b, of_tail = numbers_of(counted, tail)
    share = of_tail / b if b else 0.0
    if targets.dim() > 1:
        head, tail = head.flatten(1).any(1), tail.flatten(1).any(1)
    return Parts(head, tail, b, share)


def numbers_of(*masks: Tensor) -> list[int]:
    """How many elements of each are True; the host waits for the device once."""
    if masks[0].device.type == "cpu":  # nothing to wait for, and a fifth of the time
        return [int(mask.count_nonzero()) for mask in masks]
    return torch.stack(masks).flatten(1).count_nonzero(1).tolist()


def distribution_parts(split: ClassSplit, q: Tensor) -> Parts:
    """A row is in a part if q is not 0 for one of its classes; without any it does not count."""
    plain, sharp = split.weights(q.shape[1], q.device, torch.float64)
    by_class = q.movedim(1, -1)  # (N, d1, ..., K)
    has = by_class != 0
    b = int(has.any(-1).sum())
    total = float(q.sum(dtype=torch.float64))
    of_tail = float((by_class * (sharp > 0)).sum(dtype=torch.float64))
    head, tail = ((has & (weights > 0)).flatten(1).any(1) for weights in (plain, sharp))
    return Parts(head, tail, b, of_tail / total if total else 0.0)


# ---------------------------------------------------------------- arguments of criteria


def check_tensors(**arguments: object) -> None:
    """Refuse what is no tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}, expected a tensor")


def check_no_target_gradient(targets: Tensor) -> None:
    """Refuse targets that would get a gradient: these losses have none for them."""
    if targets.requires_grad:
        raise ValueError("targets requires a gradient, expected none: detach it")


def check_split(split: object) -> None:
    """Refuse what is no ClassSplit."""
    if not isinstance(split, ClassSplit):
        raise TypeError(f"split is {type(split).__name__}, expected a ClassSplit")


def check_class_weight(name: str, weight: Tensor | None, split: ClassSplit) -> None:
    """Refuse a class weight inside the loss that is none of the split's classes."""
    if weight is None:
        return
    check_weights(name, weight)
    if split.num_classes not in (None, len(weight)):
        raise ValueError(
            f"{name} has {len(weight)} classes, expected {split.num_classes} as in split"
        )


def checked_tail_weight(tail_weight: float) -> float:
    """The factor on the tail part."""
    return check_number(
        "tail_weight", tail_weight, "a finite number > 0", lambda x: 0 < x < float("inf")
    )


def checked_ignore_index(ignore_index: int) -> int:
    """The label of what does not count."""
    return check_whole_number("ignore_index", ignore_index, "an integer")

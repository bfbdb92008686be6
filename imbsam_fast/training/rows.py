"""Which rows of a batch belong to which part, and how they are taken out and put together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .data_parallel import keep_in_step


class Rows(NamedTuple):
    """Which rows of a batch a plan needs in which pass, and how many count (b)."""

    head: Tensor  # bool (N,): rows of the head pass; the ones with no weight at all included
    tail: Tensor  # bool (N,): rows with sharp > 0
    head_rows: int
    tail_rows: int
    counted: int | None  # None: the criterion counts them itself
    tail_share: float | None = None  # of the counted rows; None where nobody looked


def rows_of(criterion: Any, targets: Tensor, same_passes: bool) -> Rows:
    """From the labels alone, on their device.

    `same_passes` adds a row of weight zero to a part that other ranks may have rows of.
    """
    ignore_index = getattr(criterion, "ignore_index", None)
    if ignore_index is None:
        counted = torch.ones_like(targets, dtype=torch.bool)
    else:
        counted = targets != ignore_index
    tail = criterion.split.tail_mask(targets) & counted
    head = (criterion.split.plain_mask(targets) & counted) | ~tail
    b, tail_rows = int(counted.sum()), int(tail.sum())
    share = tail_rows / b if b else 0.0
    if same_passes:
        keep_in_step(head, tail, criterion.split)
        tail_rows = int(tail.sum())
    return Rows(head, tail, int(head.sum()), tail_rows, b, share)


def take_rows(mask: Tensor, inputs: Any, targets: Tensor) -> tuple[Any, Tensor]:
    """The rows of a batch where `mask` is set, in its order and memory format."""
    if mask.all():
        return inputs, targets
    rows = mask.nonzero().squeeze(1)

    def take(x: Tensor) -> Tensor:
        index = rows.to(x.device, non_blocking=True)
        if x.requires_grad:
            raise ValueError("inputs requires a gradient, expected none; detach it")
        if x.layout != torch.strided:
            return x.index_select(0, index)
        # Like x, so that channels_last images stay channels_last.
        return torch.index_select(x, 0, index, out=torch.empty_like(x[: rows.shape[0]]))

    return pytree.tree_map_only(Tensor, take, inputs), targets[rows]


def assemble(rows: Rows, of_head: Any, of_tail: Any) -> Any:
    """The outputs of the parts as one batch in its original order."""
    indices = rows.head.nonzero().squeeze(1), rows.tail.nonzero().squeeze(1)

    def merge(h: Any, t: Any) -> Any:
        if not isinstance(h, Tensor):
            return h
        if h.dim() == 0 or (h.shape[0], t.shape[0]) != (indices[0].shape[0], indices[1].shape[0]):
            raise ValueError(
                f"the model's outputs hold tensors of shape {tuple(h.shape)} for "
                f"{len(indices[0])} rows, expected one entry a row; use plan='joint'"
            )
        out = h.new_empty(rows.head.shape[0], *h.shape[1:])
        for index, part in zip(indices, (h, t)):  # a row in both parts: as in the tail's pass
            out.index_copy_(0, index.to(h.device, non_blocking=True), part)
        return out

    return pytree.tree_map(merge, of_head, of_tail)

"""Which rows of a batch belong to which part, and how they are taken out and put together."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..losses import parts_of
from ..losses.parts import numbers_of
from .data_parallel import keep_in_step
from .trees import mapped


class Rows(NamedTuple):
    """Which rows of a batch a plan needs in which pass, and how many count (b)."""

    head: Tensor  # bool (N,): rows of the head pass; the ones with no weight at all included
    tail: Tensor  # bool (N,): rows with sharp > 0; in a CUDA graph both are positions, int64
    head_rows: int
    tail_rows: int
    counted: int | None  # None: the criterion counts them itself
    tail_share: float | None = None  # see losses.Parts; None where nobody looked


def rows_of(criterion: Any, targets: Tensor, same_passes: bool) -> Rows:
    """From the targets alone, on their device.

    `same_passes` adds a row of weight zero to a part that other ranks may have rows of.
    """
    head, tail, counted, tail_share = parts_of(criterion, targets)
    head = head | ~tail
    if same_passes:
        keep_in_step(head, tail, criterion.split)
    head_rows, tail_rows = numbers_of(head, tail)
    return Rows(head, tail, head_rows, tail_rows, counted, tail_share)


def filled(rows: Rows, multiple: int) -> Rows:
    """Parts of few sizes: whole multiples, but for the whole batch and for a part without rows.

    A row that fills up a part has no weight in it: its labels say so, as they do in any pass.
    """
    head, tail = _filled(rows.head, multiple), _filled(rows.tail, multiple)
    head_rows, tail_rows = numbers_of(head, tail)
    return rows._replace(head=head, tail=tail, head_rows=head_rows, tail_rows=tail_rows)


def _filled(part: Tensor, multiple: int) -> Tensor:
    others = (~part).nonzero().squeeze(1)
    lacking = -(len(part) - len(others)) % multiple
    return part.index_fill(0, others[:lacking], True)


def pieces(inputs: Any, targets: Tensor, size: int | None) -> Iterator[tuple[Any, Tensor]]:
    """The rows of a pass in pieces of at most `size`, None for all."""
    if size is None or size >= targets.shape[0]:
        yield inputs, targets
        return
    for start in range(0, len(targets), size):
        rows = slice(start, start + size)
        yield mapped(operator.itemgetter(rows), inputs), targets[rows]


def positions(part: Tensor) -> Tensor:
    """Of the rows of a part, int64 in the batch's order."""
    return part if part.dtype == torch.int64 else part.nonzero().squeeze(1)


def take_rows(part: Tensor, inputs: Any, targets: Tensor) -> tuple[Any, Tensor]:
    """The rows of a batch that are in `part`, in its order and memory format.

    `part` may be on another device than the batch: samples are drawn on the CPU.
    """
    rows = positions(part)
    if rows.shape[0] == targets.shape[0]:
        return inputs, targets

    def take(x: Tensor) -> Tensor:
        index = rows.to(x.device, non_blocking=True)
        if x.requires_grad:
            raise ValueError("inputs requires a gradient, expected none; detach it")
        if x.layout != torch.strided or (x.dim() < 4 and x.is_contiguous()):  # one format
            return x.index_select(0, index)
        # Like x, so that channels_last images stay channels_last.
        return torch.index_select(x, 0, index, out=torch.empty_like(x[: rows.shape[0]]))

    return mapped(take, inputs), targets.index_select(0, rows.to(targets.device, non_blocking=True))


def assemble(rows: Rows, size: int, of_head: Any, of_tail: Any) -> Any:
    """The outputs of the parts as one batch of `size` rows in its original order."""
    indices = positions(rows.head), positions(rows.tail)

    def merge(h: Any, t: Any) -> Any:
        if not isinstance(h, Tensor):
            return h
        if h.dim() == 0 or (h.shape[0], t.shape[0]) != (indices[0].shape[0], indices[1].shape[0]):
            raise ValueError(
                f"the model's outputs hold tensors of shape {tuple(h.shape)} for "
                f"{len(indices[0])} rows, expected one entry a row; use plan='joint'"
            )
        out = h.new_empty(size, *h.shape[1:])
        for index, part in zip(indices, (h, t)):  # a row in both parts: as in the tail's pass
            out.index_copy_(0, index.to(h.device, non_blocking=True), part)
        return out

    return pytree.tree_map(merge, of_head, of_tail)

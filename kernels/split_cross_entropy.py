"""The loss operation: log-sum-exp of every row in one pass over blocks of classes.

Arguments and formulas are those of reference.py. One program per row; for the backward, per row
and span of classes. Rows of any number of classes start at any address, so a program counts its
blocks from the last 16-byte boundary at or before the row: blocks inside the row are read in
16-byte accesses, the one or two at its edges element by element.

A target outside 0 .. K-1 that is not ignore_index makes the losses and its row's gradient not a
number: reading it back to raise an error would synchronise the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import arithmetic_dtype
from .launch import DTYPES, launch_options, on


class Configuration(NamedTuple):
    """How a kernel is launched for up to `classes` classes."""

    classes: float
    block: int  # classes of one step of a program
    threads: int


# Chosen from the sizes alone, not tuned on a GPU: small blocks leave few classes to the edges of
# a row, and a thread has one 16-byte access to a half dtype at a step.
FORWARD = (
    Configuration(256, block=256, threads=32),
    Configuration(16384, block=1024, threads=128),
    Configuration(float("inf"), block=2048, threads=256),
)
BACKWARD = (
    Configuration(256, block=256, threads=32),
    Configuration(float("inf"), block=1024, threads=128),
)

BACKWARD_SPAN = 16384  # classes of one program
TOTALS_BLOCK, TOTALS_THREADS = 1024, 256  # rows that are added up at a time


def configuration(table: tuple[Configuration, ...], classes: int) -> Configuration:
    return next(row for row in table if classes <= row.classes)


# ---------------------------------------------------------------- blocks of a row


@triton.jit
def misalignment(row, DTYPE: tl.constexpr):
    """Elements from the last 16-byte boundary to the row's first."""
    return (row.to(tl.int64) % 16 // (DTYPE.primitive_bitwidth // 8)).to(tl.int32)


@triton.jit
def whole_blocks(shift, classes, BLOCK: tl.constexpr):
    """The first block that lies inside the row, and the first after it that does not."""
    return tl.where(shift > 0, 1, 0), (shift + classes) // BLOCK


@triton.jit
def edge_block(edge, shift, classes, BLOCK: tl.constexpr):
    """The offsets of the block at the row's beginning (edge 0) or end (1), and which are its.

    Edge 0 exists where shift > 0, and then holds the end of a row of a single block too.
    """
    first, last = whole_blocks(shift, classes, BLOCK)
    block = edge * tl.maximum(first, last)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    end = tl.where(edge == 0, tl.minimum(BLOCK, shift + classes), shift + classes)
    return offsets, (offsets >= shift) & (offsets < end)


# ---------------------------------------------------------------- forward


@triton.jit
def add_to_log_sum_exp(maximum, total, z):
    """Each lane's maximum and its sum of exp(z - maximum), with one more z: one exp a number."""
    e = tl.where(z == maximum, 1.0, tl.exp(-tl.abs(z - maximum)))  # equal: both may be -inf
    total = tl.where(z > maximum, total * e + 1.0, total + e)
    return tl.maximum(maximum, z), total


@triton.jit
def log_sum_exp(begin, shift, classes, ARITHMETIC: tl.constexpr, BLOCK: tl.constexpr):
    """The row's maximum, and in float64 the logarithm of its sum of exp(z - maximum)."""
    lane_maximum = tl.full((BLOCK,), -float("inf"), ARITHMETIC)
    lane_total = tl.zeros((BLOCK,), ARITHMETIC)
    first, last = whole_blocks(shift, classes, BLOCK)
    for block in range(first, last):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(tl.multiple_of(begin + offsets, 16)).to(ARITHMETIC)
        lane_maximum, lane_total = add_to_log_sum_exp(lane_maximum, lane_total, z)
    for edge in range(1 - first, 2):
        offsets, mask = edge_block(edge, shift, classes, BLOCK)
        z = tl.load(begin + offsets, mask=mask, other=-float("inf")).to(ARITHMETIC)
        lane_maximum, lane_total = add_to_log_sum_exp(lane_maximum, lane_total, z)
    maximum = tl.max(lane_maximum, axis=0)
    total = lane_total.to(tl.float64) * tl.exp(lane_maximum - maximum).to(tl.float64)
    return maximum, tl.log(tl.sum(total, axis=0))


@triton.jit
def weighted_sums(
    begin, shift, classes, maximum, class_weight, ARITHMETIC: tl.constexpr, BLOCK: tl.constexpr
):
    """sum_k w_k (z_k - maximum), all of one sign, and sum_k w_k, in float64."""
    dot = tl.zeros((BLOCK,), ARITHMETIC)
    weight = tl.zeros((BLOCK,), ARITHMETIC)
    first, last = whole_blocks(shift, classes, BLOCK)
    for block in range(first, last):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(tl.multiple_of(begin + offsets, 16)).to(ARITHMETIC)
        w = tl.full((BLOCK,), 1.0, ARITHMETIC)
        if class_weight is not None:
            w = tl.load(class_weight + offsets - shift)
        dot += w * (z - maximum)
        weight += w
    for edge in range(1 - first, 2):
        offsets, mask = edge_block(edge, shift, classes, BLOCK)
        z = tl.load(begin + offsets, mask=mask, other=0.0).to(ARITHMETIC)
        w = tl.full((BLOCK,), 1.0, ARITHMETIC)
        if class_weight is not None:
            w = tl.load(class_weight + offsets - shift, mask=mask, other=0.0)
        dot += tl.where(mask, w * (z - maximum), 0.0)
        weight += tl.where(mask, w, 0.0)
    return tl.sum(dot.to(tl.float64), axis=0), tl.sum(weight.to(tl.float64), axis=0)


# bytes: N·K read; with label smoothing each row once more, from the cache
@triton.jit(do_not_specialize=["rows", "classes", "row_stride", "ignore_index"])
def row_losses_kernel(
    logits, targets, plain, sharp, class_weight, lse, losses, rows, classes, row_stride,
    label_smoothing: tl.float64, ignore_index, SMOOTHED: tl.constexpr, DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * row_stride
    shift = misalignment(row, DTYPE)
    maximum, log_sum = log_sum_exp(row - shift, shift, classes, ARITHMETIC, BLOCK)
    tl.store(lse + 2 * i, maximum)
    tl.store(lse + 2 * i + 1, log_sum.to(ARITHMETIC))

    y = tl.load(targets + i)
    counted = y != ignore_index
    valid = counted & (y >= 0) & (y < classes)
    z_y = tl.load(row + y, mask=valid, other=float("nan")).to(tl.float64)
    w_y = tl.full((), 1.0, tl.float64)
    if class_weight is not None:
        w_y = tl.load(class_weight + y, mask=valid, other=0.0).to(tl.float64)
    smoothing = tl.full((), label_smoothing, tl.float64)
    loss = (1.0 - smoothing) * w_y * (maximum.to(tl.float64) - z_y + log_sum)
    if SMOOTHED:
        dot, weight = weighted_sums(
            row - shift, shift, classes, maximum, class_weight, ARITHMETIC, BLOCK
        )
        loss += smoothing / classes * (weight * log_sum - dot)
    for part in tl.static_range(2):
        part_weight = tl.load((sharp if part else plain) + y, mask=valid, other=float("nan"))
        # A row that carries no weight counts nothing whatever its loss is.
        carries = counted & (part_weight != 0)
        value = tl.where(carries, part_weight.to(tl.float64) * loss, 0.0)
        tl.store(losses + part * rows + i, value)


# bytes: 24N read
@triton.jit(do_not_specialize=["rows", "ignore_index"])
def totals_kernel(
    losses, targets, head, tail, b, rows, ignore_index, batch_size: tl.float64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the rows in one order."""
    head_sum = tl.zeros((BLOCK,), tl.float64)
    tail_sum = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, rows, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mask = i < rows
        head_sum += tl.load(losses + i, mask=mask, other=0.0)
        tail_sum += tl.load(losses + rows + i, mask=mask, other=0.0)
        y = tl.load(targets + i, mask=mask, other=ignore_index)
        count += (y != ignore_index).to(tl.int64)
    divisor = tl.sum(count, axis=0).to(tl.float64)
    given = tl.full((), batch_size, tl.float64)
    divisor = tl.where(given >= 0, given, divisor)  # negative: not given
    at_least_one = tl.maximum(divisor, 1.0)
    tl.store(head, tl.sum(head_sum, axis=0) / at_least_one)
    tl.store(tail, tl.sum(tail_sum, axis=0) / at_least_one)
    tl.store(b, divisor)


def unit_stride(logits: Tensor) -> Tensor:
    """Logits with unit stride along the classes; a copy where they have another."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def split_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    plain: Tensor,
    sharp: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    batch_size: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference.split_cross_entropy. Two launches: the rows, then their sum in one order."""
    logits, targets = unit_stride(logits), targets.contiguous()
    (rows, classes), device = logits.shape, logits.device
    dtype = arithmetic_dtype(logits.dtype)
    head, tail, b = (torch.empty((), dtype=dtype, device=device) for _ in range(3))
    lse = torch.empty(rows, 2, dtype=dtype, device=device)
    losses = torch.empty(2, rows, dtype=torch.float64, device=device)
    _, block, threads = configuration(FORWARD, classes)
    with on(device):
        if rows:
            row_losses_kernel[(rows,)](
                logits, targets, plain.contiguous(), sharp.contiguous(), contiguous(class_weight),
                lse, losses, rows, classes, logits.stride(0), label_smoothing, ignore_index,
                SMOOTHED=label_smoothing > 0, DTYPE=DTYPES[logits.dtype],
                ARITHMETIC=DTYPES[dtype], BLOCK=block, **launch_options(threads),
            )  # fmt: skip
        totals_kernel[(1,)](
            losses, targets, head, tail, b, rows, ignore_index,
            -1.0 if batch_size is None else batch_size, BLOCK=TOTALS_BLOCK,
            **launch_options(TOTALS_THREADS),
        )  # fmt: skip
    return head, tail, b, lse


# ---------------------------------------------------------------- backward


@triton.jit
def row_weight(i, y, counted, valid, grad_head, grad_tail, plain, sharp, b):
    """r_i in float64; not a number for a target out of range."""
    r = tl.full((), 0.0, tl.float64)
    if grad_head is not None:
        weight = tl.load(plain + y, mask=valid, other=float("nan"))
        r += tl.load(grad_head).to(tl.float64) * weight.to(tl.float64)
    if grad_tail is not None:
        weight = tl.load(sharp + y, mask=valid, other=float("nan"))
        r += tl.load(grad_tail).to(tl.float64) * weight.to(tl.float64)
    return tl.where(counted, r / tl.maximum(tl.load(b).to(tl.float64), 1.0), 0.0)


@triton.jit
def gradient(z, w, is_y, r, soft, hard, smooth, maximum, log_sum):
    """r [soft p_k - hard 1[k = y] - smooth w_k], 0 in a row that carries no weight."""
    inner = soft * tl.exp(z - maximum - log_sum) - smooth * w
    inner = tl.where(is_y, inner - hard, inner)
    return tl.where(r == 0, 0.0, r * inner)


# bytes: N·K read (none of the rows that carry no weight), N·K written
@triton.jit(do_not_specialize=["classes", "row_stride", "ignore_index"])
def backward_kernel(
    grad_head, grad_tail, logits, targets, lse, b, plain, sharp, class_weight, weight_sum,
    grad_logits, classes, row_stride, label_smoothing: tl.float64, ignore_index,
    SMOOTHED: tl.constexpr, DTYPE: tl.constexpr, ARITHMETIC: tl.constexpr, BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    y = tl.load(targets + i)
    counted = y != ignore_index
    valid = counted & (y >= 0) & (y < classes)
    r = row_weight(i, y, counted, valid, grad_head, grad_tail, plain, sharp, b).to(ARITHMETIC)
    maximum = tl.load(lse + 2 * i)
    log_sum = tl.load(lse + 2 * i + 1)
    smoothing = tl.full((), label_smoothing, tl.float64)
    w_y = tl.full((), 1.0, tl.float64)
    if class_weight is not None:
        w_y = tl.load(class_weight + y, mask=valid, other=0.0).to(tl.float64)
    hard = (1.0 - smoothing) * w_y
    soft = hard
    smooth = smoothing / classes
    if SMOOTHED:
        total = tl.full((), 0.0, tl.float64) + classes
        if weight_sum is not None:
            total = tl.load(weight_sum)
        soft += smooth * total
    hard = hard.to(ARITHMETIC)
    soft = soft.to(ARITHMETIC)
    smooth = smooth.to(ARITHMETIC)

    row = logits + i * row_stride
    grad_row = grad_logits + i * classes
    shift = misalignment(row, DTYPE)
    first, last = whole_blocks(shift, classes, BLOCK)
    last = tl.where(misalignment(grad_row, DTYPE) == shift, last, first)
    y = tl.where(valid, y, -1).to(tl.int32)  # half the registers in comparisons
    live = tl.full((BLOCK,), tl.where(r == 0, 0, 1), tl.int32) != 0
    begin = tl.program_id(1) * (SPAN // BLOCK)
    end = tl.minimum(begin + SPAN // BLOCK, tl.cdiv(shift + classes, BLOCK))
    for block in range(begin, end):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        k = offsets - shift
        w = tl.full((BLOCK,), 1.0, ARITHMETIC)
        if (block >= first) & (block < last):
            z = tl.load(tl.multiple_of(row - shift + offsets, 16), mask=live, other=0.0)
            if SMOOTHED and class_weight is not None:
                w = tl.load(class_weight + k)
            g = gradient(z.to(ARITHMETIC), w, k == y, r, soft, hard, smooth, maximum, log_sum)
            tl.store(tl.multiple_of(grad_row - shift + offsets, 16), g.to(DTYPE))
        else:
            mask = (k >= 0) & (k < classes)
            z = tl.load(row + k, mask=mask & live, other=0.0)
            if SMOOTHED and class_weight is not None:
                w = tl.load(class_weight + k, mask=mask, other=0.0)
            g = gradient(z.to(ARITHMETIC), w, k == y, r, soft, hard, smooth, maximum, log_sum)
            tl.store(grad_row + k, g.to(DTYPE), mask=mask)


def split_cross_entropy_backward(
    grad_head: Tensor | None,
    grad_tail: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    b: Tensor,
    plain: Tensor,
    sharp: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """See reference.split_cross_entropy_backward.

    One launch, and one more that sums class_weight where there is label smoothing too.
    """
    logits = unit_stride(logits)
    (rows, classes), device = logits.shape, logits.device
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=device)
    if not rows:
        return grad_logits
    weight_sum = None
    if label_smoothing > 0 and class_weight is not None:
        weight_sum = class_weight.sum(dtype=torch.float64)
    _, block, threads = configuration(BACKWARD, classes)
    # Blocks are counted from a boundary up to 15 bytes before the row.
    spans = triton.cdiv(classes + 15 // logits.element_size(), BACKWARD_SPAN)
    with on(device):
        backward_kernel[(rows, spans)](
            grad_head, grad_tail, logits, targets.contiguous(), lse.contiguous(), b,
            plain.contiguous(), sharp.contiguous(), contiguous(class_weight), weight_sum,
            grad_logits, classes, logits.stride(0), label_smoothing, ignore_index,
            SMOOTHED=label_smoothing > 0, DTYPE=DTYPES[logits.dtype],
            ARITHMETIC=DTYPES[arithmetic_dtype(logits.dtype)], BLOCK=block, SPAN=BACKWARD_SPAN,
            **launch_options(threads),
        )  # fmt: skip
    return grad_logits

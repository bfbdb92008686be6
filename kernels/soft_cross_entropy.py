"""The loss operation for label distributions q: each row's loss is a sum over the classes.

Arguments and formulas are those of ops/reference_soft.py; blocks of a row are those of
split_cross_entropy.py, counted by the logits' alignment. q and the class weights are read beside
them, at whatever address.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import arithmetic_dtype
from .launch import DTYPES, launch_options, on
from .split_cross_entropy import (
    BACKWARD,
    BACKWARD_SPAN,
    TOTALS_BLOCK,
    TOTALS_THREADS,
    Configuration,
    configuration,
    contiguous,
    log_sum_exp,
    misalignment,
    unit_stride,
    weighted_sums,
)

# Sums of a row are eight lists of a block's length: larger blocks than these spill.
FORWARD = (
    Configuration(256, block=256, threads=32),
    Configuration(float("inf"), block=1024, threads=128),
)
ROW = 6  # numbers that the backward needs of a row


@triton.jit
def part_sums(label, k, mask, x, part_weight, w):
    """With a_k = q_k part_weight_k of a block: a_k w_k (z_k - maximum), a_k w_k and a_k."""
    share = label * tl.load(part_weight + k, mask=mask, other=0.0)
    carries = share != 0  # others count nothing whatever their logits are
    weighted = share * w
    return tl.where(carries, weighted * x, 0.0), weighted, share


@triton.jit
def total(lanes):
    return tl.sum(lanes.to(tl.float64), axis=0)


@triton.jit
def class_sums(
    row, q, plain, sharp, class_weight, classes, maximum, ARITHMETIC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of `part_sums` for plain and for sharp, and whether an element of q is not 0."""
    head_dot = tl.zeros((BLOCK,), ARITHMETIC)
    head_weighted = tl.zeros((BLOCK,), ARITHMETIC)
    head_mass = tl.zeros((BLOCK,), ARITHMETIC)
    tail_dot = tl.zeros((BLOCK,), ARITHMETIC)
    tail_weighted = tl.zeros((BLOCK,), ARITHMETIC)
    tail_mass = tl.zeros((BLOCK,), ARITHMETIC)
    found = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, classes, BLOCK):
        k = first + tl.arange(0, BLOCK)
        mask = k < classes
        label = tl.load(q + k, mask=mask, other=0.0)
        found |= (label != 0).to(tl.int32)
        x = tl.load(row + k, mask=mask & (label != 0), other=0.0).to(ARITHMETIC) - maximum
        w = tl.full((BLOCK,), 1.0, ARITHMETIC)
        if class_weight is not None:
            w = tl.load(class_weight + k, mask=mask, other=0.0)
        dot, weighted, mass = part_sums(label, k, mask, x, plain, w)
        head_dot += dot
        head_weighted += weighted
        head_mass += mass
        dot, weighted, mass = part_sums(label, k, mask, x, sharp, w)
        tail_dot += dot
        tail_weighted += weighted
        tail_mass += mass
    return (
        total(head_dot), total(head_weighted), total(head_mass), total(tail_dot),
        total(tail_weighted), total(tail_mass), tl.max(found, axis=0),
    )  # fmt: skip


@triton.jit
def store_part(
    part, i, rows, numbers, losses, dot, weighted, mass, log_sum, smoothing, smoothed,
    ARITHMETIC: tl.constexpr,
):  # fmt: skip
    tl.store(numbers + 2 + part, weighted.to(ARITHMETIC))
    tl.store(numbers + 4 + part, mass.to(ARITHMETIC))
    loss = (1.0 - smoothing) * (weighted * log_sum - dot) + mass * smoothed
    # A row that carries no weight counts nothing whatever its loss is.
    tl.store(losses + part * rows + i, tl.where(mass == 0, 0.0, loss))


# bytes: 2 N·K read; logits where q is not 0 once more, from the cache
@triton.jit(do_not_specialize=["rows", "classes", "row_stride", "q_stride"])
def soft_row_losses_kernel(
    logits, q, plain, sharp, class_weight, row_numbers, losses, rows, classes, row_stride,
    q_stride, label_smoothing: tl.float64, SMOOTHED: tl.constexpr, DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * row_stride
    q_row = q + i * q_stride
    numbers = row_numbers + i * 6
    shift = misalignment(row, DTYPE)
    maximum, log_sum = log_sum_exp(row - shift, shift, classes, ARITHMETIC, BLOCK)
    tl.store(numbers, maximum)
    tl.store(numbers + 1, log_sum.to(ARITHMETIC))
    smoothing = tl.full((), label_smoothing, tl.float64)
    smoothed = tl.full((), 0.0, tl.float64)
    if SMOOTHED:
        all_dot, weight = weighted_sums(
            row - shift, shift, classes, maximum, class_weight, ARITHMETIC, BLOCK
        )
        smoothed = smoothing / classes * (weight * log_sum - all_dot)
    head_dot, head_weighted, head_mass, tail_dot, tail_weighted, tail_mass, counted = class_sums(
        row, q_row, plain, sharp, class_weight, classes, maximum, ARITHMETIC, BLOCK
    )
    store_part(
        0, i, rows, numbers, losses, head_dot, head_weighted, head_mass, log_sum, smoothing,
        smoothed, ARITHMETIC,
    )  # fmt: skip
    store_part(
        1, i, rows, numbers, losses, tail_dot, tail_weighted, tail_mass, log_sum, smoothing,
        smoothed, ARITHMETIC,
    )  # fmt: skip
    tl.store(losses + 2 * rows + i, counted.to(tl.float64))


# bytes: 24N read
@triton.jit(do_not_specialize=["rows"])
def soft_totals_kernel(losses, head, tail, b, rows, batch_size: tl.float64, BLOCK: tl.constexpr):
    """Adds up the rows in one order."""
    head_sum = tl.zeros((BLOCK,), tl.float64)
    tail_sum = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, rows, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mask = i < rows
        head_sum += tl.load(losses + i, mask=mask, other=0.0)
        tail_sum += tl.load(losses + rows + i, mask=mask, other=0.0)
        count += tl.load(losses + 2 * rows + i, mask=mask, other=0.0)
    given = tl.full((), batch_size, tl.float64)
    divisor = tl.where(given >= 0, given, tl.sum(count, axis=0))  # negative: not given
    at_least_one = tl.maximum(divisor, 1.0)
    tl.store(head, tl.sum(head_sum, axis=0) / at_least_one)
    tl.store(tail, tl.sum(tail_sum, axis=0) / at_least_one)
    tl.store(b, divisor)


def split_soft_cross_entropy(
    logits: Tensor,
    q: Tensor,
    plain: Tensor,
    sharp: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    batch_size: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference.split_soft_cross_entropy. Two launches: the rows, then their sum."""
    logits, q = unit_stride(logits), unit_stride(q)
    (rows, classes), device = logits.shape, logits.device
    dtype = arithmetic_dtype(logits.dtype)
    head, tail, b = (torch.empty((), dtype=dtype, device=device) for _ in range(3))
    numbers = torch.empty(rows, ROW, dtype=dtype, device=device)
    losses = torch.empty(3, rows, dtype=torch.float64, device=device)
    _, block, threads = configuration(FORWARD, classes)
    with on(device):
        if rows:
            soft_row_losses_kernel[(rows,)](
                logits, q, plain.contiguous(), sharp.contiguous(), contiguous(class_weight),
                numbers, losses, rows, classes, logits.stride(0), q.stride(0), label_smoothing,
                SMOOTHED=label_smoothing > 0, DTYPE=DTYPES[logits.dtype],
                ARITHMETIC=DTYPES[dtype], BLOCK=block, **launch_options(threads),
            )  # fmt: skip
        soft_totals_kernel[(1,)](
            losses, head, tail, b, rows, -1.0 if batch_size is None else batch_size,
            BLOCK=TOTALS_BLOCK, **launch_options(TOTALS_THREADS),
        )  # fmt: skip
    return head, tail, b, numbers


# ---------------------------------------------------------------- backward


@triton.jit
def part_factor(gradient, b):
    """What a part's class weights are multiplied with, in float64; 0 without a gradient."""
    factor = tl.full((), 0.0, tl.float64)
    if gradient is not None:
        factor = tl.load(gradient).to(tl.float64)
        factor /= tl.maximum(tl.load(b).to(tl.float64), 1.0)
    return factor


# bytes: 2 N·K read (none of the rows that carry no weight), N·K written
@triton.jit(do_not_specialize=["classes", "row_stride", "q_stride"])
def soft_backward_kernel(
    grad_head, grad_tail, logits, q, row_numbers, b, plain, sharp, class_weight, weight_sum,
    grad_logits, classes, row_stride, q_stride, label_smoothing: tl.float64,
    SMOOTHED: tl.constexpr, DTYPE: tl.constexpr, ARITHMETIC: tl.constexpr, BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    numbers = row_numbers + i * 6
    of_head = part_factor(grad_head, b)
    of_tail = part_factor(grad_tail, b)
    head_mass = tl.load(numbers + 4).to(tl.float64)
    tail_mass = tl.load(numbers + 5).to(tl.float64)
    in_head = tl.where(of_head != 0, tl.where(head_mass != 0, 1, 0), 0)
    in_tail = tl.where(of_tail != 0, tl.where(tail_mass != 0, 1, 0), 0)
    carries = tl.full((BLOCK,), in_head | in_tail, tl.int32) != 0
    # A part without a gradient may have sums that are infinite or not a number.
    weighted = tl.where(of_head != 0, of_head * tl.load(numbers + 2).to(tl.float64), 0.0)
    weighted += tl.where(of_tail != 0, of_tail * tl.load(numbers + 3).to(tl.float64), 0.0)
    mass = tl.where(of_head != 0, of_head * head_mass, 0.0)
    mass += tl.where(of_tail != 0, of_tail * tail_mass, 0.0)
    maximum = tl.load(numbers)
    log_sum = tl.load(numbers + 1)
    smoothing = tl.full((), label_smoothing, tl.float64)
    smooth = smoothing / classes * mass
    soft = (1.0 - smoothing) * weighted
    if SMOOTHED:
        total = tl.full((), 0.0, tl.float64) + classes
        if weight_sum is not None:
            total = tl.load(weight_sum)
        soft += smooth * total
    soft = soft.to(ARITHMETIC)
    smooth = smooth.to(ARITHMETIC)
    of_head = ((1.0 - smoothing) * of_head).to(ARITHMETIC)
    of_tail = ((1.0 - smoothing) * of_tail).to(ARITHMETIC)
    row = logits + i * row_stride
    q_row = q + i * q_stride
    begin = tl.program_id(1) * SPAN
    for first in range(begin, tl.minimum(begin + SPAN, classes), BLOCK):
        k = first + tl.arange(0, BLOCK)
        mask = k < classes
        live = mask & carries
        z = tl.load(row + k, mask=live, other=0.0).to(ARITHMETIC)
        label = tl.load(q_row + k, mask=live, other=0.0)
        c = of_head * tl.load(plain + k, mask=live, other=0.0)
        c += of_tail * tl.load(sharp + k, mask=live, other=0.0)
        w = tl.full((BLOCK,), 1.0, ARITHMETIC)
        if class_weight is not None:
            w = tl.load(class_weight + k, mask=live, other=0.0)
        g = soft * tl.exp(z - maximum - log_sum) - label * (c * w)
        if SMOOTHED:
            g -= smooth * w
        tl.store(grad_logits + i * classes + k, tl.where(carries, g, 0.0).to(DTYPE), mask=mask)


def split_soft_cross_entropy_backward(
    grad_head: Tensor | None,
    grad_tail: Tensor | None,
    logits: Tensor,
    q: Tensor,
    rows: Tensor,
    b: Tensor,
    plain: Tensor,
    sharp: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    """See reference.split_soft_cross_entropy_backward.

    One launch, and one more that sums class_weight where there is label smoothing too.
    """
    logits, q = unit_stride(logits), unit_stride(q)
    (count, classes), device = logits.shape, logits.device
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=device)
    if not count:
        return grad_logits
    weight_sum = None
    if label_smoothing > 0 and class_weight is not None:
        weight_sum = class_weight.sum(dtype=torch.float64)
    _, block, threads = configuration(BACKWARD, classes)
    with on(device):
        soft_backward_kernel[(count, triton.cdiv(classes, BACKWARD_SPAN))](
            grad_head, grad_tail, logits, q, rows.contiguous(), b, plain.contiguous(),
            sharp.contiguous(), contiguous(class_weight), weight_sum, grad_logits, classes,
            logits.stride(0), q.stride(0), label_smoothing, SMOOTHED=label_smoothing > 0,
            DTYPE=DTYPES[logits.dtype], ARITHMETIC=DTYPES[arithmetic_dtype(logits.dtype)],
            BLOCK=block, SPAN=BACKWARD_SPAN, **launch_options(threads),
        )  # fmt: skip
    return grad_logits

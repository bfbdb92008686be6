"""The fused bases' updates: one launch each over any number of tensors, as in multi_tensor.py.

KEPT is the dtype in which the weights and the state of the base are kept: that of the data, DTYPE,
or with master weights the arithmetic dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import advance_, arithmetic_dtype, check_not_captured, steps_on
from .launch import DTYPES, launch_options, on, table
from .multi_tensor import Configuration, all_read, at, read, span_of, write

# ---------------------------------------------------------------- what all need


@triton.jit
def step_scalars(
    lr, lr_tensor, grad_scale, found_inf, MAXIMIZE: tl.constexpr, ARITHMETIC: tl.constexpr
):
    """lr; what undoes the loss scale, negative to maximize; whether only to restore."""
    lr = tl.full((), lr, ARITHMETIC)
    if lr_tensor is not None:
        lr = tl.load(lr_tensor).to(ARITHMETIC)
    factor = tl.full((), 1.0, ARITHMETIC)
    if grad_scale is not None:
        scale = tl.load(grad_scale).to(ARITHMETIC)
        factor = (1.0 / scale.to(tl.float64)).to(ARITHMETIC)  # as in perturbation_scale
    if MAXIMIZE:
        factor = -factor
    skip = tl.full((), False, tl.int1)
    if found_inf is not None:
        skip = tl.load(found_inf) != 0
    return lr, factor, skip


@triton.jit
def write_weights(
    theta, kept, offsets, n, start, stepped, skip,
    DTYPE: tl.constexpr, KEPT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """theta, and where they are kept in another dtype the master weights."""
    write(theta, offsets, n, tl.where(skip, start.to(DTYPE), stepped.to(DTYPE)), WHOLE)
    if KEPT != DTYPE:
        write(kept, offsets, n, tl.where(skip, start, stepped), WHOLE)


def on_device(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    """A tensor of one element where the kernel can read it; a copy only from elsewhere."""
    return scalar if scalar is None else scalar.to(device, non_blocking=True)


def lr_arguments(lr: Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """lr as a number where the host has it, which costs no copy, else as a tensor."""
    if lr.device.type == "cpu":
        return lr.item(), None
    return 0.0, on_device(lr, device)


# ---------------------------------------------------------------- sgd_update_


@triton.jit
def sgd_update_block(
    theta, kept, g_h, g_p, m, offsets, n, lr, momentum, one_minus_dampening, weight_decay, factor,
    skip, SAVED: tl.constexpr, HEAD: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    DTYPE: tl.constexpr, KEPT: tl.constexpr, ARITHMETIC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    start = read(kept if SAVED else theta, offsets, n, WHOLE)
    d = read(g_p, offsets, n, WHOLE).to(ARITHMETIC)
    if HEAD:
        d = read(g_h, offsets, n, WHOLE).to(ARITHMETIC) + d
    d = d * factor + weight_decay * start.to(ARITHMETIC)
    update = d
    if MOMENTUM:
        before = read(m, offsets, n, WHOLE)
        velocity = momentum * before.to(ARITHMETIC) + one_minus_dampening * d
        update = d + momentum * velocity if NESTEROV else velocity
    stepped = start.to(ARITHMETIC) - lr * update
    all_read(WHOLE)
    write_weights(theta, kept, offsets, n, start, stepped, skip, DTYPE, KEPT, WHOLE)
    if MOMENTUM:
        write(m, offsets, n, tl.where(skip, before, velocity.to(KEPT)), WHOLE)


# LISTS: theta, saved or master, g_h, g_p, m.
# bytes: 4n read, 2n written with all lists present (3n written with master)
@triton.jit
def sgd_update_kernel(
    spans, addresses, lr: tl.float64, lr_tensor, momentum: tl.float64,
    one_minus_dampening: tl.float64, weight_decay: tl.float64, grad_scale, found_inf,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, SAVED: tl.constexpr, HEAD: tl.constexpr,
    MOMENTUM: tl.constexpr, DTYPE: tl.constexpr, KEPT: tl.constexpr, ARITHMETIC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    record, first, n, whole = span_of(tl.program_id(0), spans, addresses, 5, BLOCK)
    theta = at(record, 0, first, DTYPE)
    kept = at(record, 1, first, KEPT)
    g_h = at(record, 2, first, DTYPE)
    g_p = at(record, 3, first, DTYPE)
    m = at(record, 4, first, KEPT)

    lr, factor, skip = step_scalars(lr, lr_tensor, grad_scale, found_inf, MAXIMIZE, ARITHMETIC)
    momentum = tl.full((), momentum, ARITHMETIC)
    one_minus_dampening = tl.full((), one_minus_dampening, ARITHMETIC)
    weight_decay = tl.full((), weight_decay, ARITHMETIC)

    for block in range(whole):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        sgd_update_block(
            theta, kept, g_h, g_p, m, offsets, n, lr, momentum, one_minus_dampening, weight_decay,
            factor, skip, SAVED, HEAD, MOMENTUM, NESTEROV, DTYPE, KEPT, ARITHMETIC, True,
        )  # fmt: skip
    for block in range(whole, tl.cdiv(n, BLOCK)):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        sgd_update_block(
            theta, kept, g_h, g_p, m, offsets, n, lr, momentum, one_minus_dampening, weight_decay,
            factor, skip, SAVED, HEAD, MOMENTUM, NESTEROV, DTYPE, KEPT, ARITHMETIC, False,
        )  # fmt: skip


# ---------------------------------------------------------------- adam_update_


@triton.jit
def power(base, exponent):
    """base^exponent by squaring, as in csrc/arithmetic.h."""
    base = tl.full((), base, tl.float64)  # which the interpreter takes for float32
    product = tl.full((), 1.0, tl.float64)
    while exponent > 0:
        product = tl.where(exponent % 2 == 1, product * base, product)
        base = base * base
        exponent = exponent // 2
    return product


@triton.jit
def quotient_by_root(x, y, factor, eps, ARITHMETIC: tl.constexpr):
    """x / (sqrt(y) factor + eps), root and quotient rounded to nearest."""
    if tl.float64 == ARITHMETIC:  # where Triton rounds to nearest anyway
        quotient = x / (tl.sqrt(y) * factor + eps)
    else:
        quotient = tl.div_rn(x, tl.sqrt_rn(y) * factor + eps)
    return quotient


@triton.jit
def adam_update_block(
    theta, kept, g_h, g_p, m, v, v_max, offsets, n, lr, beta1, one_minus_beta1, beta2,
    one_minus_beta2, eps, coupled, decoupled, factor, correction, root_correction, skip,
    SAVED: tl.constexpr, HEAD: tl.constexpr, AMSGRAD: tl.constexpr, DTYPE: tl.constexpr,
    KEPT: tl.constexpr, ARITHMETIC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    start = read(kept if SAVED else theta, offsets, n, WHOLE)
    d = read(g_p, offsets, n, WHOLE).to(ARITHMETIC)
    if HEAD:
        d = read(g_h, offsets, n, WHOLE).to(ARITHMETIC) + d
    d = d * factor + coupled * start.to(ARITHMETIC)
    first_before = read(m, offsets, n, WHOLE)
    second_before = read(v, offsets, n, WHOLE)
    first = beta1 * first_before.to(ARITHMETIC) + one_minus_beta1 * d
    second = beta2 * second_before.to(ARITHMETIC) + one_minus_beta2 * (d * d)
    bound = second
    if AMSGRAD:
        bound_before = read(v_max, offsets, n, WHOLE)
        largest = bound_before.to(ARITHMETIC)
        bound = tl.where((largest >= second) | (largest != largest), largest, second)
    direction = quotient_by_root(first * correction, bound, root_correction, eps, ARITHMETIC)
    direction += decoupled * start.to(ARITHMETIC)
    stepped = start.to(ARITHMETIC) - lr * direction
    all_read(WHOLE)
    write_weights(theta, kept, offsets, n, start, stepped, skip, DTYPE, KEPT, WHOLE)
    write(m, offsets, n, tl.where(skip, first_before, first.to(KEPT)), WHOLE)
    write(v, offsets, n, tl.where(skip, second_before, second.to(KEPT)), WHOLE)
    if AMSGRAD:
        write(v_max, offsets, n, tl.where(skip, bound_before, bound.to(KEPT)), WHOLE)


# LISTS: theta, saved or master, g_h, g_p, m, v, v_max.
# bytes: 5n read, 3n written without v_max (6n and 4n with it; 1n more written with master)
@triton.jit
def adam_update_kernel(
    spans, addresses, counts, lr: tl.float64, lr_tensor, beta1: tl.float64,
    one_minus_beta1: tl.float64, beta2: tl.float64, one_minus_beta2: tl.float64, eps: tl.float64,
    coupled: tl.float64, decoupled: tl.float64, grad_scale, found_inf,
    MAXIMIZE: tl.constexpr, SAVED: tl.constexpr, HEAD: tl.constexpr, AMSGRAD: tl.constexpr,
    DTYPE: tl.constexpr, KEPT: tl.constexpr, ARITHMETIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    record, first, n, whole = span_of(program, spans, addresses, 7, BLOCK)
    theta = at(record, 0, first, DTYPE)
    kept = at(record, 1, first, KEPT)
    g_h = at(record, 2, first, DTYPE)
    g_p = at(record, 3, first, DTYPE)
    m = at(record, 4, first, KEPT)
    v = at(record, 5, first, KEPT)
    v_max = at(record, 6, first, KEPT)

    lr, factor, skip = step_scalars(lr, lr_tensor, grad_scale, found_inf, MAXIMIZE, ARITHMETIC)
    taken = tl.load(counts + tl.load(spans + 3 * program)).to(tl.int32) + 1
    correction = (1.0 / (1.0 - power(beta1, taken))).to(ARITHMETIC)
    root_correction = (1.0 / tl.sqrt(1.0 - power(beta2, taken))).to(ARITHMETIC)
    beta1 = tl.full((), beta1, ARITHMETIC)
    one_minus_beta1 = tl.full((), one_minus_beta1, ARITHMETIC)
    beta2 = tl.full((), beta2, ARITHMETIC)
    one_minus_beta2 = tl.full((), one_minus_beta2, ARITHMETIC)
    eps = tl.full((), eps, ARITHMETIC)
    coupled = tl.full((), coupled, ARITHMETIC)
    decoupled = tl.full((), decoupled, ARITHMETIC)

    for block in range(whole):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        adam_update_block(
            theta, kept, g_h, g_p, m, v, v_max, offsets, n, lr, beta1, one_minus_beta1, beta2,
            one_minus_beta2, eps, coupled, decoupled, factor, correction, root_correction, skip,
            SAVED, HEAD, AMSGRAD, DTYPE, KEPT, ARITHMETIC, True,
        )  # fmt: skip
    for block in range(whole, tl.cdiv(n, BLOCK)):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        adam_update_block(
            theta, kept, g_h, g_p, m, v, v_max, offsets, n, lr, beta1, one_minus_beta1, beta2,
            one_minus_beta2, eps, coupled, decoupled, factor, correction, root_correction, skip,
            SAVED, HEAD, AMSGRAD, DTYPE, KEPT, ARITHMETIC, False,
        )  # fmt: skip


# ---------------------------------------------------------------- rmsprop_update_


@triton.jit
def rmsprop_update_block(
    theta, kept, g_h, g_p, v, m, g_avg, offsets, n, lr, alpha, one_minus_alpha, eps, weight_decay,
    momentum, factor, skip, SAVED: tl.constexpr, HEAD: tl.constexpr, MOMENTUM: tl.constexpr,
    CENTERED: tl.constexpr, NEAR: tl.constexpr, DTYPE: tl.constexpr, KEPT: tl.constexpr,
    ARITHMETIC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    start = read(kept if SAVED else theta, offsets, n, WHOLE)
    d = read(g_p, offsets, n, WHOLE).to(ARITHMETIC)
    if HEAD:
        d = read(g_h, offsets, n, WHOLE).to(ARITHMETIC) + d
    d = d * factor + weight_decay * start.to(ARITHMETIC)
    squares_before = read(v, offsets, n, WHOLE)
    squares = alpha * squares_before.to(ARITHMETIC) + one_minus_alpha * (d * d)
    spread = squares
    if CENTERED:
        mean_before = read(g_avg, offsets, n, WHOLE)
        mean = mean_before.to(ARITHMETIC)
        mean = mean + one_minus_alpha * (d - mean) if NEAR else d - alpha * (d - mean)
        spread = squares - mean * mean
    direction = quotient_by_root(d, spread, 1.0, eps, ARITHMETIC)
    if MOMENTUM:
        before = read(m, offsets, n, WHOLE)
        direction = momentum * before.to(ARITHMETIC) + direction
    stepped = start.to(ARITHMETIC) - lr * direction
    all_read(WHOLE)
    write_weights(theta, kept, offsets, n, start, stepped, skip, DTYPE, KEPT, WHOLE)
    write(v, offsets, n, tl.where(skip, squares_before, squares.to(KEPT)), WHOLE)
    if MOMENTUM:
        write(m, offsets, n, tl.where(skip, before, direction.to(KEPT)), WHOLE)
    if CENTERED:
        write(g_avg, offsets, n, tl.where(skip, mean_before, mean.to(KEPT)), WHOLE)


# LISTS: theta, saved or master, g_h, g_p, v, m, g_avg.
# bytes: 4n read, 2n written (1n more of each with m and with g_avg; 1n written with master)
@triton.jit
def rmsprop_update_kernel(
    spans, addresses, lr: tl.float64, lr_tensor, alpha: tl.float64, one_minus_alpha: tl.float64,
    eps: tl.float64, weight_decay: tl.float64, momentum: tl.float64, grad_scale, found_inf,
    MAXIMIZE: tl.constexpr, SAVED: tl.constexpr, HEAD: tl.constexpr, MOMENTUM: tl.constexpr,
    CENTERED: tl.constexpr, NEAR: tl.constexpr, DTYPE: tl.constexpr, KEPT: tl.constexpr,
    ARITHMETIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    record, first, n, whole = span_of(tl.program_id(0), spans, addresses, 7, BLOCK)
    theta = at(record, 0, first, DTYPE)
    kept = at(record, 1, first, KEPT)
    g_h = at(record, 2, first, DTYPE)
    g_p = at(record, 3, first, DTYPE)
    v = at(record, 4, first, KEPT)
    m = at(record, 5, first, KEPT)
    g_avg = at(record, 6, first, KEPT)

    lr, factor, skip = step_scalars(lr, lr_tensor, grad_scale, found_inf, MAXIMIZE, ARITHMETIC)
    alpha = tl.full((), alpha, ARITHMETIC)
    one_minus_alpha = tl.full((), one_minus_alpha, ARITHMETIC)
    eps = tl.full((), eps, ARITHMETIC)
    weight_decay = tl.full((), weight_decay, ARITHMETIC)
    momentum = tl.full((), momentum, ARITHMETIC)

    for block in range(whole):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        rmsprop_update_block(
            theta, kept, g_h, g_p, v, m, g_avg, offsets, n, lr, alpha, one_minus_alpha, eps,
            weight_decay, momentum, factor, skip, SAVED, HEAD, MOMENTUM, CENTERED, NEAR, DTYPE,
            KEPT, ARITHMETIC, True,
        )  # fmt: skip
    for block in range(whole, tl.cdiv(n, BLOCK)):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        rmsprop_update_block(
            theta, kept, g_h, g_p, v, m, g_avg, offsets, n, lr, alpha, one_minus_alpha, eps,
            weight_decay, momentum, factor, skip, SAVED, HEAD, MOMENTUM, CENTERED, NEAR, DTYPE,
            KEPT, ARITHMETIC, False,
        )  # fmt: skip


# ---------------------------------------------------------------- the launch of any of them


class Update(NamedTuple):
    """What one update has of its own."""

    kernel: Any
    configuration: Configuration
    # The kernel's scalars after lr_tensor, from the settings.
    scalars: Callable[..., tuple[float, ...]]
    # Its own flags, from which lists of the state are there and from the settings.
    flags: Callable[[Sequence[bool], Sequence[float]], dict[str, bool]]
    counts: bool = False  # whether it takes the steps taken


def _adam_scalars(
    beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: float
) -> tuple[float, ...]:
    coupled, decoupled_decay = (0.0, weight_decay) if decoupled else (weight_decay, 0.0)
    return beta1, 1 - beta1, beta2, 1 - beta2, eps, coupled, decoupled_decay


UPDATES = {
    "sgd_update_": Update(
        sgd_update_kernel,
        Configuration(span=8192, block=2048, threads=128),
        lambda momentum, dampening, weight_decay, _: (momentum, 1 - dampening, weight_decay),
        lambda has, settings: {"MOMENTUM": has[0], "NESTEROV": bool(settings[3]) and has[0]},
    ),
    "adam_update_": Update(
        adam_update_kernel,
        Configuration(span=8192, block=1024, threads=128),
        _adam_scalars,
        lambda has, settings: {"AMSGRAD": has[2]},
        counts=True,
    ),
    "rmsprop_update_": Update(
        rmsprop_update_kernel,
        Configuration(span=8192, block=1024, threads=128),
        lambda alpha, eps, weight_decay, momentum: (alpha, 1 - alpha, eps, weight_decay, momentum),
        lambda has, settings: {
            "MOMENTUM": has[1],
            "CENTERED": has[2],
            "NEAR": 1 - settings[0] < 0.5,
        },
    ),
}


def update_(
    op: str,
    theta: Sequence[Tensor],
    saved: Sequence[Tensor],
    g_h: Sequence[Tensor],
    g_p: Sequence[Tensor],
    state: Sequence[Sequence[Tensor]],
    step: Sequence[Tensor],
    lr: Tensor,
    settings: Sequence[float],
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    master: Sequence[Tensor],
) -> None:
    """See reference.update_."""
    update = UPDATES[op]
    span, block, threads = update.configuration
    kept = master or saved
    spans, addresses, programs = table(span, (theta, kept, g_h, g_p, *state))
    device, dtype = theta[0].device, theta[0].dtype
    check_not_captured(op, device, step)
    arithmetic = DTYPES[arithmetic_dtype(dtype)]
    if programs:
        counts = [steps_on(device, step)] if update.counts else []
        with on(device):
            update.kernel[(programs,)](
                spans, addresses, *counts, *lr_arguments(lr, device), *update.scalars(*settings),
                on_device(grad_scale, device), on_device(found_inf, device),
                **update.flags([len(list_) > 0 for list_ in state], settings),
                MAXIMIZE=maximize, SAVED=len(kept) > 0, HEAD=len(g_h) > 0,
                DTYPE=DTYPES[dtype], KEPT=arithmetic if master else DTYPES[dtype],
                ARITHMETIC=arithmetic, BLOCK=block, **launch_options(threads),
            )  # fmt: skip
    advance_(step, found_inf)

"""The optimizer phases except the updates: a launch each over any number of tensors.

Arguments and formulas are those of reference.py and csrc/arithmetic.h. A launch has one program
per span of elements of one tensor. A program walks its span in blocks: whole blocks of tensors
that are aligned in 16-byte accesses, the others element by element. Sums are taken in float64,
each program's in one fixed order, so results do not depend on how programs are scheduled.

`addresses` holds one record per tensor: whether all its addresses are aligned, then the address
of the tensor in every list, in the order of the LISTS of each kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import CHUNK, arithmetic_dtype
from .launch import DTYPES, launch_options, on, table


class Configuration(NamedTuple):
    """How one kernel is launched."""

    span: int  # elements of a program
    block: int  # elements of one step of a program
    threads: int


# Chosen from the sizes alone, not tuned on a GPU: a thread reads 8 or 16 elements of a list at a
# step, which is one or two 16-byte accesses in a half dtype, two or four in float32. Sums need one
# program per CHUNK. The others have short spans, so that small models keep a whole GPU busy. Those
# of the updates are in updates.py.
CONFIGURATIONS = {
    "squared_norm": Configuration(span=CHUNK, block=4096, threads=256),
    "grad_check": Configuration(span=CHUNK, block=4096, threads=256),
    "perturb_": Configuration(span=8192, block=2048, threads=256),
    "merge_": Configuration(span=8192, block=2048, threads=128),
}

PARTIALS_BLOCK, PARTIALS_THREADS = 1024, 256  # partial sums that are added at a time


# ---------------------------------------------------------------- a program's span


@triton.jit
def span_of(program, spans, addresses, LISTS: tl.constexpr, BLOCK: tl.constexpr):
    """The tensor's record; the span's first element, elements and number of whole blocks."""
    tensor = tl.load(spans + 3 * program)
    first = tl.load(spans + 3 * program + 1)
    n = tl.load(spans + 3 * program + 2).to(tl.int32)
    record = addresses + tensor * (LISTS + 1)
    whole = tl.where(tl.load(record) != 0, n // BLOCK, 0)
    return record, first, n, whole


@triton.jit
def at(record, LIST: tl.constexpr, first, DTYPE: tl.constexpr):
    """The pointer to element `first` of the tensor in one list."""
    return tl.load(record + 1 + LIST).to(tl.pointer_type(DTYPE)) + first


@triton.jit
def read(x, offsets, n, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(tl.multiple_of(x + offsets, 16))
    return tl.load(x + offsets, mask=offsets < n, other=0.0)


@triton.jit
def write(x, offsets, n, value, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(tl.multiple_of(x + offsets, 16), value)
    else:
        tl.store(x + offsets, value, mask=offsets < n)


@triton.jit
def all_read(WHOLE: tl.constexpr):
    """Between reads and writes of memory that is updated in place.

    Triton may spread element-wise reads and writes differently over the threads.
    """
    if not WHOLE:
        tl.debug_barrier()


# ---------------------------------------------------------------- squared_norm


@triton.jit
def squares(g_t, theta, offsets, n, ADAPTIVE: tl.constexpr, WHOLE: tl.constexpr):
    x = read(g_t, offsets, n, WHOLE).to(tl.float64)
    if ADAPTIVE:
        x = read(theta, offsets, n, WHOLE).to(tl.float64) * x
    return x * x


# LISTS: g_t, theta. bytes: 1n read (2n with theta)
@triton.jit
def squared_norm_kernel(
    spans, addresses, partials,
    ADAPTIVE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    record, first, n, whole = span_of(program, spans, addresses, 2, BLOCK)
    g_t = at(record, 0, first, DTYPE)
    theta = at(record, 1, first, DTYPE)
    total = tl.zeros((BLOCK,), tl.float64)
    for block in range(whole):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        total += squares(g_t, theta, offsets, n, ADAPTIVE, True)
    for block in range(whole, tl.cdiv(n, BLOCK)):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        total += squares(g_t, theta, offsets, n, ADAPTIVE, False)
    tl.store(partials + program, tl.sum(total, axis=0))


def squared_norm(g_t: Sequence[Tensor], theta: Sequence[Tensor] = ()) -> Tensor:
    """See reference.squared_norm."""
    span, block, threads = CONFIGURATIONS["squared_norm"]
    spans, addresses, programs = table(span, (g_t, theta))
    partials = torch.empty(programs, dtype=torch.float64, device=g_t[0].device)
    if programs:
        with on(partials.device):
            squared_norm_kernel[(programs,)](
                spans, addresses, partials,
                ADAPTIVE=len(theta) > 0, DTYPE=DTYPES[g_t[0].dtype], BLOCK=block,
                **launch_options(threads),
            )  # fmt: skip
    return partials


# ---------------------------------------------------------------- perturb_


@triton.jit(do_not_specialize=["count"])
def scale_kernel(
    partials, scale, count, rho: tl.float64, ARITHMETIC: tl.constexpr, BLOCK: tl.constexpr
):
    """rho / (norm + guard), rounded as reference.perturbation_scale rounds. One program."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        total += tl.load(partials + offsets, mask=offsets < count, other=0.0)
    norm = tl.sqrt(tl.sum(total, axis=0)).to(ARITHMETIC)
    guarded = norm + 1e-16  # reference.NORM_GUARD
    # In float64, where Triton divides exactly; the quotient of float32 numbers rounds the same.
    inverse = (1.0 / guarded.to(tl.float64)).to(ARITHMETIC)
    tl.store(scale, inverse * tl.full((), rho, ARITHMETIC))


@triton.jit
def perturb_block(
    theta, g_t, master, held, offsets, n, scale, ADAPTIVE: tl.constexpr, MASTER: tl.constexpr,
    HELD: tl.constexpr, DTYPE: tl.constexpr, ARITHMETIC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    saved = read(master if MASTER else theta, offsets, n, WHOLE)
    direction = read(g_t, offsets, n, WHOLE).to(ARITHMETIC)
    start = saved.to(ARITHMETIC)
    if HELD:
        rest = read(held, offsets, n, WHOLE).to(ARITHMETIC) - direction
    if ADAPTIVE:
        direction = start * start * direction
    moved = start + scale * direction
    all_read(WHOLE)
    if HELD:
        write(held, offsets, n, rest.to(DTYPE), WHOLE)
    if not MASTER:
        write(g_t, offsets, n, saved, WHOLE)
    write(theta, offsets, n, moved.to(DTYPE), WHOLE)


# LISTS: theta, g_t, master, held. bytes: 2n read, 2n written (with master 2n read, 1n written; with
# held 1n more each)
@triton.jit
def perturb_kernel(
    spans, addresses, scale,
    ADAPTIVE: tl.constexpr, MASTER: tl.constexpr, HELD: tl.constexpr, DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Backwards: what squared_norm read last is still in the L2 cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    scale = tl.load(scale)
    record, first, n, whole = span_of(program, spans, addresses, 4, BLOCK)
    theta = at(record, 0, first, DTYPE)
    g_t = at(record, 1, first, DTYPE)
    master = at(record, 2, first, ARITHMETIC)
    held = at(record, 3, first, DTYPE)
    for block in range(whole, tl.cdiv(n, BLOCK)):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        perturb_block(
            theta, g_t, master, held, offsets, n, scale, ADAPTIVE, MASTER, HELD, DTYPE,
            ARITHMETIC, False,
        )  # fmt: skip
    for back in range(whole):
        offsets = (whole - 1 - back) * BLOCK + tl.arange(0, BLOCK)
        perturb_block(
            theta, g_t, master, held, offsets, n, scale, ADAPTIVE, MASTER, HELD, DTYPE,
            ARITHMETIC, True,
        )  # fmt: skip


def perturb_(
    theta: Sequence[Tensor],
    g_t: Sequence[Tensor],
    partials: Tensor,
    rho: float,
    adaptive: bool = False,
    master: Sequence[Tensor] = (),
    held: Sequence[Tensor] = (),
) -> None:
    """See reference.perturb_. Two launches: the norm from the partials, then all tensors."""
    span, block, threads = CONFIGURATIONS["perturb_"]
    spans, addresses, programs = table(span, (theta, g_t, master, held))
    if not programs:
        return
    dtype = theta[0].dtype
    arithmetic = arithmetic_dtype(dtype)
    scale = torch.empty((), dtype=arithmetic, device=partials.device)
    with on(partials.device):
        scale_kernel[(1,)](
            partials.contiguous(), scale, len(partials), rho,
            ARITHMETIC=DTYPES[arithmetic], BLOCK=PARTIALS_BLOCK, **launch_options(PARTIALS_THREADS),
        )  # fmt: skip
        perturb_kernel[(programs,)](
            spans, addresses, scale,
            ADAPTIVE=adaptive, MASTER=len(master) > 0, HELD=len(held) > 0, DTYPE=DTYPES[dtype],
            ARITHMETIC=DTYPES[arithmetic], BLOCK=block, **launch_options(threads),
        )  # fmt: skip


# ---------------------------------------------------------------- merge_


@triton.jit
def merge_block(
    theta, saved, g_h, g_p, offsets, n, SAVED: tl.constexpr, HEAD: tl.constexpr,
    DTYPE: tl.constexpr, ARITHMETIC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    if SAVED:
        write(theta, offsets, n, read(saved, offsets, n, WHOLE), WHOLE)
    if HEAD:
        h = read(g_h, offsets, n, WHOLE).to(ARITHMETIC)
        p = read(g_p, offsets, n, WHOLE).to(ARITHMETIC)
        all_read(WHOLE)
        write(g_p, offsets, n, (h + p).to(DTYPE), WHOLE)


# LISTS: theta, saved, g_h, g_p. bytes: 3n read, 2n written with all lists present
@triton.jit
def merge_kernel(
    spans, addresses, SAVED: tl.constexpr, HEAD: tl.constexpr, DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    record, first, n, whole = span_of(tl.program_id(0), spans, addresses, 4, BLOCK)
    theta = at(record, 0, first, DTYPE)
    saved = at(record, 1, first, DTYPE)
    g_h = at(record, 2, first, DTYPE)
    g_p = at(record, 3, first, DTYPE)
    for block in range(whole):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        merge_block(theta, saved, g_h, g_p, offsets, n, SAVED, HEAD, DTYPE, ARITHMETIC, True)
    for block in range(whole, tl.cdiv(n, BLOCK)):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        merge_block(theta, saved, g_h, g_p, offsets, n, SAVED, HEAD, DTYPE, ARITHMETIC, False)


def merge_(
    theta: Sequence[Tensor],
    saved: Sequence[Tensor],
    g_h: Sequence[Tensor],
    g_p: Sequence[Tensor],
) -> None:
    """See reference.merge_."""
    span, block, threads = CONFIGURATIONS["merge_"]
    spans, addresses, programs = table(span, (theta, saved, g_h, g_p))
    if not programs or not (saved or g_h):
        return
    dtype = theta[0].dtype
    with on(theta[0].device):
        merge_kernel[(programs,)](
            spans, addresses, SAVED=len(saved) > 0, HEAD=len(g_h) > 0, DTYPE=DTYPES[dtype],
            ARITHMETIC=DTYPES[arithmetic_dtype(dtype)], BLOCK=block, **launch_options(threads),
        )  # fmt: skip


# ---------------------------------------------------------------- grad_check


@triton.jit
def gradient_sum(
    g_h, g_p, offsets, n, HEAD: tl.constexpr, ARITHMETIC: tl.constexpr, WHOLE: tl.constexpr
):
    total = read(g_p, offsets, n, WHOLE).to(ARITHMETIC)
    if HEAD:
        total = read(g_h, offsets, n, WHOLE).to(ARITHMETIC) + total
    return total


# LISTS: g_h, g_p. bytes: 2n read
@triton.jit
def grad_check_kernel(
    spans, addresses, partials, found_inf, HEAD: tl.constexpr, DTYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    record, first, n, whole = span_of(program, spans, addresses, 2, BLOCK)
    g_h = at(record, 0, first, DTYPE)
    g_p = at(record, 1, first, DTYPE)
    total = tl.zeros((BLOCK,), tl.float64)
    residue = tl.zeros((BLOCK,), ARITHMETIC)  # x - x is 0 where x is finite, else not a number
    for block in range(whole):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        x = gradient_sum(g_h, g_p, offsets, n, HEAD, ARITHMETIC, True)
        total += x.to(tl.float64) * x.to(tl.float64)
        residue += x - x
    for block in range(whole, tl.cdiv(n, BLOCK)):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        x = gradient_sum(g_h, g_p, offsets, n, HEAD, ARITHMETIC, False)
        total += x.to(tl.float64) * x.to(tl.float64)
        residue += x - x
    tl.store(partials + program, tl.sum(total, axis=0))
    # Every program that writes here writes the same.
    tl.store(found_inf, 1.0, mask=tl.sum(residue, axis=0) != 0)


def grad_check(g_h: Sequence[Tensor], g_p: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See reference.grad_check."""
    span, block, threads = CONFIGURATIONS["grad_check"]
    spans, addresses, programs = table(span, (g_h, g_p))
    device, dtype = g_p[0].device, g_p[0].dtype
    partials = torch.empty(programs, dtype=torch.float64, device=device)
    found_inf = torch.zeros(1, dtype=torch.float32, device=device)
    if programs:
        with on(device):
            grad_check_kernel[(programs,)](
                spans, addresses, partials, found_inf, HEAD=len(g_h) > 0, DTYPE=DTYPES[dtype],
                ARITHMETIC=DTYPES[arithmetic_dtype(dtype)], BLOCK=block,
                **launch_options(threads),
            )  # fmt: skip
    return partials, found_inf

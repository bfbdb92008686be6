"""Inputs of the optimizer phases: lists of tensors in every size and memory format."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from bases import BASES, LR, settings_of
from torch import Tensor

from imbsam_fast import ops
from imbsam_fast.ops.reference import CHUNK, arithmetic_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

RHO = 0.05

# The shapes of the tensors in one list.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "empty": [(0,), (3, 0)],
    "one element": [(1,)],
    "odd": [(7,), (), (0,), (3, 5), (129,), (0,)],
    "many": [(n % 29,) for n in range(300)],
    "beyond a chunk": [(2 * CHUNK + 5,), (17,)],
    "channels_last": [(4, 3, 5, 7), (2, 8, 1, 1), (16, 1, 3, 3)],
    "transposed": [(33, 17), (1, 5), (64, 64)],
    "misaligned": [(1001,), (3,), (5, 40)],
}


def _laid_out(values: Tensor, case: str) -> Tensor:
    """A copy of `values` in the memory format of the case."""
    if case == "channels_last":
        return values.clone(memory_format=torch.channels_last)
    if case == "transposed":
        return values.t().clone(memory_format=torch.contiguous_format).t()
    if case == "misaligned":
        return misaligned(values)
    return values.clone()


def misaligned(values: Tensor, offset: int = 1) -> Tensor:
    """A contiguous copy that starts `offset` elements into its memory."""
    memory = torch.empty(values.numel() + offset, dtype=values.dtype, device=values.device)
    return memory[offset:].view(values.shape).copy_(values)


def tensors(case: str, dtype: torch.dtype, seed: int, device: str = "cpu") -> list[Tensor]:
    """Normal values, the same for the same seed."""
    return [_laid_out(v, case).to(device) for v in _values(case, dtype, seed)]


@functools.cache
def _values(case: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES[case]
    ]


# The lists of a phase.
STATE = tuple(dict.fromkeys(name for base in BASES.values() for name in base.state))
NAMES = ("theta", "saved", "g_h", "g_p", *STATE)


def lists(case: str, dtype: torch.dtype, device: str = "cpu") -> SimpleNamespace:
    """All lists of a phase, each call with the same values."""
    return as_state(
        SimpleNamespace(
            **{name: tensors(case, dtype, seed, device) for seed, name in enumerate(NAMES)}
        )
    )


def as_state(x: SimpleNamespace) -> SimpleNamespace:
    """Makes what a base may have met of any lists: averages of squares are not negative."""
    for squares in (getattr(x, name, []) for name in ("v", "v_max")):
        for t in squares:
            t.abs_()
    # The square of an average is less than the average of the squares.
    for v, g_avg in zip(getattr(x, "v", []), getattr(x, "g_avg", [])):
        root = v.cpu().sqrt().to(v.device)  # a GPU's may differ in the last bit from the CPU's
        g_avg.copy_(g_avg.clamp(-1, 1) * root / 2)
    return x


def with_master(x: SimpleNamespace) -> SimpleNamespace:
    """The same with master weights in place of the saved ones, and the state kept like them."""
    x.saved, x.master = [], [t.float() for t in x.saved]
    for name in STATE:
        setattr(x, name, [t.float() for t in getattr(x, name)])
    for list_ in (x.master, x.m, x.v):
        torch._foreach_mul_(list_, 1 + 2**-12)  # which the half dtypes cannot hold
    return x


def doubles(list_: Sequence[Tensor]) -> list[Tensor]:
    """Copies in float64 on the CPU, for computing the truth."""
    return [t.detach().to("cpu", torch.float64, copy=True) for t in list_]


def scalar(value: float, device: str = "cpu") -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


SGD = BASES["sgd_update_"].settings  # of sgd_update_ after lr


def steps(count: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The steps taken by each of so many parameters, 0 and 1 in turn."""
    return [torch.tensor(float(i % 2), dtype=dtype, device=device) for i in range(count)]


def _perturb(x: SimpleNamespace, adaptive: bool, subtract: bool = False) -> list[Tensor]:
    partials = scalar(2.5, x.theta[0].device.type).reshape(1)
    master, held = getattr(x, "master", ()), x.g_h if subtract else ()
    ops.perturb_(x.theta, x.g_p, partials, RHO, adaptive, master, held)
    return [*x.theta, *x.g_p, *held]


def arguments_of(op: str, x: SimpleNamespace, variant: str = "") -> dict[str, Any]:
    """The arguments of a fused base's operator, but for grad_scale and found_inf."""
    base = BASES[op]
    settings, without = settings_of(op, variant)
    lists_ = {name: getattr(x, name) for name in ("theta", "saved", "g_h", "g_p", *base.state)}
    lists_ |= {name: [] for name in without}
    device = x.theta[0].device.type
    if base.has_step:
        lists_["step"] = steps(len(x.theta), device)
    return {**lists_, "lr": scalar(LR, device), **settings, "master": getattr(x, "master", ())}


def _update(op: str, variant: str, x: SimpleNamespace) -> list[Tensor]:
    arguments = arguments_of(op, x, variant)
    getattr(ops, op)(**arguments)
    written = ("theta", *BASES[op].state, "step", "master")
    return [t for name in written for t in arguments.get(name, ())]


def _merge(x: SimpleNamespace) -> list[Tensor]:
    ops.merge_(x.theta, x.saved, x.g_h, x.g_p)
    return [*x.theta, *x.g_p]


# Every operation on the lists above; each returns all that it wrote.
UPDATES: dict[str, Callable[[SimpleNamespace], list[Tensor]]] = {
    "perturb_": lambda x: _perturb(x, adaptive=False),
    "perturb_ adaptive": lambda x: _perturb(x, adaptive=True),
    "perturb_ held": lambda x: _perturb(x, adaptive=False, subtract=True),
    **{
        f"{op} {variant}".rstrip(): functools.partial(_update, op, variant)
        for op, base in BASES.items()
        for variant in ("", *base.variants)
    },
    "merge_": _merge,
}
# Those that take master weights, for half dtypes.
KEEPING = tuple(name for name in UPDATES if name != "merge_")
SUMS: dict[str, Callable[[SimpleNamespace], list[Tensor]]] = {
    "squared_norm": lambda x: [ops.squared_norm(x.g_p)],
    "squared_norm adaptive": lambda x: [ops.squared_norm(x.g_p, x.theta)],
    "grad_check": lambda x: [*ops.grad_check(x.g_h, x.g_p)],
}


# ---------------------------------------------------------------- cross-entropy


def logits_and_targets(
    rows: int, classes: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Normal logits (N, K) and labels (N,) of every class."""
    generator = torch.Generator().manual_seed(rows * 10007 + classes)
    logits = 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, classes, (rows,), generator=generator)
    return logits.to(device, dtype), targets.to(device)


def distributions(
    rows: int, classes: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Normal logits (N, K) and label distributions (N, K): mixed, one-hot, dense, and of zeros."""
    logits, targets = logits_and_targets(rows, classes, dtype)
    generator = torch.Generator().manual_seed(rows * 10007 + classes)
    other = targets[torch.randperm(rows, generator=generator)]
    share = torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    one, two = (torch.nn.functional.one_hot(y, classes).double() for y in (targets, other))
    q = share * one + (1 - share) * two
    q[::3] = torch.rand(len(q[::3]), classes, generator=generator).double().softmax(1)
    q[1::5] = one[1::5]
    q[4::7] = 0
    return logits.to(device), q.to(device, arithmetic_dtype(dtype))


def class_weights(
    classes: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """plain, sharp and class_weight (K,), with zeros in plain and in sharp."""
    k = torch.arange(classes, dtype=torch.float64)
    plain, sharp, class_weight = (k + 1) % 3 / 2, k % 3, 0.5 + k % 7 / 4
    to = {"device": device, "dtype": arithmetic_dtype(dtype)}
    return plain.to(**to), sharp.to(**to), class_weight.to(**to)


def cross_entropy_outputs(
    rows: int, classes: int, dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """Everything that one forward and backward of the operators return, with all options."""
    logits, targets = logits_and_targets(rows, classes, dtype, device)
    weights = class_weights(classes, dtype, device)
    targets[::5] = -100
    operators = torch.ops.imbsam_fast
    head, tail, b, lse = operators.split_cross_entropy(logits, targets, *weights, 0.1, -100, None)
    grad_head, grad_tail = torch.full_like(head, 0.5), torch.full_like(tail, 2.0)
    grad_logits = operators.split_cross_entropy_backward(
        grad_head, grad_tail, logits, targets, lse, b, *weights, 0.1, -100
    )
    return [head.reshape(1), tail.reshape(1), b.reshape(1), lse, grad_logits]

"""Inputs of the optimizer phases: lists of tensors in every size and memory format."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
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


# The lists of a phase; v and v_max are moments, not negative.
NAMES = ("theta", "saved", "g_h", "g_p", "m", "v", "v_max")


def lists(case: str, dtype: torch.dtype, device: str = "cpu") -> SimpleNamespace:
    """All lists of a phase, each call with the same values."""
    x = SimpleNamespace(
        **{name: tensors(case, dtype, seed, device) for seed, name in enumerate(NAMES)}
    )
    torch._foreach_abs_([*x.v, *x.v_max])
    return x


def with_master(x: SimpleNamespace) -> SimpleNamespace:
    """The same with master weights in place of the saved ones, and the state kept like them."""
    x.saved, x.master = [], [t.float() for t in x.saved]
    x.m, x.v, x.v_max = ([t.float() for t in list_] for list_ in (x.m, x.v, x.v_max))
    for list_ in (x.master, x.m, x.v):
        torch._foreach_mul_(list_, 1 + 2**-12)  # which the half dtypes cannot hold
    return x


def doubles(list_: Sequence[Tensor]) -> list[Tensor]:
    """Copies in float64 on the CPU, for computing the truth."""
    return [t.detach().to("cpu", torch.float64, copy=True) for t in list_]


def scalar(value: float, device: str = "cpu") -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


# The settings of sgd_update_ after lr.
SGD = {
    "momentum": 0.9,
    "dampening": 0.1,
    "weight_decay": 5e-4,
    "nesterov": False,
    "maximize": False,
}


# The settings of adam_update_ after lr.
ADAM = {
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "decoupled": True,
    "maximize": False,
}


def steps(count: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The steps taken by each of so many parameters, 0 and 1 in turn."""
    return [torch.tensor(float(i % 2), dtype=dtype, device=device) for i in range(count)]


def _perturb(x: SimpleNamespace, adaptive: bool, subtract: bool = False) -> list[Tensor]:
    partials = scalar(2.5, x.theta[0].device.type).reshape(1)
    master, held = getattr(x, "master", ()), x.g_h if subtract else ()
    ops.perturb_(x.theta, x.g_p, partials, RHO, adaptive, master, held)
    return [*x.theta, *x.g_p, *held]


def _sgd_update(x: SimpleNamespace, **changes: bool) -> list[Tensor]:
    lr = scalar(0.1, x.theta[0].device.type)
    master = getattr(x, "master", ())
    ops.sgd_update_(x.theta, x.saved, x.g_h, x.g_p, x.m, lr, **{**SGD, **changes}, master=master)
    return [*x.theta, *x.m, *master]


def _adam_update(x: SimpleNamespace, amsgrad: bool = False, **changes: bool) -> list[Tensor]:
    device = x.theta[0].device.type
    lr, step = scalar(0.01, device), steps(len(x.theta), device)
    master = getattr(x, "master", ())
    ops.adam_update_(
        x.theta, x.saved, x.g_h, x.g_p, x.m, x.v, x.v_max if amsgrad else [], step, lr,
        **{**ADAM, **changes}, master=master,
    )  # fmt: skip
    return [*x.theta, *x.m, *x.v, *x.v_max, *step, *master]


def _merge(x: SimpleNamespace) -> list[Tensor]:
    ops.merge_(x.theta, x.saved, x.g_h, x.g_p)
    return [*x.theta, *x.g_p]


# Every operation on the lists above; each returns all that it wrote.
UPDATES: dict[str, Callable[[SimpleNamespace], list[Tensor]]] = {
    "perturb_": lambda x: _perturb(x, adaptive=False),
    "perturb_ adaptive": lambda x: _perturb(x, adaptive=True),
    "perturb_ held": lambda x: _perturb(x, adaptive=False, subtract=True),
    "sgd_update_": _sgd_update,
    "sgd_update_ nesterov": lambda x: _sgd_update(x, nesterov=True, maximize=True),
    "adam_update_": _adam_update,
    "adam_update_ amsgrad": lambda x: _adam_update(x, amsgrad=True, decoupled=False, maximize=True),
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


def class_weights(
    classes: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """plain, sharp and class_weight (K,), with zeros in plain and in sharp."""
    k = torch.arange(classes, dtype=torch.float64)
    plain, sharp, class_weight = (k + 1) % 3 / 2, k % 3, 0.5 + k % 7 / 4
    to = {"device": device, "dtype": arithmetic_dtype(dtype)}
    return plain.to(**to), sharp.to(**to), class_weight.to(**to)


def cross_entropy_outputs(rows: int, classes: int, dtype: torch.dtype) -> list[Tensor]:
    """Everything that one forward and backward of the operators return, with all options."""
    logits, targets = logits_and_targets(rows, classes, dtype)
    weights = class_weights(classes, dtype)
    targets[::5] = -100
    operators = torch.ops.imbsam_fast
    head, tail, b, lse = operators.split_cross_entropy(logits, targets, *weights, 0.1, -100, None)
    grad_head, grad_tail = torch.full_like(head, 0.5), torch.full_like(tail, 2.0)
    grad_logits = operators.split_cross_entropy_backward(
        grad_head, grad_tail, logits, targets, lse, b, *weights, 0.1, -100
    )
    return [head.reshape(1), tail.reshape(1), b.reshape(1), lse, grad_logits]

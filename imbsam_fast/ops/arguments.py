"""Checks of the tensor lists that operators take, and copies where a layout does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unobserved() -> bool:
    """Whether no compiler, profiler, transform or dispatch mode wants to see the operators.

    Plain tensors then go straight to the backend: torch's dispatcher takes longer than the
    kernels of a small network.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.autograd._profiler_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or is_in_torch_dispatch_mode()
    )


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    return _is_in_torch_func() or forward_ad._current_level >= 0


def _is_in_torch_func() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# torch.compile takes the None of an empty stack for an object, and so would compile the losses from
# their definition. It asks this function once, when it compiles, and guards on the stack by itself.
# The name is what torch.compiler.assume_constant_result sets, which would import the compiler.
_is_in_torch_func._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _describe(t: Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)} with strides {t.stride()} on {t.device}"


def check_dense(name: str, t: Tensor) -> None:
    """Refuse a tensor whose elements do not fill one block of memory without overlap."""
    if t.is_contiguous():
        return
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape)):
        if size > 1 and stride != expected:
            raise ValueError(
                f"{name} is {_describe(t)}, expected a dense layout "
                "(contiguous or a permutation of it)"
            )
        expected *= size


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape order their elements in memory alike."""
    strides = a.stride(), b.stride()
    return strides[0] == strides[1] or all(n <= 1 or s == t for n, s, t in zip(a.shape, *strides))


def _only_ordered_otherwise(t: Tensor, p: Tensor) -> bool:
    return (t.shape, t.dtype, t.device) == (p.shape, p.dtype, p.device) and not same_layout(t, p)


def in_layout_of(
    params: Sequence[Tensor], tensors: list[Tensor | None], name: str
) -> list[Tensor | None]:
    """`tensors`, those that order their elements otherwise than their parameter copied.

    Raises TypeError for one that is not strided, calling it `name`.
    """
    if unobserved() and native.pairs_match(params, tensors):
        return tensors
    for i, t in enumerate(tensors):
        if t is not None and t.layout != torch.strided:
            raise TypeError(f"{name} of parameter {i} is {t.layout}, expected strided")
    return [
        torch.empty_like(p).copy_(t) if t is not None and _only_ordered_otherwise(t, p) else t
        for p, t in zip(params, tensors)
    ]


# The lists of an operator as they go straight to a backend, each read once.
Lists = list[Any]


def check_lists(op: str, **lists: Sequence[Tensor]) -> Lists | None:
    """Refuse lists that do not match the first one tensor by tensor; [] is always allowed.

    Returns what stands for them where the operator need not go through torch's dispatcher.
    """
    if unobserved() and (read := native.read_lists([*lists.values()])) is not None:
        return read  # else what follows finds out what is wrong, or that nothing is
    (first_name, first), *others = lists.items()
    if not first:
        raise ValueError(f"{op}: {first_name} is empty, expected at least one tensor")
    expected = _signatures(first)
    dtype, device = first[0].dtype, first[0].device
    if dtype not in DTYPES:
        raise TypeError(
            f"{op}: {first_name}[0] is {dtype}, expected one of {', '.join(map(str, DTYPES))}"
        )
    for i, (t, signature) in enumerate(zip(first, expected)):
        if t.layout != torch.strided:
            raise TypeError(f"{op}: {first_name}[{i}] is {t.layout}, expected a strided tensor")
        if signature[:2] != (dtype, device):
            raise ValueError(
                f"{op}: {first_name}[{i}] is {t.dtype} on {t.device}, expected {dtype} on "
                f"{device} as {first_name}[0]"
            )
        check_dense(f"{op}: {first_name}[{i}]", t)
    for name, tensors in others:
        if tensors and len(tensors) != len(first):
            raise ValueError(
                f"{op}: {name} has {len(tensors)} tensors, expected {len(first)} as {first_name}"
            )
        if tensors and _signatures(tensors) != expected:
            _check_pairs(op, name, tensors, first_name, first)
    return None


def _signatures(tensors: Sequence[Tensor]) -> list[tuple]:
    """What must agree between lists, compared at once."""
    return [(t.dtype, t.device, t.layout, t.shape, t.stride()) for t in tensors]


def _check_pairs(
    op: str, name: str, tensors: Sequence[Tensor], first_name: str, first: Sequence[Tensor]
) -> None:
    for i, (t, f) in enumerate(zip(tensors, first)):
        if t.layout != torch.strided:
            raise TypeError(f"{op}: {name}[{i}] is {t.layout}, expected a strided tensor")
        same = (t.dtype, t.device, t.shape) == (f.dtype, f.device, f.shape)
        if not (same and same_layout(t, f)):
            raise ValueError(
                f"{op}: {name}[{i}] is {_describe(t)}, expected {_describe(f)} as {first_name}[{i}]"
            )


def check_master(op: str, theta: Sequence[Tensor], **kept: Sequence[Tensor]) -> Lists | None:
    """Refuse lists that differ from theta in more than their dtype, float32; [] is allowed.

    They are the master weights of half-precision parameters and the state kept with them.
    Returns what `check_lists` does.
    """
    if theta[0].dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"{op}: theta[0] is {theta[0].dtype}, expected with master weights torch.bfloat16 or "
            "torch.float16"
        )
    for name, tensors in kept.items():
        if tensors and len(tensors) != len(theta):
            raise ValueError(
                f"{op}: {name} has {len(tensors)} tensors, expected {len(theta)} as theta"
            )
        for i, (t, p) in enumerate(zip(tensors, theta)):
            if t.layout != torch.strided:
                raise TypeError(f"{op}: {name}[{i}] is {t.layout}, expected a strided tensor")
            same = (t.dtype, t.device, t.shape) == (torch.float32, p.device, p.shape)
            if not (same and same_layout(t, p)):
                raise ValueError(
                    f"{op}: {name}[{i}] is {_describe(t)}, expected torch.float32 and otherwise "
                    f"{_describe(p)} as theta[{i}]"
                )
    return native.read_lists([*kept.values()]) if unobserved() else None


def check_scalars(op: str, **scalars: Tensor | None) -> None:
    """Refuse tensors of another size than one element; None is allowed."""
    for name, scalar in scalars.items():
        if scalar is not None and scalar.numel() != 1:
            raise ValueError(f"{op}: {name} has shape {tuple(scalar.shape)}, expected one element")


def check_steps(op: str, step: Sequence[Tensor], theta: Sequence[Tensor]) -> None:
    """Refuse what are no counts of steps, one a parameter, on one device."""
    if len(step) != len(theta):
        raise ValueError(f"{op}: step has {len(step)} tensors, expected {len(theta)} as theta")
    kind = step[0].device, step[0].dtype
    for i, s in enumerate(step):
        if s.numel() != 1 or s.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{op}: step[{i}] is {s.dtype} {tuple(s.shape)}, expected one element of "
                "torch.float32 or torch.float64"
            )
        if (s.device, s.dtype) != kind or s.device not in (torch.device("cpu"), theta[0].device):
            raise ValueError(
                f"{op}: step[{i}] is {s.dtype} on {s.device}, expected all alike on the CPU or on "
                f"{theta[0].device} as theta"
            )

"""Checks of single arguments, whose errors give the name, the value and what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor


def check_number(
    name: str, value: object, expected: str, accepts: Callable[[float], bool] = math.isfinite
) -> float:
    """`value` where it is a number that `accepts` takes; True is not one."""
    if not isinstance(value, Real) or isinstance(value, bool) or not accepts(float(value)):
        raise ValueError(f"{name} is {value!r}, expected {expected}")
    return float(value)


def check_whole_number(name: str, value: object, expected: str, least: int | None = None) -> int:
    """`value` where it is an integer, and at least `least`."""
    fits = isinstance(value, Integral) and not isinstance(value, bool)
    if not fits or (least is not None and int(value) < least):  # type: ignore[call-overload]
        raise ValueError(f"{name} is {value!r}, expected {expected}")
    return int(value)  # type: ignore[call-overload]


def check_bool(name: str, value: object) -> bool:
    """True or False, returned; ValueError for anything else."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected True or False")
    return value


def check_no_gradient(action: str, params: Sequence[Tensor]) -> None:
    """Refuse gradients in `p.grad` that a step would have to drop."""
    for i, p in enumerate(params):
        if p.grad is not None:
            raise RuntimeError(
                f"parameter {i} has a gradient before {action}, expected None: the step makes its "
                "gradients itself; call optimizer.zero_grad() to drop it, or let the criterion add "
                "to the losses what it is the gradient of"
            )


def check_weights(name: str, weights: object) -> Tensor:
    """`weights` where it is a floating point tensor (K,) of finite values >= 0."""
    if not isinstance(weights, Tensor):
        raise TypeError(
            f"{name} is {type(weights).__name__}, expected a floating point tensor (K,)"
        )
    if weights.dim() != 1 or len(weights) == 0 or not weights.is_floating_point():
        raise ValueError(
            f"{name} is {weights.dtype} {tuple(weights.shape)}, expected floating point (K,)"
        )
    if weights.is_meta:
        raise ValueError(f"{name} is on meta, expected a tensor with values")
    if not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError(f"{name} is {weights}, expected finite weights >= 0")
    return weights


# ---------------------------------------------------------------- of calls


def check_batch_size(name: str, batch_size: object) -> None:
    """None, or a finite number >= 1."""
    fits = isinstance(batch_size, (int, float)) and 1 <= batch_size < math.inf
    if batch_size is not None and not fits:
        raise ValueError(f"{name} is {batch_size!r}, expected a finite number >= 1")


def check_max_norm(max_norm: object) -> None:
    """None, or a number > 0; infinity measures and clips nothing."""
    if max_norm is not None:
        check_number("max_norm", max_norm, "a number > 0", lambda x: x > 0)


def check_grad_scaler(grad_scaler: object) -> None:
    """None, or a torch.amp.GradScaler."""
    if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
        raise TypeError(
            f"grad_scaler is {type(grad_scaler).__name__}, expected a torch.amp.GradScaler"
        )

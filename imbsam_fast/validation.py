"""Checks of single arguments, whose errors give the name, the value and what was expected."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

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


# ---------------------------------------------------------------- of ImbSAM and its calls


def check_memory(params: Sequence[Tensor]) -> None:
    """Refuse parameters that share memory: one would be updated twice, the other never saved."""
    spans = sorted(
        (str(p.device), p.data_ptr(), i)
        for i, p in enumerate(params)
        if p.numel() and not p.is_meta and type(p) in (Tensor, torch.nn.Parameter)
    )
    for (device, start, i), (other_device, other_start, j) in itertools.pairwise(spans):
        if params[i] is params[j]:
            raise ValueError(f"parameter {j} is parameter {i} again, expected each of them once")
        if device == other_device and other_start < start + params[i].nbytes:
            raise ValueError(
                f"parameters {i} and {j} share memory, expected each in its own; tie weights by "
                "one nn.Parameter in both places"
            )


def check_rho(rho: object, name: str = "rho") -> None:
    """A finite number >= 0; a model in its place is told apart, as the authors' code takes one."""
    if isinstance(rho, torch.nn.Module):
        raise ValueError(
            f"{name} is {type(rho).__name__}, expected a finite number >= 0; ImbSAM takes no model"
        )
    check_number(name, rho, "a finite number >= 0", _is_not_negative)


def check_own_settings(name: str, group: dict[str, Any]) -> None:
    """Refuse values of what ImbSAM adds to a group, where there are any."""
    if "rho" in group:
        check_rho(group["rho"], f"{name}['rho']")
    for setting in ("adaptive", "perturb"):
        if setting in group:
            check_bool(f"{name}['{setting}']", group[setting])


def check_group(name: str, group: dict[str, Any], base: torch.optim.Optimizer) -> None:
    """Refuse settings that torch lets into a group and that no step could use."""
    check_own_settings(name, group)
    if group.get("differentiable"):
        raise ValueError(f"{name}['differentiable'] is True, expected False")
    if type(base) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        return
    for i, beta in enumerate(group.get("betas", ())):
        if not isinstance(beta, Tensor):
            where = f"{name}['betas'][{i}]"
            check_number(where, beta, "a number >= 0 and < 1", lambda x: 0 <= x < 1)
    for setting in ("lr", "momentum", "weight_decay", "dampening", "eps"):
        value = group.get(setting, 0.0)
        if setting == "lr" and isinstance(value, Tensor):
            continue  # looked at on the device, by the step
        if setting == "dampening":  # may be negative, as for torch.optim.SGD
            check_number(f"{name}['dampening']", value, "a finite number")
        else:
            check_number(f"{name}['{setting}']", value, "a finite number >= 0", _is_not_negative)


def check_state_dict(state_dict: object, base: torch.optim.Optimizer) -> None:
    """The state_dict of an optimizer with groups that fit `base`."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise TypeError(
            f"state_dict is {state_dict!r:.80}, expected a dict with 'state' and 'param_groups'"
        )
    for i, group in enumerate(state_dict["param_groups"]):
        check_group(f"state_dict['param_groups'][{i}]", group, base)


def _is_not_negative(x: float) -> bool:
    return 0 <= x < math.inf


def check_batch_size(name: str, batch_size: object) -> None:
    """None, or a finite number >= 1."""
    fits = isinstance(batch_size, (int, float)) and 1 <= batch_size < math.inf
    if batch_size is not None and not fits:
        raise ValueError(f"{name} is {batch_size!r}, expected a finite number >= 1")


def check_max_norm(max_norm: object) -> None:
    """None, or a finite number > 0."""
    if max_norm is not None:
        check_number("max_norm", max_norm, "a finite number > 0", lambda x: 0 < x < float("inf"))


def check_grad_scaler(grad_scaler: object) -> None:
    """None, or a torch.amp.GradScaler."""
    if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
        raise TypeError(
            f"grad_scaler is {type(grad_scaler).__name__}, expected a torch.amp.GradScaler"
        )

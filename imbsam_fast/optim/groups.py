"""Checks of what ImbSAM and its base are given: parameters, groups and checkpoints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..validation import check_bool
from .bases import NOT_NEGATIVE, check_settings

# What a group carries besides the base's settings.
OWN_SETTINGS = ("rho", "adaptive", "perturb")


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
            f"{name} is {type(rho).__name__}, expected a finite number >= 0; ImbSAM takes no model:"
            "\n    optimizer = ImbSAM(optimizer, rho=0.05)"
        )
    NOT_NEGATIVE(name, rho)


def check_own_settings(name: str, group: dict[str, Any]) -> None:
    """Refuse values of what ImbSAM adds to a group, where there are any."""
    rho, adaptive, perturb = map(group.get, OWN_SETTINGS)
    if type(rho) is float and 0 <= rho < math.inf and type(adaptive) is type(perturb) is bool:
        return  # as in almost every step, of which the rest would take more than its share
    if "rho" in group:
        check_rho(group["rho"], f"{name}['rho']")
    for setting in ("adaptive", "perturb"):
        if setting in group:
            check_bool(f"{name}['{setting}']", group[setting])


def check_group(name: str, group: dict[str, Any], base: Optimizer) -> None:
    """Refuse settings that torch lets into a group and that no step could use."""
    check_own_settings(name, group)
    if group.get("differentiable"):
        raise ValueError(f"{name}['differentiable'] is True, expected False")
    check_settings(name, group, base)


def check_state_dict(state_dict: object, base: Optimizer) -> None:
    """The state_dict of an optimizer with groups that fit `base`."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise TypeError(
            f"state_dict is {state_dict!r:.80}, expected a dict with 'state' and 'param_groups'"
        )
    for i, group in enumerate(state_dict["param_groups"]):
        check_group(f"state_dict['param_groups'][{i}]", group, base)

"""The fused bases: one entry for each torch optimizer whose step `updates` takes in one kernel.

Another base is another entry here and an operator in `ops.updates`: CONTRIBUTING.md names every
place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from ..validation import check_number
from .buckets import params_of
from .shards import strange_kind

Group = dict[str, Any]


class Check(NamedTuple):
    """A condition on a number among a group's settings, e.g. >= 0."""

    expected: str
    accepts: Callable[[float], bool]

    def __call__(self, name: str, value: object) -> None:
        """Raises ValueError, calling it `name`, where `value` is not accepted."""
        check_number(name, value, self.expected, self.accepts)


FINITE = Check("a finite number", math.isfinite)
NOT_NEGATIVE = Check("a finite number >= 0", lambda x: 0 <= x < math.inf)
DECAY_RATE = Check("a number >= 0 and < 1", lambda x: 0 <= x < 1)


def _always(group: Group) -> bool:
    return True


def _never(group: Group) -> bool:
    return False


class Base(NamedTuple):
    """How the step of some torch optimizers is one launch of a fused operator."""

    classes: tuple[type[Optimizer], ...]
    # In `ops`, with check_<name> beside it. It takes (theta, saved, g_h, g_p, *state, step where
    # there is one, lr, *settings, maximize, grad_scale, found_inf, master).
    operator: str
    # The lists of its state in the operator's order, by their names in `base.state[p]`: whether
    # the parameters of a group have one. It is zero before the first step, in the dtype of the
    # weights, which is float32 beside master weights.
    state: dict[str, Callable[[Group], bool]]
    # The numbers among a group's settings besides lr. A tuple of numbers is checked one by one.
    numbers: dict[str, Check]
    # The operator's settings, from the group, and whether this is the first step of its parameters.
    settings: Callable[[Group, bool], tuple[float, ...]]
    has_step: bool = True  # whether `base.state[p]["step"]` counts the steps
    # Whether the first step has other settings than those that follow. It is the one that finds
    # no state, and skipping it must leave none.
    first_differs: Callable[[Group], bool] = _never


def _sgd_settings(group: Group, is_first: bool) -> tuple[float, ...]:
    # The first step of torch.optim.SGD takes the gradient undampened.
    dampening = 0.0 if is_first else group["dampening"]
    return group["momentum"], dampening, group["weight_decay"], group["nesterov"]


def _adam(kind: type[Optimizer], decoupled: bool) -> Base:
    def settings(group: Group, _: bool) -> tuple[float, ...]:
        # torch before 2.7 has AdamW beside Adam, and no such setting.
        is_decoupled = group.get("decoupled_weight_decay", decoupled)
        return *group["betas"], group["eps"], group["weight_decay"], is_decoupled

    return Base(
        classes=(kind,),
        operator="adam_update_",
        state={
            "exp_avg": _always,
            "exp_avg_sq": _always,
            "max_exp_avg_sq": lambda group: group["amsgrad"],
        },
        numbers={"betas": DECAY_RATE, "weight_decay": NOT_NEGATIVE, "eps": NOT_NEGATIVE},
        settings=settings,
    )


BASES = (
    Base(
        classes=(SGD,),
        operator="sgd_update_",
        state={"momentum_buffer": lambda group: group["momentum"] != 0},
        numbers={"momentum": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "dampening": FINITE},
        settings=_sgd_settings,
        has_step=False,
        first_differs=lambda group: group["momentum"] != 0 and group["dampening"] != 0,
    ),
    _adam(Adam, decoupled=False),
    _adam(AdamW, decoupled=True),
    Base(
        classes=(RMSprop,),
        operator="rmsprop_update_",
        state={
            "square_avg": _always,
            "momentum_buffer": lambda group: group["momentum"] > 0,
            "grad_avg": lambda group: group["centered"],
        },
        numbers=dict.fromkeys(("alpha", "eps", "weight_decay", "momentum"), NOT_NEGATIVE),
        settings=lambda g, _: (g["alpha"], g["eps"], g["weight_decay"], g["momentum"]),
    ),
)

FUSED = {kind: base for base in BASES for kind in base.classes}

# What is kept in the dtype of the weights, in any base's state.
STATE_NAMES = frozenset(name for base in BASES for name in base.state)


def reason_not_fused(optimizer: Optimizer) -> str | None:
    """Why the fused step would differ from optimizer.step(), or None if it would not."""
    base = FUSED.get(type(optimizer))  # a subclass may step otherwise
    if base is None:
        return f"base is {type(optimizer).__name__}"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "base has step hooks, which may want the merged gradient"
    for group in optimizer.param_groups:
        for name in base.numbers:
            numbers = _items(group, name)
            if numbers and any(isinstance(number, Tensor) for number in numbers):
                return f"base has {name} that are tensors"
    if base.has_step and (kind := strange_kind(params_of(optimizer.param_groups))) is not None:
        # It may run an operator once for each tensor inside, which would count as many steps.
        return f"parameters are {kind.__name__}, a subclass of Tensor"
    return None


def check_fused(optimizer: Optimizer) -> None:
    """Raise an error for a base that is not fused; master weights need one."""
    reason = reason_not_fused(optimizer)
    if reason is not None:
        names = ", ".join(f"torch.optim.{kind.__name__}" for kind in FUSED)
        raise ValueError(
            f"{reason}, expected with master_weights=True one of {names}, without step hooks"
        )


def check_settings(name: str, group: Group, optimizer: Optimizer) -> None:
    """Raise ValueError for numbers in a group that torch accepts but that no step could use."""
    base = FUSED.get(type(optimizer))
    if base is None:
        return
    for setting, check in {"lr": NOT_NEGATIVE, **base.numbers}.items():
        for i, value in enumerate(_items(group, setting)):
            if not isinstance(value, Tensor):  # else the base takes its own step
                check(f"{name}['{setting}'][{i}]", value)
        value = group.get(setting, 0.0)  # a checkpoint may lack it
        if setting == "lr" and isinstance(value, Tensor):
            continue  # looked at on the device, by the step
        if not isinstance(value, (tuple, list)):
            check(f"{name}['{setting}']", value)


def _items(group: Group, name: str) -> tuple:
    """The numbers in a setting such as betas; () for a setting that is one number."""
    value = group.get(name)
    return tuple(value) if isinstance(value, (tuple, list)) else ()

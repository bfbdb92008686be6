"""What the tests know of every fused base, in one place: its lists, settings and equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imbsam_fast.optim import bases

Settings = dict[str, Any]

LR = 0.01


class Base(NamedTuple):
    """A fused base in the tests: its operator takes `state` after g_p and `settings` after lr."""

    state: tuple[str, ...]  # lists of `samples.lists`
    optional: tuple[str, ...]  # those of them that may be []
    settings: Settings
    # Other settings by name. "without" has lists of the state that are [] then.
    variants: dict[str, Settings]
    # theta and the state after a step, in float64: from theta, g, the state (None where it is [])
    # and the steps taken, this one included.
    stepped: Callable[..., tuple[Tensor, ...]]
    # torch's optimizer with the operator's settings.
    optimizer: Callable[..., torch.optim.Optimizer]
    # What torch.optim's class is tried with besides its defaults and lr.
    configurations: tuple[Settings, ...]
    has_step: bool = True
    has_roots: bool = True  # torch's roots on the CPU may be off by the last bit


def _sgd_stepped(
    theta: Tensor, g: Tensor, m: Tensor | None, n: int, momentum: float, dampening: float,
    weight_decay: float, nesterov: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    d = g + weight_decay * theta
    if m is None:
        return theta - LR * d, d
    m = momentum * m + (1 - dampening) * d
    return theta - LR * (d + momentum * m if nesterov else m), m


def _adam_stepped(
    theta: Tensor, g: Tensor, m: Tensor, v: Tensor, bound: Tensor | None, n: int, beta1: float,
    beta2: float, eps: float, weight_decay: float, decoupled: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    d = g if decoupled else g + weight_decay * theta
    m = beta1 * m + (1 - beta1) * d
    v = beta2 * v + (1 - beta2) * d.square()
    bound = v if bound is None else torch.maximum(bound, v)
    update = m / (1 - beta1**n) / ((bound / (1 - beta2**n)).sqrt() + eps)
    return theta - LR * (update + (weight_decay * theta if decoupled else 0)), m, v, bound


def _adam(
    params: list[Tensor], beta1: float, beta2: float, decoupled: bool, v_max: bool, **settings: Any
) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return kind(params, betas=(beta1, beta2), amsgrad=v_max, **settings)


def _rmsprop_stepped(
    theta: Tensor, g: Tensor, v: Tensor, m: Tensor | None, g_avg: Tensor | None, n: int,
    alpha: float, eps: float, weight_decay: float, momentum: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    d = g + weight_decay * theta
    v = alpha * v + (1 - alpha) * d.square()
    g_avg = torch.zeros_like(d) if g_avg is None else alpha * g_avg + (1 - alpha) * d
    update = d / ((v - g_avg.square()).sqrt() + eps)
    update = update if m is None else momentum * m + update
    return theta - LR * update, v, update, g_avg


def _rmsprop(params: list[Tensor], m: bool, g_avg: bool, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(params, centered=g_avg, **settings)


BASES = {
    "sgd_update_": Base(
        state=("m",),
        optional=("m",),
        settings={
            "momentum": 0.9, "dampening": 0.1, "weight_decay": 5e-4, "nesterov": False,
            "maximize": False,
        },
        variants={
            "nesterov": {"nesterov": True, "dampening": 0.0, "maximize": True},
            "undampened": {"dampening": 0.0, "weight_decay": 0.0},
            "without momentum": {"momentum": 0.0, "dampening": 0.0, "without": ("m",)},
        },
        stepped=_sgd_stepped,
        optimizer=lambda params, m, **settings: torch.optim.SGD(params, **settings),
        configurations=(
            {"momentum": 0.9, "weight_decay": 0.1},
            {"momentum": 0.9, "dampening": 0.3, "maximize": True},
            {"momentum": 0.9, "nesterov": True},
            {"weight_decay": 0.1},
        ),
        has_step=False,
        has_roots=False,
    ),
    "adam_update_": Base(
        state=("m", "v", "v_max"),
        optional=("v_max",),
        settings={
            "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "decoupled": True,
            "maximize": False,
        },
        variants={
            "amsgrad": {"decoupled": False, "maximize": True},
            "coupled": {"decoupled": False, "maximize": True, "without": ("v_max",)},
            "other rates": {
                "weight_decay": 0.0, "eps": 1e-3, "beta1": 0.5, "beta2": 0.9,
                "without": ("v_max",),
            },
        },
        stepped=_adam_stepped,
        optimizer=_adam,
        configurations=(
            {"weight_decay": 0.1},
            {"amsgrad": True, "betas": (0.5, 0.9), "eps": 1e-3},
            {"maximize": True, "weight_decay": 0.1},
        ),
    ),
    "rmsprop_update_": Base(
        state=("v", "m", "g_avg"),
        optional=("m", "g_avg"),
        settings={
            "alpha": 0.9, "eps": 1e-2, "weight_decay": 0.01, "momentum": 0.9, "maximize": False,
        },
        variants={
            "plain": {"momentum": 0.0, "alpha": 0.99, "maximize": True, "without": ("m", "g_avg")},
            "momentum": {"weight_decay": 0.0, "without": ("g_avg",)},
            "centered": {"momentum": 0.0, "alpha": 0.3, "without": ("m",)},
        },
        stepped=_rmsprop_stepped,
        optimizer=_rmsprop,
        configurations=(
            {"weight_decay": 0.1},
            {"momentum": 0.9, "alpha": 0.9, "eps": 1e-3},
            {"centered": True, "maximize": True},
            {"centered": True, "momentum": 0.5, "alpha": 0.4, "weight_decay": 0.1},
        ),
    ),
}  # fmt: skip

# Of torch.optim, with the settings that they are tried with.
CLASSES = [
    (kind, {"lr": LR, **settings})
    for base in bases.BASES
    for kind in base.classes
    for settings in BASES[base.operator].configurations
]


def class_id(value: Any) -> str:
    """How a class, or its settings but for lr, are called in the names of tests."""
    if isinstance(value, type):
        return value.__name__
    return "-".join(name for name in value if name != "lr")


def settings_of(op: str, variant: str = "") -> tuple[Settings, tuple[str, ...]]:
    """The settings of an operator and the lists of its state that are [] then."""
    base = BASES[op]
    changes = dict(base.variants[variant]) if variant else {}
    without = changes.pop("without", ())
    return {**base.settings, **changes}, without

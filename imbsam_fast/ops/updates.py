"""The operators of the fused bases: the one launch that restores theta and takes the base's step.

As in operators.py, each has the arguments of its namesake in `reference.py`. A backend has one
`update_` for all of them, which tells them apart by their name.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import dispatch
from .arguments import Lists, check_lists, check_master, check_scalars, check_steps
from .library import NAMESPACE, define, fake, mutated, run

# ---------------------------------------------------------------- what all need


def _check(op, theta, saved, g_h, g_p, master, state, required=(), **scalars) -> Lists | None:
    """Refuse the arguments of any base; `state` is kept like the weights.

    Returns what check_lists does: theta, saved, g_h, g_p, the state, master.
    """
    if master and saved:
        raise ValueError(f"{op}: saved has {len(saved)} tensors, expected none beside master")
    lists = {"theta": theta, "g_p": g_p, "saved": saved, "g_h": g_h}
    read = check_lists(op, **lists, **({} if master else state))
    if not g_p:
        raise ValueError(f"{op}: g_p is empty, expected one gradient for every parameter")
    kept: Lists | None = [master]
    if master:
        kept = check_master(op, theta, **state, master=master)
    for name in required:
        if not state[name]:
            raise ValueError(f"{op}: {name} is empty, expected one tensor a parameter")
    check_scalars(op, **scalars)
    if read is None or kept is None:
        return None
    theta, g_p, saved, g_h, *read_state = read
    return [theta, saved, g_h, g_p, *read_state, *kept]


def _check_momentum(op: str, m: Sequence[Tensor], momentum: float) -> None:
    if (momentum != 0) != (len(m) > 0):
        raise ValueError(
            f"{op}: m has {len(m)} tensors with momentum {momentum}, "
            "expected momentum buffers exactly when momentum is not 0"
        )


def _update(op, theta, saved, g_h, g_p, state, step, *scalars_and_master) -> None:
    backend = dispatch.select(theta[0].device)
    backend.update_(op, theta, saved, g_h, g_p, state, step, *scalars_and_master)
    mutated(theta, *state, step, scalars_and_master[-1])


# ---------------------------------------------------------------- SGD


def check_sgd_update(
    theta, saved, g_h, g_p, m, lr, momentum, dampening, weight_decay, nesterov, maximize,
    grad_scale=None, found_inf=None, master=(),
) -> Lists | None:  # fmt: skip
    """Refuse arguments that sgd_update_ would refuse; returns what _check does."""
    scalars = {"lr": lr, "grad_scale": grad_scale, "found_inf": found_inf}
    read = _check("sgd_update_", theta, saved, g_h, g_p, master, {"m": m}, **scalars)
    _check_momentum("sgd_update_", m, momentum)
    return read


def sgd_update_(
    theta: Sequence[Tensor],
    saved: Sequence[Tensor],
    g_h: Sequence[Tensor],
    g_p: Sequence[Tensor],
    m: Sequence[Tensor],
    lr: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    master: Sequence[Tensor] = (),
) -> None:
    """See reference.sgd_update_."""
    arguments = (
        theta, saved, g_h, g_p, m, lr, momentum, dampening, weight_decay, nesterov, maximize,
        grad_scale, found_inf, master,
    )  # fmt: skip
    read = check_sgd_update(*arguments)
    run(_sgd_update_, NAMESPACE.sgd_update_, read, arguments)


@define(
    "sgd_update_(Tensor(a!)[] theta, Tensor[] saved, Tensor[] g_h, Tensor[] g_p,"
    " Tensor(b!)[] m, Tensor lr, float momentum, float dampening, float weight_decay,"
    " bool nesterov, bool maximize, Tensor? grad_scale, Tensor? found_inf,"
    " Tensor(c!)[] master) -> ()"
)
def _sgd_update_(
    theta, saved, g_h, g_p, m, lr, momentum, dampening, weight_decay, nesterov, *rest
):  # fmt: skip
    settings = momentum, dampening, weight_decay, nesterov
    _update("sgd_update_", theta, saved, g_h, g_p, (m,), (), lr, settings, *rest)


# ---------------------------------------------------------------- Adam and AdamW


def check_adam_update(
    theta, saved, g_h, g_p, m, v, v_max, step, lr, beta1, beta2, eps, weight_decay, decoupled,
    maximize, grad_scale=None, found_inf=None, master=(),
) -> Lists | None:  # fmt: skip
    """Refuse arguments that adam_update_ would refuse; returns what _check does."""
    scalars = {"lr": lr, "grad_scale": grad_scale, "found_inf": found_inf}
    state = {"m": m, "v": v, "v_max": v_max}
    op = "adam_update_"
    read = _check(op, theta, saved, g_h, g_p, master, state, ("m", "v"), **scalars)
    check_steps(op, step, theta)
    return read


def adam_update_(
    theta: Sequence[Tensor],
    saved: Sequence[Tensor],
    g_h: Sequence[Tensor],
    g_p: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    v_max: Sequence[Tensor],
    step: Sequence[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    master: Sequence[Tensor] = (),
) -> None:
    """See reference.adam_update_."""
    arguments = (
        theta, saved, g_h, g_p, m, v, v_max, step, lr, beta1, beta2, eps, weight_decay, decoupled,
        maximize, grad_scale, found_inf, master,
    )  # fmt: skip
    read = check_adam_update(*arguments)
    run(_adam_update_, NAMESPACE.adam_update_, read, arguments)


@define(
    "adam_update_(Tensor(a!)[] theta, Tensor[] saved, Tensor[] g_h, Tensor[] g_p, Tensor(b!)[] m,"
    " Tensor(c!)[] v, Tensor(d!)[] v_max, Tensor(e!)[] step, Tensor lr, float beta1, float beta2,"
    " float eps, float weight_decay, bool decoupled, bool maximize, Tensor? grad_scale,"
    " Tensor? found_inf, Tensor(f!)[] master) -> ()"
)
def _adam_update_(
    theta, saved, g_h, g_p, m, v, v_max, step, lr, beta1, beta2, eps, weight_decay, decoupled, *rest
):  # fmt: skip
    settings = beta1, beta2, eps, weight_decay, decoupled
    _update("adam_update_", theta, saved, g_h, g_p, (m, v, v_max), step, lr, settings, *rest)


# ---------------------------------------------------------------- RMSprop


def check_rmsprop_update(
    theta, saved, g_h, g_p, v, m, g_avg, step, lr, alpha, eps, weight_decay, momentum, maximize,
    grad_scale=None, found_inf=None, master=(),
) -> Lists | None:  # fmt: skip
    """Refuse arguments that rmsprop_update_ would refuse; returns what _check does."""
    scalars = {"lr": lr, "grad_scale": grad_scale, "found_inf": found_inf}
    state = {"v": v, "m": m, "g_avg": g_avg}
    op = "rmsprop_update_"
    read = _check(op, theta, saved, g_h, g_p, master, state, ("v",), **scalars)
    _check_momentum(op, m, momentum)
    check_steps(op, step, theta)
    return read


def rmsprop_update_(
    theta: Sequence[Tensor],
    saved: Sequence[Tensor],
    g_h: Sequence[Tensor],
    g_p: Sequence[Tensor],
    v: Sequence[Tensor],
    m: Sequence[Tensor],
    g_avg: Sequence[Tensor],
    step: Sequence[Tensor],
    lr: Tensor,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    master: Sequence[Tensor] = (),
) -> None:
    """See reference.rmsprop_update_."""
    arguments = (
        theta, saved, g_h, g_p, v, m, g_avg, step, lr, alpha, eps, weight_decay, momentum,
        maximize, grad_scale, found_inf, master,
    )  # fmt: skip
    read = check_rmsprop_update(*arguments)
    run(_rmsprop_update_, NAMESPACE.rmsprop_update_, read, arguments)


@define(
    "rmsprop_update_(Tensor(a!)[] theta, Tensor[] saved, Tensor[] g_h, Tensor[] g_p,"
    " Tensor(b!)[] v, Tensor(c!)[] m, Tensor(d!)[] g_avg, Tensor(e!)[] step, Tensor lr,"
    " float alpha, float eps, float weight_decay, float momentum, bool maximize,"
    " Tensor? grad_scale, Tensor? found_inf, Tensor(f!)[] master) -> ()"
)
def _rmsprop_update_(
    theta, saved, g_h, g_p, v, m, g_avg, step, lr, alpha, eps, weight_decay, momentum, *rest
):  # fmt: skip
    settings = alpha, eps, weight_decay, momentum
    _update("rmsprop_update_", theta, saved, g_h, g_p, (v, m, g_avg), step, lr, settings, *rest)


# The names of these operators, in the order of imbsam::Base.
UPDATES = ("sgd_update_", "adam_update_", "rmsprop_update_")

for _name in UPDATES:
    fake(_name)(lambda *args: None)

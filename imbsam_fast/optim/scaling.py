"""Gradient scaling and clipping of the combined gradient, and the norms of a step."""

from __future__ import annotations

from collections.abc import Sequence
from math import isinf
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.amp import GradScaler

from .. import ops
from . import shards
from .buckets import Slots, buckets, params_of


class Perturbing(Protocol):
    """What this module needs of an ImbSAM: the state of its step."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    @property
    def is_perturbed(self) -> bool: ...

    def perturbation_is_finite(self) -> Tensor: ...

    def tail_gradient_norm(self) -> Tensor | None: ...


class Norms(NamedTuple):
    """The norms that a step measured: float64 () on the device, not waited for; None: not measured.

    Over all parameters and ranks, and without the scale of a gradient scaler.
    """

    grad_norm: Tensor | None = None  # of g_h + g_p, before clipping
    tail_grad_norm: Tensor | None = None  # of g_t, over the perturbed groups
    clip_factor: Tensor | None = None  # what g_h + g_p was multiplied with, at most 1
    perturbed: bool = False


class Scaling(NamedTuple):
    """By what g_h + g_p is to be divided (scaler and clipping), found_inf, and the norms."""

    scale: Tensor | None
    found_inf: Tensor | None
    norms: Norms


def scaling(
    optimizer: Perturbing,
    g_h: Slots,
    g_p: Slots,
    grad_scaler: GradScaler | None,
    max_norm: float | None,
) -> Scaling:
    """The factors of one update; the same on all ranks that hold shards of the gradients.

    bytes: 2n read, none without a scaler and max_norm; the norm of g_t is known from before.
    """
    grad_scaler = in_use(grad_scaler)
    loss_scale = None if grad_scaler is None else scale_of(grad_scaler, optimizer)
    tail_norm = optimizer.tail_gradient_norm()
    if tail_norm is not None and loss_scale is not None:
        tail_norm = tail_norm / loss_scale.to(tail_norm.device)
    norms = Norms(tail_grad_norm=tail_norm, perturbed=optimizer.is_perturbed)
    if grad_scaler is None and max_norm is None:
        return Scaling(None, None, norms)
    found = buckets(optimizer.param_groups, g_h, g_p)
    if not found:
        return Scaling(None, None, norms)
    params = params_of(optimizer.param_groups)
    checks = [ops.grad_check(b.pick(g_h), b.pick(g_p)) for b in found]
    device = found[0].params[0].device
    squares = joined([partials for partials, _ in checks], device).sum()
    if shards.is_sharded(params):
        squares = shards.summed(squares, params)
    scale, found_inf, norm = None, None, squares.sqrt()
    if grad_scaler is not None:
        scale = loss_scale.to(device)  # type: ignore[union-attr]
        norm = norm / scale
        found_inf = joined([flag for _, flag in checks], device).amax()
        if shards.is_sharded(params):
            found_inf = shards.largest(found_inf, params)
        if optimizer.is_perturbed:
            overflowed = ~optimizer.perturbation_is_finite()
            found_inf = torch.maximum(found_inf, overflowed.float().to(device))
        leave_found_inf(grad_scaler, optimizer, found_inf)
    norms = norms._replace(grad_norm=norm)
    if max_norm is not None:
        excess = torch.ones_like(norm)
        if not isinf(max_norm):  # which leaves the bits of the step alone
            excess = ((norm + 1e-6) / max_norm).clamp(min=1)
            scale = excess if scale is None else scale * excess
        norms = norms._replace(clip_factor=1 / excess)
    return Scaling(None if scale is None else scale.float(), found_inf, norms)


def joined(partials: Sequence[Tensor], device: torch.device) -> Tensor:
    """Partial sums of several buckets as one tensor on `device`."""
    on_device = [p.to(device) for p in partials]
    return on_device[0] if len(on_device) == 1 else torch.cat(on_device)


# ---------------------------------------------------------------- GradScaler: private names


def in_use(grad_scaler: GradScaler | None) -> GradScaler | None:
    """`grad_scaler`, or None if it is disabled."""
    return grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None


def scale_of(grad_scaler: GradScaler, optimizer: object) -> Tensor:
    """The factor on every loss of the step, ().

    Raises RuntimeError for a scaler that has scaled nothing, or that has already unscaled the
    gradients, which third_step does.
    """
    scale = grad_scaler._get_scale_async()
    if scale is None:
        raise RuntimeError(
            "grad_scaler has scaled no loss yet, expected every loss of the step to go through "
            "grad_scaler.scale"
        )
    stage = grad_scaler._per_optimizer_states[id(optimizer)]["stage"]
    if stage.name != "READY":
        raise RuntimeError(
            f"grad_scaler is {stage.name} for this optimizer, expected neither its unscale_ nor "
            "its step to be called: third_step undoes the scale"
        )
    return scale


def leave_found_inf(grad_scaler: GradScaler, optimizer: object, found_inf: Tensor) -> None:
    """Leave found_inf for `grad_scaler.update`, as `grad_scaler.step` does."""
    state = grad_scaler._per_optimizer_states[id(optimizer)]
    state["found_inf_per_device"] = {found_inf.device: found_inf}


def found_inf_of(grad_scaler: GradScaler | None, optimizer: object) -> Tensor | None:
    """What `leave_found_inf` left in this step; None without a scaler in use."""
    if in_use(grad_scaler) is None:
        return None
    state = grad_scaler._per_optimizer_states[id(optimizer)]  # type: ignore[union-attr]
    return next(iter(state["found_inf_per_device"].values()), None)

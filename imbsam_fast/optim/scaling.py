"""Gradient scaling and clipping of the combined gradient, and the norms of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def tail_gradient_norm(self) -> Tensor | Callable[[], Tensor] | None: ...


class Norms(Sequence):
    """The norms that a step measured: float64 () on the device, not waited for; None: not measured.

    Over all parameters and ranks, and without the scale of a gradient scaler.

    Args:
        grad_norm: of g_h + g_p, before clipping.
        tail_grad_norm: of g_t, over the perturbed groups; or what computes it when it is read.
        clip_factor: what g_h + g_p was multiplied with, at most 1.
        perturbed: whether the weights were.
    """

    def __init__(
        self,
        grad_norm: Tensor | None = None,
        tail_grad_norm: Tensor | Callable[[], Tensor] | None = None,
        clip_factor: Tensor | None = None,
        perturbed: bool = False,
    ) -> None:
        self.grad_norm, self._tail, self.clip_factor = grad_norm, tail_grad_norm, clip_factor
        self.perturbed = perturbed

    @property
    def tail_grad_norm(self) -> Tensor | None:
        """The norm of g_t."""
        if self._tail is not None and not isinstance(self._tail, Tensor):
            self._tail = self._tail()
        return self._tail

    def as_dict(self) -> dict[str, Any]:
        """All of them, computed, by their names."""
        return {name: getattr(self, name) for name in _NORMS}

    def __len__(self) -> int:
        return len(_NORMS)

    def __getitem__(self, i: Any) -> Any:
        return tuple(self.as_dict().values())[i]

    def __repr__(self) -> str:
        return f"Norms({', '.join(f'{name}={x!r}' for name, x in self.as_dict().items())})"


_NORMS = ("grad_norm", "tail_grad_norm", "clip_factor", "perturbed")


class Scaling(NamedTuple):
    """By what g_h + g_p is to be divided (scaler and clipping), found_inf, and the norms."""

    scale: Tensor | None
    found_inf: Tensor | None
    norms: Norms


# The partial sums of |g_h + g_p|^2 and, not 0 where that is not finite, a flag of each launch.
GradCheck = Callable[[], list[tuple[Tensor, Tensor]]]


def scaling(
    optimizer: Perturbing,
    check: GradCheck,
    grad_scaler: GradScaler | None,
    max_norm: float | None,
) -> Scaling:
    """The factors of one update; the same on all ranks that hold shards of the gradients.

    bytes: those of `check`, none without a scaler and max_norm; the norm of g_t is known from
    before.
    """
    grad_scaler = in_use(grad_scaler)
    perturbed = optimizer.is_perturbed
    tail_norm = optimizer.tail_gradient_norm()
    if grad_scaler is None and max_norm is None:
        return Scaling(None, None, Norms(None, tail_norm, None, perturbed))
    loss_scale = None if grad_scaler is None else scale_of(grad_scaler, optimizer)
    known = tail_norm() if callable(tail_norm) else tail_norm
    if known is not None and loss_scale is not None:  # which changes in place, by and by
        known = known / loss_scale.to(known.device)
    checks = check()
    if not checks:
        return Scaling(None, None, Norms(None, known, None, perturbed))
    params = params_of(optimizer.param_groups)
    device = checks[0][0].device
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
        if perturbed:
            overflowed = ~optimizer.perturbation_is_finite()
            found_inf = torch.maximum(found_inf, overflowed.float().to(device))
        leave_found_inf(grad_scaler, optimizer, found_inf)
    clip_factor = None
    if max_norm is not None:
        excess = torch.ones_like(norm)
        if not isinf(max_norm):  # which leaves the bits of the step alone
            excess = ((norm + 1e-6) / max_norm).clamp(min=1)
            scale = excess if scale is None else scale * excess
        clip_factor = 1 / excess
    norms = Norms(norm, known, clip_factor, perturbed)
    return Scaling(None if scale is None else scale.float(), found_inf, norms)


def grad_checks(groups: Sequence[dict[str, Any]], g_h: Slots, g_p: Slots) -> GradCheck:
    """`ops.grad_check` launch by launch, once it is asked for. bytes: 2n read"""

    def check() -> list[tuple[Tensor, Tensor]]:
        return [ops.grad_check(b.pick(g_h), b.pick(g_p)) for b in buckets(groups, g_h, g_p)]

    return check


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

"""What a gradient scaler and clipping make of the combined gradient, over all parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ops, shards
from .buckets import Slots, buckets, params_of
from .validation import check_ready

if TYPE_CHECKING:
    from .optim import ImbSAM


def scaling(
    optimizer: ImbSAM,
    g_h: Slots,
    g_p: Slots,
    grad_scaler: torch.amp.GradScaler | None,
    max_norm: float | None,
) -> tuple[Tensor | None, Tensor | None]:
    """How many times too large g_h + g_p is, clipping included, and found_inf.

    Ranks that hold shards of the gradients get the same.
    """
    if grad_scaler is not None and not grad_scaler.is_enabled():
        grad_scaler = None
    if grad_scaler is not None:
        check_ready(grad_scaler, id(optimizer))
    if grad_scaler is None and max_norm is None:
        return None, None
    found = buckets(optimizer.param_groups, g_h, g_p)
    if not found:
        return None, None
    params = params_of(optimizer.param_groups)
    sharded = shards.is_sharded(params)
    checks = [ops.grad_check(b.pick(g_h), b.pick(g_p)) for b in found]
    device = found[0].params[0].device
    scale, found_inf = torch.ones((), device=device), None
    if grad_scaler is not None:
        scale = grad_scaler._get_scale_async().to(device)  # type: ignore[union-attr]
        found_inf = joined([flag for _, flag in checks], device).amax()
        if sharded:
            found_inf = shards.largest(found_inf, params)
        if optimizer.is_perturbed:
            overflowed = ~optimizer.perturbation_is_finite()
            found_inf = torch.maximum(found_inf, overflowed.float().to(device))
        # What GradScaler.step would have left for GradScaler.update.
        state = grad_scaler._per_optimizer_states[id(optimizer)]
        state["found_inf_per_device"] = {device: found_inf}
    if max_norm is not None:
        squares = joined([partials for partials, _ in checks], device).sum()
        if sharded:
            squares = shards.summed(squares, params)
        norm = squares.sqrt() / scale
        scale = scale * ((norm + 1e-6) / max_norm).clamp(min=1)
    return scale.float(), found_inf


def joined(partials: Sequence[Tensor], device: torch.device) -> Tensor:
    on_device = [p.to(device) for p in partials]
    return on_device[0] if len(on_device) == 1 else torch.cat(on_device)

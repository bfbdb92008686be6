"""A phase of the step as one call of the compiled module, for plain tensors and a fused base.

Everything is read, checked and launched there (csrc/phases.h). False where something is out of the
ordinary: nothing was done then, and the way through buckets and operators says what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from ..ops import dispatch
from ..ops.arguments import unobserved
from .bases import FUSED
from .buckets import Slots, params_of


def _backend(slots: Slots) -> tuple[ModuleType, torch.device] | None:
    """The compiled backend of the first tensor, which is the one of all, and its device."""
    if not unobserved():
        return None
    device = next((t.device for t in slots if t is not None), None)
    if device is None:
        return None
    backend = dispatch.select(device)
    return (backend, device) if hasattr(backend, "update_all") else None


def perturb(groups: Sequence[dict[str, Any]], g_t: Slots, pending: Any) -> bool:
    """Perturb by g_t, which nobody else can reach, as `ImbSAM.second_step` without master weights.

    `pending` gets the partial sums, and as `saved` the tensors with the unperturbed weights.
    """
    found = _backend(g_t)
    if found is None:
        return False
    backend, device = found
    done = backend.perturb_all(
        device,
        [len(group["params"]) for group in groups],
        params_of(groups),
        g_t,
        # Sharpness is the worst loss nearby, which lies downhill for who climbs.
        [float(-g["rho"] if g.get("maximize") else g["rho"]) for g in groups],
        [group["adaptive"] for group in groups],
        pending,
    )
    if done:
        torch.clear_autocast_cache()  # which knows nothing of writes in place
    return done


def update(base: Optimizer, saved: Slots, g_h: Slots, g_p: Slots, pending: Any) -> bool:
    """Restore and update as `updates.fused_update` with the state of earlier steps, unscaled.

    `pending.saved` is None as soon as it is done.
    """
    entry, groups = FUSED[type(base)], base.param_groups
    if not all(isinstance(group["lr"], (float, int)) for group in groups):
        return False
    found = _backend(g_p)
    if found is None:
        return False
    backend, device = found
    done = backend.update_all(
        device,
        entry.operator,
        [len(group["params"]) for group in groups],
        params_of(groups),
        (saved, g_h, g_p),
        base.state,
        tuple(entry.state),
        [[wants(group) for wants in entry.state.values()] for group in groups],
        entry.has_step,
        [group["lr"] for group in groups],
        [entry.settings(group, False) for group in groups],
        [group["maximize"] for group in groups],
        pending,
    )
    if done:
        torch.clear_autocast_cache()
    return done

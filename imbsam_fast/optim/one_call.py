"""A phase of the step as one call of the compiled module, for plain tensors and a fused base.

Everything is read, checked and launched there (csrc/phases.h). False or None where something is out
of the ordinary: nothing was done then, and the way through buckets and operators says what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from ..ops import dispatch
from ..ops.arguments import unobserved
from .bases import FUSED
from .buckets import Slots, params_of
from .master_weights import MasterWeights
from .scaling import GradCheck, Norms, Scaling


def _backend(slots: Slots) -> tuple[ModuleType, torch.device] | None:
    """The compiled backend of the first tensor, which is the one of all, and its device."""
    if not unobserved():
        return None
    device = next((t.device for t in slots if t is not None), None)
    if device is None:
        return None
    backend = dispatch.select(device)
    return (backend, device) if hasattr(backend, "read_update") else None


def perturb(base: Optimizer, g_t: Slots, masters: MasterWeights, pending: Any) -> bool:
    """Perturb by g_t, which nobody else can reach, as `ImbSAM.second_step`.

    `pending` gets the partial sums, and as `saved` the tensors with the unperturbed weights.
    """
    found = _backend(g_t)
    if found is None:
        return False
    (backend, device), groups = found, base.param_groups
    done = backend.perturb_all(
        device,
        [len(group["params"]) for group in groups],
        params_of(groups),
        g_t,
        base.state,
        masters.versions if masters.enabled else None,
        # Sharpness is the worst loss nearby, which lies downhill for who climbs.
        [float(-g["rho"] if g.get("maximize") else g["rho"]) for g in groups],
        [group["adaptive"] for group in groups],
        pending,
    )
    if done:
        torch.clear_autocast_cache()  # which knows nothing of writes in place
    return done


def update(
    base: Optimizer,
    lists: tuple[Slots, Slots, Slots],
    masters: MasterWeights,
    pending: Any,
    is_scaled: bool,
    scaling: Callable[[GradCheck], Scaling],
) -> Norms | None:
    """Restore and update as `updates.fused_update` with the state of earlier steps.

    `lists`: saved, g_h and g_p. `scaling` is asked once they are read; it makes a pass over both
    gradients where the step `is_scaled` or clipped. None where nothing was done; else
    `pending.saved` is None as soon as all is.
    """
    entry, groups = FUSED[type(base)], base.param_groups
    if masters.new or not all(isinstance(group["lr"], (float, int)) for group in groups):
        return None
    found = _backend(lists[-1])
    if found is None:
        return None
    backend, device = found
    phase = backend.read_update(
        [len(group["params"]) for group in groups],
        params_of(groups),
        lists,
        base.state,
        tuple(entry.state),
        [[wants(group) for wants in entry.state.values()] for group in groups],
        entry.has_step,
        masters.versions if masters.enabled else None,
        is_scaled,
    )
    if phase is None:
        return None
    scale, found_inf, norms = scaling(lambda: [backend.grad_check_all(device, phase)])
    backend.update_all(
        device,
        phase,
        entry.operator,
        [group["lr"] for group in groups],
        [entry.settings(group, False) for group in groups],
        [group["maximize"] for group in groups],
        scale,
        found_inf,
        pending,
    )
    torch.clear_autocast_cache()
    return norms

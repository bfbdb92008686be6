"""What a step asks torch.amp.GradScaler and tells it: its state has no public names."""

from __future__ import annotations

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer


def in_use(grad_scaler: GradScaler | None) -> GradScaler | None:
    """`grad_scaler`; None where it is disabled and scales nothing."""
    return grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None


def scale_of(grad_scaler: GradScaler, optimizer: Optimizer) -> Tensor:
    """The factor on every loss of the step, ().

    Raises RuntimeError for a scaler that has scaled nothing, or has unscaled already what
    third_step is to unscale.
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


def leave_found_inf(grad_scaler: GradScaler, optimizer: Optimizer, found_inf: Tensor) -> None:
    """For `grad_scaler.update`: what `grad_scaler.step` would have left."""
    state = grad_scaler._per_optimizer_states[id(optimizer)]
    state["found_inf_per_device"] = {found_inf.device: found_inf}


def found_inf_of(grad_scaler: GradScaler | None, optimizer: Optimizer) -> Tensor | None:
    """What `leave_found_inf` left in this step; None without a scaler in use."""
    if in_use(grad_scaler) is None:
        return None
    state = grad_scaler._per_optimizer_states[id(optimizer)]  # type: ignore[union-attr]
    return next(iter(state["found_inf_per_device"].values()), None)

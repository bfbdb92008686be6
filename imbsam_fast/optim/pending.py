"""What one step of ImbSAM keeps between its calls, and what is known of its perturbation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .buckets import Slots
from .scaling import joined


class Pending:
    """State between the calls of one step; it is never part of a checkpoint.

    An object of its own because torch.compile does not see assignments to an optimizer's
    attributes.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Between steps: nothing is held."""
        self.held: Slots | None = None  # g_h
        self.saved: Slots | None = None  # the unperturbed weights, while theta is perturbed
        self.partials: list[Tensor] = []  # the squared norm of g_t,
        self.is_adaptive = False  # or of theta g_t
        self.tail_norm: Tensor | None = None  # what those sum up to, where somebody has asked

    @torch.no_grad()
    def perturbation_is_finite(self, device: torch.device) -> Tensor:
        """See ImbSAM."""
        if not self.partials:  # no group is perturbed
            return torch.ones((), dtype=torch.bool, device=device)
        return joined(self.partials, device).isfinite().all()

    def tail_gradient_norm(
        self, device: torch.device, at_once: bool
    ) -> Tensor | Callable[[], Tensor] | None:
        """See ImbSAM."""
        if not self.partials or self.is_adaptive:
            return None
        if self.tail_norm is None:
            norm = partial(norm_of, self.partials, device)
            if not (at_once or _is_recorded(self.partials[0].device)):
                return norm
            self.tail_norm = norm()
        return self.tail_norm


@torch.no_grad()
def norm_of(partials: Sequence[Tensor], device: torch.device) -> Tensor:
    """The root of what partial sums sum up to, float64 () on `device`."""
    sums = partials[0] if len(partials) == 1 else joined(partials, device)
    return sums.sum().sqrt()


def _is_recorded(device: torch.device) -> bool:
    """Whether a compiler or a CUDA graph sees only what is computed at once."""
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

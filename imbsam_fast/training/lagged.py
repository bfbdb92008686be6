"""Lagged ImbSAM: epsilon from the tail gradient of an earlier step. Experimental, not in the paper.

The perturbed tail gradient of the last step with tail rows is used in place of g_t, which saves one
pass:

    g = g_p of the last step with tail rows
    epsilon = rho g / ||g||;  g_p = grad tail(theta + epsilon)

and everything else is ImbSAM. g lies in the optimizer's state, so that checkpoints carry it and a
resumed run takes the same steps. Only its direction counts: it stays scaled by a gradient scaler.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..optim import ImbSAM
from ..optim.bases import reason_not_fused
from ..optim.buckets import Slots, params_of
from ..optim.interrupts import uninterrupted
from ..optim.replicas import average_

# The key in a parameter's state; a tensor like the parameter.
TAIL_GRADIENT = "tail_gradient"


class Seen(NamedTuple):
    """The gradients that the perturbed pass of a step left."""

    gradients: Slots
    is_void: Tensor | None  # (1,): not zero where the earlier gradient stays; None: never


class TailGradient:
    """The tail gradient that the next step perturbs along, in `optimizer.state`.

    Args:
        optimizer: its state keeps the gradient.
        group: the ranks that keep the mean of their gradients, None where each keeps its own.
        shared: whether others write to the gradients, so that copies are kept; those of a base
            whose update is not fused are copied anyway.
    """

    def __init__(self, optimizer: ImbSAM, group: dist.ProcessGroup | None, shared: bool) -> None:
        self.optimizer = optimizer
        self.group = group
        self.shared = shared

    def is_known(self) -> bool:
        """Whether an earlier step left a gradient; the same on all ranks of a group."""
        return any(g is not None for g in self._kept())

    @torch.no_grad()
    def hand_over(self) -> None:
        """Put copies into `p.grad`: the perturbation writes there, and the step may still fail."""
        for p, g in zip(self._params(), self._kept()):
            p.grad = None if g is None else g.clone()

    @torch.no_grad()
    def seen(self, may_be_skipped: bool) -> Seen | None:
        """The gradients in `p.grad` after the perturbed pass; None if no rank had one.

        Takes the memory that `keep` needs after the update, where nothing may fail any more.
        """
        gradients: Slots = [p.grad for p in self._params()]
        if self.group is not None:
            return self._averaged(gradients, self.group)
        present = [g for g in gradients if g is not None]
        if not present:
            return None
        if self.shared or reason_not_fused(self.optimizer.base) is not None:
            gradients = [None if g is None else g.clone() for g in gradients]
        if not may_be_skipped:
            return Seen(gradients, is_void=None)
        is_void = torch.zeros(1, dtype=torch.bool, device=present[0].device)
        # A gradient that is missing is zero, if it turns out to be one of a step.
        gradients = [
            torch.zeros_like(k) if g is None and k is not None else g
            for g, k in zip(gradients, self._kept())
        ]
        return Seen(gradients, is_void)

    def _averaged(self, gradients: Slots, group: dist.ProcessGroup) -> Seen:
        """The mean over the ranks; void if none of them had tail rows."""
        copies: Slots = [
            (torch.zeros_like(p) if g is None else g.clone()) if p.requires_grad else None
            for p, g in zip(self._params(), gradients)
        ]
        present = [g for g in copies if g is not None]
        has_tail = any(g is not None for g in gradients)
        ranks_with_tail = present[0].new_full((1,), float(has_tail))
        average_([*present, ranks_with_tail], group)
        return Seen(copies, is_void=ranks_with_tail == 0)

    @torch.no_grad()
    def keep(self, seen: Seen, found_inf: Tensor | None) -> None:
        """Keep the gradients of a step that ended, unless found_inf says it was skipped."""
        gradients, is_void = seen
        if found_inf is not None and is_void is not None:
            is_void.logical_or_(found_inf.reshape(1).to(is_void.device))
        # Asking the device is needed before the first gradient, and where the base might take a
        # state made here for its own.
        if is_void is not None and not (self.is_known() and self._base_is_sgd()):
            if is_void.item():
                return
            is_void = None
        if is_void is not None:
            gradients = [_choose(is_void, g, k) for g, k in zip(gradients, self._kept())]
        state = self.optimizer.state
        with uninterrupted():
            for p, g in zip(self._params(), gradients):
                if g is not None:
                    state[p][TAIL_GRADIENT] = g
                elif p in state:  # a gradient that is missing is zero
                    state[p].pop(TAIL_GRADIENT, None)

    def _base_is_sgd(self) -> bool:
        return type(self.optimizer.base) is torch.optim.SGD

    def _params(self) -> list[Tensor]:
        return params_of(self.optimizer.param_groups)

    def _kept(self) -> Slots:
        state = self.optimizer.state
        return [
            state[p].get(TAIL_GRADIENT) if p.requires_grad and p in state else None
            for p in self._params()
        ]


def _choose(is_void: Tensor, new: Tensor | None, kept: Tensor | None) -> Tensor | None:
    """`kept` if is_void, else `new`, written into the memory of `new`."""
    if new is None:
        return None
    is_void = is_void.to(new.device)
    if kept is None:
        return new.masked_fill_(is_void, 0)
    # In place: the step has ended, and must not fail for want of memory.
    return torch.where(is_void, kept, new, out=new)

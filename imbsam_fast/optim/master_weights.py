"""Float32 master weights of bfloat16 and float16 parameters, in the base's state.

`state[p]["master_weight"]` is perturbed and updated; the parameter is its rounded copy. The base's
state of such a parameter is in float32 too.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .bases import STATE_NAMES
from .buckets import Slots, params_of
from .shards import local

HALF_DTYPES = (torch.bfloat16, torch.float16)
NAME = "master_weight"

# What is kept in float32: the master weights and the base's state beside them.
KEPT = STATE_NAMES | {NAME}


class MasterWeights:
    """The master weights of one base; empty if they are not enabled."""

    def __init__(self, base: Optimizer, enabled: bool) -> None:
        self.base, self.enabled = base, enabled
        # The versions of each parameter after our last write: others may write too. Lists, since
        # csrc/phases.h writes into them.
        self.versions: dict[Tensor, list[int]] = {}
        self.new: list[Tensor] = []  # parameters whose first step has not ended

    def of(self, needed: Slots, saved: Slots | None = None) -> Slots:
        """The master weights of half-precision parameters with a tensor in `needed`.

        `saved` has them of those that are perturbed. They are made where there are none, and
        follow elements of a parameter that someone loaded or changed since the last step.
        """
        if not self.enabled:
            return [None] * len(needed)
        params = params_of(self.base.param_groups)
        known = saved or [None] * len(params)
        return [
            (self._of(p) if master is None else master)
            if t is not None and p.dtype in HALF_DTYPES
            else None
            for p, t, master in zip(params, needed, known)
        ]

    def _of(self, p: Tensor) -> Tensor:
        if NAME not in self.base.state.get(p, ()):
            made = p.detach().float()  # may fail, and must then leave no trace
            self.base.state[p][NAME] = made
            self.new.append(p)
        master, weight = local(self.base.state[p][NAME]), local(p)
        if not torch.compiler.is_compiling() and self.versions.get(p) != _version(p):
            master.copy_(torch.where(master.to(p.dtype) == weight, master, weight))
            self.versions[p] = _version(p)
        return master

    def written(self, masters: Slots) -> None:
        """Note that the parameters with these master weights are now their rounded copies."""
        self.new.clear()
        if self.enabled and not torch.compiler.is_compiling():
            for p, master in zip(params_of(self.base.param_groups), masters):
                if master is not None:
                    self.versions[p] = _version(p)

    def abandon(self) -> None:
        """Forget the master weights that were made in a step that failed."""
        while self.new:
            p = self.new.pop()
            state = self.base.state[p]
            state.pop(NAME, None)
            if not state:
                del self.base.state[p]

    def load(self, state_dict: dict[str, Any]) -> None:
        """Load again, in float32, what torch rounded to the parameters' dtype."""
        self.versions.clear()
        if not self.enabled:
            return
        indices: Iterable[int] = chain.from_iterable(
            group["params"] for group in state_dict["param_groups"]
        )
        for i, p in zip(indices, params_of(self.base.param_groups)):
            state = state_dict["state"].get(i, {}) if p.dtype in HALF_DTYPES else {}
            for name, value in state.items():
                if name in KEPT and isinstance(value, Tensor):
                    loaded = value.detach().to(p.device, torch.float32, copy=True)
                    self.base.state[p][name] = loaded


def _version(p: Tensor) -> list[int]:
    """Version counters of `p` and of its local part, which torch counts apart."""
    return [p._version, local(p)._version]

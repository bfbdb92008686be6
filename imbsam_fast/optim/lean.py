"""ImbSAM with the least memory: the momentum takes up every gradient as soon as it is there.

With n the size of the weights, ImbSAM has theta, saved, momentum, g_h and g_p at its peak, 5n; here
it is theta, saved and momentum, 3n as with plain SGD, and the gradients that a backward pass has
not handed over yet.

    m <- mu m + (1 - dampening) (g_h + lambda theta)    before the pass for g_t
    m <- m + (1 - dampening) g_p                        parameter by parameter, in the backward
    theta <- saved - lr m

bytes: 19n moved, against 11n: 8n for the first line, 5n to perturb, 3n for each of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.arguments import in_layout_of
from . import shards
from .bases import reason_not_fused
from .buckets import Slots
from .imbsam import ImbSAM
from .interrupts import uninterrupted
from .scaling import Norms
from .updates import lr_tensor


class LeanImbSAM(ImbSAM):
    """`ImbSAM` in 3n of memory besides activations, as SGD needs; the same steps to rounding.

    For a `torch.optim.SGD` base with momentum and without nesterov, whose update needs the
    gradient after the momentum took it up. `first_step` takes the gradients away at once; call
    it before the tail's backward. From `second_step` to `third_step` hooks take every gradient
    when its backward has computed it: `p.grad` stays None, several backwards add up, and a
    compiled model, which hands over all its gradients at the end, needs n more.

    After a failure the weights are bit for bit what they were, but the momentum of a step is
    overwritten as it comes: it has then decayed once and holds the gradients that had arrived,
    as after a step with learning rate 0. What fails before `first_step` changes nothing, nor
    does a failure in the step that would have made the momentum buffers.

    A gradient scaler and clipping would need the whole gradient before any of it is taken up,
    several ranks one that is reduced: refused, in `TrainStep` too.

    Args:
        base: the optimizer that holds the weights and the momentum.
        rho: radius of the perturbation, >= 0.
        adaptive: ASAM: the perturbation scales with |theta|.
    """

    # ------------------------------------------------------------ one step

    @torch.no_grad()
    def first_step(self, zero_grad: None = None) -> None:
        """Let the momentum take up g_h, in `p.grad`, and the weight decay."""
        self._check_alone()
        self._check_groups()
        super().first_step(zero_grad)
        with self._abandoned_on_failure(), uninterrupted():
            g_h = self._pending.held or []
            self._pending.held = [None] * len(g_h)
            self._absorb_all(g_h)

    @torch.no_grad()
    def second_step(self, subtract: bool = False, zero_grad: None = None) -> None:
        """Perturb as ImbSAM does; from now on gradients go from autograd to the momentum."""
        self._check_alone()
        self._check_groups()
        super().second_step(subtract, zero_grad)
        with self._abandoned_on_failure():
            if self._pending.held is None:
                self._pending.held = [None] * len(self._params())
            groups = [group for group in self.param_groups for _ in group["params"]]
            for i, (p, group) in enumerate(zip(self._params(), groups)):
                if p.requires_grad:
                    take = partial(self._take, group, i)
                    self._hooks.append(p.register_post_accumulate_grad_hook(take))

    @torch.no_grad()
    def _ended(self, grad_scaler: torch.amp.GradScaler | None, max_norm: float | None) -> Norms:
        """theta <- saved - lr m, with what is left in `p.grad` taken up before.

        Of the norms only that of g_t is known.

        Raises ValueError for a gradient scaler (a disabled one is ignored) or max_norm.
        """
        with uninterrupted():
            check_whole_gradient(grad_scaler, max_norm)
            self._check_alone()
            self._check_groups()
            self._remove_hooks()
            params = self._params()
            if self._pending.held is None:
                self._pending.held = [None] * len(params)
            self._absorb_all(self._take_gradients())
            m = in_layout_of(params, self._pending.held, "momentum_buffer")
            norms = Norms(tail_grad_norm=self.tail_gradient_norm(), perturbed=self.is_perturbed)
            saved = self._pending.saved or [None] * len(params)
            for p, start, velocity in zip(params, saved, m):
                if start is not None and velocity is None:  # perturbed, then without any gradient
                    p.copy_(start)
                    torch.clear_autocast_cache()
            self._update(saved, m)
            self._pending.saved = None  # updated: a failure from here on must not undo it
            for p, velocity in zip(params, m):
                if velocity is not None:
                    self.state[p]["momentum_buffer"] = velocity
            self._pending.clear()
            # What LR schedulers look at to warn about a step that never happened.
            self._opt_called = self.base._opt_called = True  # type: ignore[attr-defined]
            return norms

    def restore(self) -> None:
        """Abandon the step: the unperturbed weights bit for bit, no gradient, no hooks."""
        self._remove_hooks()
        super().restore()

    def merge_held(self) -> None:
        """RuntimeError: there is none."""
        raise RuntimeError("LeanImbSAM holds no gradient that ranks could exchange; use ImbSAM")

    # ------------------------------------------------------------ internals

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        super().__setstate__(state)

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _take(self, group: dict[str, Any], i: int, p: Tensor) -> None:
        """The hook of parameter i."""
        g, p.grad = p.grad, None
        if g is None or g.layout != torch.strided:
            found = "missing" if g is None else g.layout
            raise TypeError(f"the gradient of parameter {i} is {found}, expected strided")
        with torch.no_grad():
            self._absorb(group, [i], [p], [g])

    def _subtracted_from(self, g_t: Slots, perturbing: Slots) -> Slots:
        """The momentum took up what was held, and gives g_t back now."""
        if self._pending.held is None:
            return super()._subtracted_from(g_t, perturbing)
        self._absorb_all(g_t, sign=-1.0)
        return [None] * len(g_t)

    def _absorb_all(self, gradients: Slots, sign: float = 1.0) -> None:
        saved = self._pending.saved or [None] * len(gradients)
        held = self._pending.held or [None] * len(gradients)
        known = [self._buffer(p) for p in self._params()]
        for b in self._buckets(saved, held, known, gradients):
            self._absorb(b.group, b.indices, b.params, b.pick(gradients), sign)

    def _absorb(
        self,
        group: dict[str, Any],
        indices: Sequence[int],
        params: Sequence[Tensor],
        gradients: list[Tensor],
        sign: float = 1.0,
    ) -> None:
        """m <- m + sign (1 - dampening) g, for parameters of one kind, after _begin."""
        held: Any = self._pending.held
        # The first step of torch.optim.SGD takes the gradient undampened.
        share = 1.0 if self._buffer(params[0]) is None else 1.0 - group["dampening"]
        if held[indices[0]] is None:
            for i, m in zip(indices, self._begin(group, indices, params, share)):
                held[i] = m
        into = [held[i] for i in indices]
        torch._foreach_add_(into, gradients, alpha=sign * (-share if group["maximize"] else share))

    def _begin(
        self, group: dict[str, Any], indices: Sequence[int], params: Sequence[Tensor], share: float
    ) -> list[Tensor]:
        """m <- mu m + (1 - dampening) lambda theta, where theta is the unperturbed one."""
        buffers = [self._buffer(p) for p in params]
        m = [torch.zeros_like(p) if b is None else b for p, b in zip(params, buffers)]
        torch._foreach_mul_(m, group["momentum"])
        if group["weight_decay"]:
            saved: Any = self._pending.saved or dict.fromkeys(indices)
            theta = [p if saved[i] is None else saved[i] for i, p in zip(indices, params)]
            torch._foreach_add_(m, theta, alpha=share * group["weight_decay"])
        return m

    def _buffer(self, p: Tensor) -> Tensor | None:
        return self.state[p].get("momentum_buffer") if p in self.state else None

    def _update(self, saved: Slots, m: Slots) -> None:
        launches: list[tuple] = []
        for b in self._buckets(saved, m):
            lr = lr_tensor(b.group["lr"])
            # The momentum as the gradient of SGD without any: theta <- saved - lr m.
            launches.append((b.params, b.pick(saved), [], b.pick(m), [], lr, 0, 0, 0, False, False))
        for arguments in launches:
            ops.check_sgd_update(*arguments)  # all checks first
        for arguments in launches:
            ops.sgd_update_(*arguments)

    def _check_params(self, params: Sequence[Tensor]) -> None:
        super()._check_params(params)
        if shards.is_sharded(params):
            raise ValueError(
                "the parameters are sharded, expected those of one process with a LeanImbSAM: "
                "ranks exchange whole gradients"
            )
        self._check_groups()

    def _check_groups(self) -> None:
        if type(self.base) is not torch.optim.SGD:
            raise TypeError(
                f"base is {type(self.base).__name__}, expected torch.optim.SGD, whose momentum "
                "can take up gradients one by one"
            )
        if (reason := reason_not_fused(self.base)) is not None:
            raise ValueError(f"{reason}, expected none: a LeanImbSAM never has that gradient")
        if self.master_weights:
            raise ValueError("master_weights is True, expected False with a LeanImbSAM")
        for i, group in enumerate(self.param_groups):
            if group["momentum"] == 0:
                raise ValueError(
                    f"param_groups[{i}]['momentum'] is 0, expected another number: the gradients "
                    "are kept nowhere else"
                )
            if group["nesterov"]:
                raise ValueError(
                    f"param_groups[{i}]['nesterov'] is True, expected False: its update needs the "
                    "gradient apart from the momentum"
                )

    def _check_alone(self) -> None:
        if self._replicas.of(self._params()):
            raise ValueError(
                "the parameters are DistributedDataParallel's, expected those of one process with "
                "a LeanImbSAM: ranks exchange whole gradients; use ImbSAM"
            )


def check_whole_gradient(grad_scaler: torch.amp.GradScaler | None, max_norm: float | None) -> None:
    """Refuse what needs the whole gradient before any of it is taken up."""
    why = "expected None with a LeanImbSAM, which never has the whole gradient"
    if grad_scaler is not None and grad_scaler.is_enabled():
        raise ValueError(f"grad_scaler is {type(grad_scaler).__name__}, {why}")
    if max_norm is not None:
        raise ValueError(f"max_norm is {max_norm!r}, {why}")

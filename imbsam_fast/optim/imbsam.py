"""ImbSAM: what happens to gradients and weights between the passes of one step.

It knows no model, no loss and no plan; the equations are those of docs/design.md section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..losses import SplitLoss, check_split_loss
from ..ops import native
from ..ops.arguments import in_layout_of, unobserved
from ..validation import check_bool, check_grad_scaler, check_max_norm, check_no_gradient
from . import one_call, shards, updates
from .around_base import AroundBase, check_base
from .bases import check_fused, reason_not_fused
from .buckets import Bucket, Slots, all_present, buckets
from .elsewhere import check_no_zero_grad, own_signature
from .groups import check_group, check_own_settings, check_rho
from .interrupts import uninterrupted
from .ownership import owned
from .replicas import Replicas, average_, group_of, no_sync
from .scaling import GradCheck, Norms, Scaling, grad_checks, in_use, joined, scaling
from .two_backwards import backward, compiled_for_two_backwards


class ImbSAM(AroundBase):
    """Class-aware sharpness-aware minimisation around a base optimizer (paper, Algorithm 1).

    One step is three calls, each after a backward pass that left gradients in `p.grad`:

        loss.head.backward(retain_graph=True); optimizer.first_step()    # hold g_h
        loss.tail.backward();                  optimizer.second_step()   # theta + epsilon
        perturbed_loss.tail.backward();        optimizer.third_step()    # restore, update

    A pass may be left out with its call: without `first_step` this is SAM, without
    `second_step` a step of the base. `TrainStep` and `step(closure)` make the calls for you.

    `param_groups` and `state` are the base's own, so schedulers and checkpoints work on
    either; each group carries `rho`, `adaptive` and `perturb` besides the base's settings. A group
    with `perturb` False, or with rho 0, stays at theta and does not count in ||g_t||. A base of
    one of the classes in `optim.bases` is updated by one fused kernel that writes the base's own
    state; any other base, a subclass or a wrapper too, runs its own `step()` on the merged
    gradient.
    The fused kernel is the update that `foreach` and `fused` choose implementations of: they are
    accepted and make no difference, except that `capturable` and Adam's `fused` keep `step` on
    the device, without which a gradient scaler on a GPU and a CUDA graph want the host.

    Step hooks registered here run once a step, around the update in `third_step` with its
    arguments, which they may replace: the weights are still perturbed, `p.grad` is g_p and g_h is
    held. A base with step hooks runs its own `step()`: they find the unperturbed weights and the
    merged gradient in `p.grad`.

    Every call takes `p.grad` away: it is None afterwards. A gradient that somebody else can reach
    too (a bucket of DistributedDataParallel, a flat buffer, a list of yours) is copied by the
    first two, and neither written nor read later. The third may leave g_h + g_p in it.

    Args:
        base: the optimizer that updates the weights; also one that wraps others, if it has
            `param_groups`, `state`, `step` and `zero_grad`. Its own checkpoints, `train` and
            `eval` are used where it has them.
        rho: radius of the perturbation, >= 0.
        adaptive: ASAM: the perturbation scales with |theta|.
        master_weights: keep float32 weights of bfloat16 and float16 parameters, and the base's
            state of these in float32: `state[p]["master_weight"]` is perturbed and updated, and
            the parameter is its rounding. For the classes in `optim.bases`.

    Raises ValueError or TypeError for unusable arguments and RuntimeError for calls out of
    order; whatever fails, weights and state are what they were before the step. A base that
    fails inside its own step() leaves what it leaves without ImbSAM.
    """

    @own_signature
    def __init__(
        self,
        base: torch.optim.Optimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        master_weights: bool = False,
        **unknown: object,
    ) -> None:
        check_base(base)
        if unknown:
            raise TypeError(
                f"ImbSAM got {', '.join(unknown)}, expected rho, adaptive and master_weights; the "
                "base's settings go to the base: ImbSAM(torch.optim.SGD(params, lr=0.1), rho=0.05)"
            )
        check_rho(rho)
        check_bool("adaptive", adaptive)
        if check_bool("master_weights", master_weights):
            check_fused(base)
        for i, group in enumerate(base.param_groups):
            check_group(f"param_groups[{i}]", group, base)
        # Optimizer.__init__ would make groups and state anew; these are shared with the base.
        defaults = {
            **getattr(base, "defaults", {}), "rho": rho, "adaptive": adaptive, "perturb": True
        }  # fmt: skip
        self.__setstate__({"base": base, "defaults": defaults, "master_weights": master_weights})
        params = self._params()
        self._check_params(params)
        self._warn_of_rounding(params)

    # ------------------------------------------------------------ one step

    def first_step(self, zero_grad: None = None) -> None:
        """Hold the gradients in `p.grad` as g_h; copies only of those that others can reach.

        Args:
            zero_grad: refused, with the calls to write instead; SAM has it elsewhere.
        """
        check_no_zero_grad("first_step", zero_grad)
        if self._pending.held is not None or self._pending.saved is not None:
            raise RuntimeError(
                "first_step was called twice in one step, expected after the head's backward "
                "first_step, after the tail's second_step, and after the tail's at the perturbed "
                "weights third_step; coming from another SAM: docs/migration.md"
            )
        self._pending.held = owned(self._take_gradients())

    def second_step(self, subtract: bool = False, zero_grad: None = None) -> None:
        """Perturb: theta <- theta + rho g_t / ||g_t||, with g_t in `p.grad`.

        Args:
            subtract: take g_t away from what `first_step` held, where that is the gradient of
                head and tail together.
            zero_grad: refused, as in `first_step`.
        """
        check_no_zero_grad("second_step", zero_grad)
        if self._pending.saved is not None:
            raise RuntimeError("second_step was called twice in one step; third_step must follow")
        with self._abandoned_on_failure():
            if self._replicas.may_be() and self._replicas.leave_g_t_apart(self._params()):
                average_(self.gradients(), self._replicas.of(self._params())[0].process_group)
            g_t = owned(self._take_gradients())
            if all(g is None for g in g_t):
                raise RuntimeError("second_step found no gradient; the tail's backward comes first")
            perturbing = self._of_perturbed_groups(g_t)
            arguments = self.base, perturbing, self._masters, self._pending
            if subtract or not one_call.perturb(*arguments):
                self._perturb_in_launches(g_t, perturbing, subtract)

    @torch.no_grad()
    def _perturb_in_launches(self, g_t: Slots, perturbing: Slots, subtract: bool) -> None:
        """Perturb by what is left of g_t in `perturbing`, launch by launch."""
        with uninterrupted():
            held: Slots = [None] * len(g_t)
            if subtract:
                held = self._subtracted_from(g_t, perturbing)
            g_t = perturbing
            saved: Slots = [None] * len(g_t)
            self._pending.saved = saved
            masters = self._masters.of(g_t)
            buckets = self._buckets(masters, held, g_t)
            self._pending.is_adaptive = any(b.group["adaptive"] for b in buckets)
            partials = [
                ops.squared_norm(b.pick(g_t), b.params if b.group["adaptive"] else ())
                for b in buckets
            ]
            if partials and shards.is_sharded(self._params()):  # one norm, over all ranks' parts
                sums = joined(partials, buckets[0].params[0].device).sum()
                partials = [shards.summed(sums, self._params()).reshape(1)]
            self._pending.partials = partials
            for bucket in buckets:
                sums = joined(partials, bucket.params[0].device)
                # Sharpness is the worst loss nearby, which lies downhill for who climbs.
                rho = float(bucket.group["rho"])
                ops.perturb_(
                    bucket.params, bucket.pick(g_t), sums,
                    -rho if bucket.group.get("maximize") else rho,
                    bucket.group["adaptive"], bucket.pick(masters), bucket.pick(held),
                )  # fmt: skip
                # Without master weights, the buffers of g_t hold the unperturbed ones.
                bucket.give(saved, g_t if masters[bucket.indices[0]] is None else masters)

    def _subtracted_from(self, g_t: Slots, perturbing: Slots) -> Slots:
        """What of the held the perturbation is to take g_t from; the rest of it is taken here.

        That is where nothing is held, a zero, or the weight stays at theta.
        """
        held = self._pending.held
        if held is None:
            raise RuntimeError("second_step has nothing to subtract from; first_step comes first")
        left = [h if p is not None else None for h, p in zip(held, perturbing)]
        for i, (h, t) in enumerate(zip(held, g_t)):
            if t is not None and left[i] is None:
                held[i] = t.neg() if h is None else h.sub_(t)
        return left

    def third_step(
        self,
        grad_scaler: torch.amp.GradScaler | None = None,
        max_norm: float | None = None,
        zero_grad: None = None,
    ) -> Norms:
        """Restore theta and update it with g_h + g_p, g_p in `p.grad`; then clear `p.grad`.

        Without any gradient nothing happens, as in torch. Returns the norms of the gradients, as
        far as they were measured, on the device: see `training.plans.StepResult`.

        Args:
            grad_scaler: the one whose `scale` every loss of the step went through. The update
                undoes the scale; where any gradient is infinite or not a number it only
                restores. Call `grad_scaler.update()` afterwards, and neither its `step` nor
                its `unscale_`.
            max_norm: clip g_h + g_p to this norm over all parameters, as
                torch.nn.utils.clip_grad_norm_ does; infinity only measures the norm.
            zero_grad: refused, as in `first_step`.
        """
        check_no_zero_grad("third_step", zero_grad)
        check_max_norm(max_norm)
        check_grad_scaler(grad_scaler)
        with self._abandoned_on_failure():
            end = self._end_step if self._is_watched() else self._ended
            return end(grad_scaler=grad_scaler, max_norm=max_norm)

    @torch.optim.Optimizer.profile_hook_step
    def _end_step(self, grad_scaler: torch.amp.GradScaler | None, max_norm: float | None) -> Norms:
        """third_step, between the step hooks, which may have replaced its arguments."""
        check_max_norm(max_norm)
        check_grad_scaler(grad_scaler)
        return self._ended(grad_scaler, max_norm)

    def _ended(self, grad_scaler: torch.amp.GradScaler | None, max_norm: float | None) -> Norms:
        """third_step without the step hooks."""
        g_p = self._take_gradients()
        g_h = self._pending.held or [None] * len(g_p)
        saved = self._pending.saved or [None] * len(g_p)
        if unobserved() and reason_not_fused(self.base) is None:
            norms = self._update_in_one_call(saved, g_h, g_p, grad_scaler, max_norm)
            if norms is not None:
                self._done()
                return norms
        return self._update_in_launches(saved, g_h, g_p, grad_scaler, max_norm)

    def _update_in_one_call(
        self,
        saved: Slots,
        g_h: Slots,
        g_p: Slots,
        grad_scaler: torch.amp.GradScaler | None,
        max_norm: float | None,
    ) -> Norms | None:
        """Restore and update where one call does it; None, with nothing done, where none does."""

        def scaled(check: GradCheck) -> Scaling:
            return scaling(self, check, grad_scaler, max_norm)

        is_scaled = max_norm is not None or in_use(grad_scaler) is not None
        arguments = self.base, (saved, g_h, g_p), self._masters, self._pending, is_scaled, scaled
        if not is_scaled:
            return one_call.update(*arguments)
        with torch.no_grad(), uninterrupted():  # what is left in the scaler belongs to the update
            return one_call.update(*arguments)

    @torch.no_grad()
    def _update_in_launches(
        self,
        saved: Slots,
        g_h: Slots,
        g_p: Slots,
        grad_scaler: torch.amp.GradScaler | None,
        max_norm: float | None,
    ) -> Norms:
        """Restore and update, launch by launch or by the base's own step."""
        with uninterrupted():
            if not all_present(g_p):
                g_h, g_p = updates.complete(self.base, saved, g_h, g_p, self.is_perturbed)
            check = grad_checks(self.param_groups, g_h, g_p)
            *scale_and_flag, norms = scaling(self, check, grad_scaler, max_norm)
            reason = reason_not_fused(self.base)
            if reason is None:
                masters = self._masters.of(g_p, saved)
                updates.fused_update(self.base, saved, g_h, g_p, masters, *scale_and_flag)
                self._masters.written(masters)
                self._pending.saved = None  # updated: a failure from here on must not undo it
            elif self.master_weights:
                raise RuntimeError(f"{reason}, expected with master_weights=True a fused update")
            else:
                updates.merge(self.base, saved, g_h, g_p)
                self._pending.saved = None  # restored: what the base does from here is its own
                updates.base_step(self.base, g_p, *scale_and_flag)
            self._done()
            return norms

    def _done(self) -> None:
        self._pending.clear()
        # What LR schedulers look at to warn about a step that never happened.
        self._opt_called = self.base._opt_called = True  # type: ignore[attr-defined]

    def _is_watched(self) -> bool:
        """Whether step hooks, a profiler or a compiler want to see the end of a step."""
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        return bool(hooks) or updates.has_global_hooks() or not unobserved()

    def step(self, closure: Callable[[], SplitLoss] | None = None) -> SplitLoss:  # type: ignore[override]
        """One whole step by the joint plan.

        Args:
            closure: runs the forward pass and returns its `SplitLoss`, without a backward;
                called at theta and again at theta + epsilon. BatchNorm statistics are updated
                by both calls, unless the closure keeps that from happening. Of a
                `DistributedDataParallel` model g_t and g_h + g_p are averaged here, as in
                `TrainStep`; all ranks make the call together.

        Returns the loss at theta. Without a closure only torch.distributed.checkpoint steps, at
        learning rate 0 and with gradients of 0, to make the state that it then loads: it gets None.
        """
        if closure is None and self._only_makes_state():
            self.third_step()
            return None  # type: ignore[return-value]
        if not callable(closure):
            raise TypeError(
                f"closure is {closure!r}; step needs a closure that returns a SplitLoss; "
                "or call first_step, second_step and third_step after your own backwards"
            )
        self.require_idle("a step")
        check_no_gradient("a step", self._params())
        replicas = self._replicas.of(self._params())
        group = group_of(replicas)
        with self._abandoned_on_failure(), no_sync(replicas), torch.enable_grad():
            with compiled_for_two_backwards():
                loss = closure()
            _check_closure(loss)
            backward(loss.head, retain_graph=True)
            self.first_step()
            backward(loss.tail)
            if group is not None:
                average_(self.gradients(), group)
            self.second_step()
            perturbed = closure()
            _check_closure(perturbed)
            perturbed.tail.backward()
            if group is not None:
                self.merge_held()
                average_(self.gradients(), group)
            self.third_step()
        return SplitLoss(loss.head.detach(), loss.tail.detach())

    step.hooked = True  # type: ignore[attr-defined]  # torch's hooks run around _end_step instead

    def perturbation_is_finite(self) -> Tensor:
        """Whether g_t was, bool () on the device of the first parameter; while perturbed."""
        return self._pending.perturbation_is_finite(self._params()[0].device)

    def tail_gradient_norm(self, at_once: bool = False) -> Tensor | Callable[[], Tensor] | None:
        """||g_t|| over the perturbed groups, float64 (), times a gradient scaler's scale.

        Or what computes it, where that may wait until somebody reads it and it is not asked for
        `at_once`. None where the weights are not perturbed, and with `adaptive`, which has another
        norm.
        """
        return self._pending.tail_gradient_norm(self._params()[0].device, at_once)

    @torch.no_grad()
    def restore(self) -> None:
        """Abandon the step: the unperturbed weights bit for bit, nothing held, no gradient."""
        with uninterrupted():
            for p, saved in zip(self._params(), self._pending.saved or ()):
                if saved is not None:
                    shards.local(p).copy_(saved)
            torch.clear_autocast_cache()  # which knows nothing of writes in place
            self._masters.abandon()
            self._pending.clear()
            self.zero_grad()

    # ------------------------------------------------------------ gradients of several ranks

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """`p.grad` of every trainable parameter, zeros made where there was none."""
        trainable = [p for p in self._params() if p.requires_grad]
        for p in trainable:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in trainable]  # type: ignore[misc]

    @torch.no_grad()
    def merge_held(self) -> None:
        """p.grad <- g_h + g_p, holding nothing any more: ranks exchange one gradient."""
        for p, g_h in zip(self._params(), self._pending.held or ()):
            if g_h is not None:
                p.grad = g_h if p.grad is None else p.grad.add_(g_h)
        self._pending.held = None

    # ------------------------------------------------------------ internals

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "base" in state:
            self._replicas = Replicas()

    @contextmanager
    def _abandoned_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def _take_gradients(self) -> Slots:
        """The gradients in the layout of their parameters; `p.grad` is None afterwards."""
        params = self._params()
        if unobserved() and (taken := native.take_gradients(params)) is not None:
            return taken
        with torch.no_grad():
            if shards.is_sharded(params):
                parts, found = shards.locals_of(params), shards.local_gradients(params)
            else:
                parts, found = params, [p.grad for p in params]
            gradients = in_layout_of(parts, found, "the gradient")
            for p in params:
                p.grad = None
        return gradients

    def _buckets(self, *lists: Slots) -> list[Bucket]:
        return buckets(self.param_groups, *lists)

    def _of_perturbed_groups(self, g_t: Slots) -> Slots:
        """g_t, None for the parameters that stay at theta."""
        self._fill_groups()  # the base may have new ones
        for i, group in enumerate(self.param_groups):
            check_own_settings(f"param_groups[{i}]", group)
        stays = [not group["perturb"] or group["rho"] == 0 for group in self.param_groups]
        if not any(stays):
            return g_t
        of_params = [s for s, g in zip(stays, self.param_groups) for _ in g["params"]]
        return [None if stay else g for stay, g in zip(of_params, g_t)]

    def _only_makes_state(self) -> bool:
        """Whether a step would do nothing but make the base's state."""
        return (
            not self.state
            and all(group.get("lr", 0) == 0 for group in self.param_groups)
            and not any(shards.local(p.grad).any() for p in self._params() if p.grad is not None)
            and any(p.grad is not None for p in self._params())
        )


def _check_closure(loss: object) -> None:
    if isinstance(loss, Tensor):  # as SAM has it elsewhere, after its backward
        raise TypeError(
            "closure returned Tensor, expected a SplitLoss, without a backward:\n"
            "    closure = lambda: criterion(model(inputs), targets)  # a SplitCrossEntropy"
        )
    check_split_loss("closure", loss)

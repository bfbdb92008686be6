"""The update of each base: by one fused kernel, or by its own step() on merged gradients.

Arguments are slots, one entry a parameter: `saved`, the weights that a perturbation left, g_h and
g_p, the master weights, and of `scaling` how many times too large the gradients are, and
found_inf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .. import ops
from ..ops import native
from ..ops.arguments import in_layout_of, unobserved
from .bases import FUSED
from .buckets import Slots, all_present, buckets, local_params_of, params_of
from .shards import as_part_of, local, locals_of

# Where register_optimizer_step_pre_hook and its like of torch keep hooks, which has no public name.
_GLOBAL_HOOKS: tuple[dict, ...] = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)


class _Launch(NamedTuple):
    """One call of a fused operator, its argument check, and the tensors that it writes."""

    check: Callable[..., Any]
    operator: Callable[..., None]
    arguments: tuple[Any, ...]
    written: list[list[Tensor]]


def fused_update(
    base: Optimizer,
    saved: Slots,
    g_h: Slots,
    g_p: Slots,
    masters: Slots,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Restore the weights and update them and the base's state with g_h + g_p.

    Every launch is checked before the first one, so that a group that is refused keeps the others
    from being updated. New state is stored after the last one.
    """
    if any(master is not None for master in masters):  # the saved ones of their parameters
        saved = [s if master is None else None for s, master in zip(saved, masters)]
    launches, store = _launches(base, saved, g_h, g_p, masters, scale, found_inf)
    if len(launches) > 1:
        for launch in launches:
            launch.check(*launch.arguments)
    with all_or_none([launch.written for launch in launches]):
        for launch in launches:
            launch.operator(*launch.arguments)
    store()


def complete(
    base: Optimizer, saved: Slots, g_h: Slots, g_p: Slots, is_perturbed: bool
) -> tuple[Slots, Slots]:
    """g_h and g_p where some are missing: zero in one pass, in both passes nothing happens."""
    if is_perturbed and all(g is None for g in (*g_h, *g_p)):
        raise RuntimeError("third_step found no gradient; a backward comes first")
    g_h, g_p = (
        [h if g is not None else None for h, g in zip(g_h, g_p)],
        [g if g is not None else h for h, g in zip(g_h, g_p)],
    )
    for p, start, g in zip(params_of(base.param_groups), saved, g_p):
        if start is not None and g is None:  # perturbed, and then without any gradient
            local(p).copy_(start)
            if not torch.compiler.is_compiling():
                torch.clear_autocast_cache()
    return g_h, g_p


def merge(base: Optimizer, saved: Slots, g_h: Slots, g_p: Slots) -> None:
    """Restore the weights and g_p <- g_h + g_p."""
    for bucket in buckets(base.param_groups, saved, g_h, g_p):
        ops.merge_(bucket.params, bucket.pick(saved), bucket.pick(g_h), bucket.pick(g_p))


def base_step(
    base: Optimizer, gradients: Slots, scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Run the base's own step on the merged gradients, unless found_inf is set."""
    for p, g in zip(params_of(base.param_groups), gradients):
        p.grad = None if g is None else as_part_of(p, g)
        if g is not None and scale is not None:
            g.div_(scale.to(g.device))
    # A base that knows nothing of found_inf needs the answer, as in GradScaler.step.
    if found_inf is None or not found_inf.item():
        with _without_global_hooks():
            base.step()
    base.zero_grad()


def has_global_hooks() -> bool:
    """Whether torch's step hooks of all optimizers are in use."""
    return any(_GLOBAL_HOOKS)


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    """Inside the block torch's global step hooks do not run: they run around ImbSAM's update."""
    kept = [(hooks, dict(hooks)) for hooks in _GLOBAL_HOOKS if hooks]
    try:
        for hooks, _ in kept:
            hooks.clear()
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


@contextmanager
def all_or_none(written: Sequence[list[list[Tensor]]]) -> Iterator[None]:
    """Put back what several launches wrote inside the block if a later one fails.

    Only the reference can fail there, out of memory: it keeps copies.
    """
    may_fail = len(written) > 1 and not ops.computes_in_place(written[0][0][0].device)
    kept = []
    if may_fail:
        kept = [(t, t.clone()) for t in chain.from_iterable(chain.from_iterable(written[:-1]))]
    try:
        yield
    except BaseException:
        for t, before in kept:
            t.copy_(before)
        raise


def lr_tensor(lr: float | Tensor) -> Tensor:
    """The learning rate of a group as a tensor of one element."""
    return lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu")


# ---------------------------------------------------------------- the launches of a fused base


def _launches(
    base: Optimizer,
    saved: Slots,
    g_h: Slots,
    g_p: Slots,
    masters: Slots,
    scale: Tensor | None,
    found_inf: Tensor | None,
) -> tuple[list[_Launch], Callable[[], None]]:
    """The launches, one per bucket, and functions that store new state after them."""
    entry = FUSED[type(base)]
    groups = base.param_groups
    weights = _weights(local_params_of(groups), masters)
    found, known, state = {}, {}, {}
    for name, wanted in entry.state.items():
        found[name], known[name] = _found(base, name, wanted, g_p, weights)
        state[name] = _made_where_missing(base, wanted, known[name], g_p, weights)
    step: Slots = _step_counts(base, g_p) if entry.has_step else [None] * len(g_p)
    # Parameters in their first step take another launch where that differs.
    first_differs = any(entry.first_differs(group) for group in groups)
    apart = known.values() if first_differs else ()
    operator = getattr(ops, entry.operator)
    check = getattr(ops, f"check_{entry.operator.rstrip('_')}")
    launches = []
    for bucket in buckets(groups, masters, saved, g_h, *apart, g_p):
        group, i = bucket.group, bucket.indices[0]
        is_first = all(slots[i] is None for slots in known.values())
        lists = [bucket.pick(slots) for slots in state.values()]
        steps = [bucket.pick(step)] if entry.has_step else []
        master = bucket.pick(masters)
        arguments = (
            bucket.params, bucket.pick(saved), bucket.pick(g_h), bucket.pick(g_p), *lists, *steps,
            lr_tensor(group["lr"]), *entry.settings(group, is_first), group["maximize"],
            scale, found_inf, master,
        )  # fmt: skip
        written = [bucket.params, *lists, *steps, master]
        launches.append(_Launch(check, operator, arguments, written))

    def store() -> None:
        new = {name: slots for name, slots in state.items() if slots is not found[name]}
        if first_differs and new and found_inf is not None and found_inf.item():
            return  # the next step is still the first one
        for name, slots in new.items():
            for p, t, before in zip(params_of(groups), slots, found[name]):
                if t is not None and t is not before:
                    base.state[p][name] = as_part_of(p, t)
        for p, count in zip(params_of(groups), step) if entry.has_step else ():
            if count is not None:
                base.state[p]["step"] = count

    return launches, store


def _weights(params: list[Tensor], masters: Slots) -> list[Tensor]:
    """The tensors that keep the weights; the state has their dtypes and layouts."""
    return [p if master is None else master for p, master in zip(params, masters)]


def _found(
    base: Optimizer,
    name: str,
    wanted: Callable[[dict[str, Any]], bool],
    g_p: Slots,
    weights: list[Tensor],
) -> tuple[Slots, Slots]:
    """The base's state of this name for parameters with a gradient; None where it has none.

    As it is, and in the layout of the weights, which is mostly the same list.
    """
    params = params_of(base.param_groups)
    if unobserved() and all(map(wanted, base.param_groups)) and all(map(is_, params, weights)):
        seen = native.state_of(base.state, params, name, g_p)
        if seen is not None:
            return seen, seen
    found: Slots = []
    for group in base.param_groups:
        group_wants = wanted(group)
        for p in group["params"]:
            needed = group_wants and g_p[len(found)] is not None and p in base.state
            found.append(base.state[p].get(name) if needed else None)
    found = locals_of(found)
    return found, _fitting(weights, found, name)


def _fitting(weights: list[Tensor], found: Slots, name: str) -> Slots:
    """State in the layout of the weights, and in float32 beside master weights."""
    found = [
        t.float() if t is not None and w.dtype == torch.float32 != t.dtype else t
        for t, w in zip(found, weights)
    ]
    return in_layout_of(weights, found, name)


def _made_where_missing(
    base: Optimizer,
    wanted: Callable[[dict[str, Any]], bool],
    known: Slots,
    g_p: Slots,
    weights: list[Tensor],
) -> Slots:
    """State with zeros made where a first step needs them."""
    if all_present(known):
        return known
    made: Slots = []
    for group in base.param_groups:
        group_wants = wanted(group)
        for _ in group["params"]:
            i = len(made)
            missing = known[i] is None and g_p[i] is not None and group_wants
            made.append(torch.zeros_like(weights[i]) if missing else known[i])
    return known if all(map(is_, made, known)) else made


def _step_counts(base: Optimizer, g_p: Slots) -> Slots:
    """The step counts of parameters with a gradient, made where torch would make them."""
    # Of a new count on the CPU; those on the device are float32 in every case.
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    found: Slots = []
    for group in base.param_groups:
        on_device = group["capturable"] or group.get("fused")
        for p in group["params"]:
            count = base.state[p].get("step") if p in base.state else None
            if g_p[len(found)] is not None and count is None:
                count = (
                    torch.zeros((), dtype=torch.float32, device=p.device)
                    if on_device
                    else torch.zeros((), dtype=dtype, device="cpu")
                )
            found.append(count if g_p[len(found)] is not None else None)
    return found

"""The update of each base: by one fused kernel, or by its own step() on merged gradients.

Arguments are slots, one entry a parameter: `saved`, the weights that a perturbation left, g_h and
g_p, the master weights, and of `scaling` how many times too large the gradients are, and
found_inf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .. import ops
from ..ops.arguments import in_layout_of
from .buckets import Slots, buckets, local_params_of, params_of
from .shards import as_part_of, local, locals_of, strange_kind

FUSED_BASES = (SGD, Adam, AdamW)


def reason_not_fused(base: Optimizer) -> str | None:
    """None where `fused_update` does what base.step() would do, else why it does not."""
    if type(base) not in FUSED_BASES:  # a subclass may step otherwise
        return f"base is {type(base).__name__}"
    if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        return "base has step hooks, which may want the merged gradient"
    if any(isinstance(beta, Tensor) for g in base.param_groups for beta in g.get("betas", ())):
        return "base has betas that are tensors"
    if type(base) is not SGD and (kind := strange_kind(params_of(base.param_groups))) is not None:
        # It may run an operator once for each tensor inside, which would count as many steps.
        return f"parameters are {kind.__name__}, a subclass of Tensor"
    return None


def check_fused(base: Optimizer) -> None:
    """Refuse a base around which there can be no master weights."""
    reason = reason_not_fused(base)
    if reason is not None:
        names = ", ".join(f"torch.optim.{fused.__name__}" for fused in FUSED_BASES)
        raise ValueError(
            f"{reason}, expected with master_weights=True one of {names}, without step hooks"
        )


class _Launch(NamedTuple):
    """One call of a fused operator, what checks its arguments, and what it writes."""

    check: Callable[..., Any]
    operator: Callable[..., None]
    arguments: tuple[Any, ...]
    written: list[Tensor]


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
    update = _sgd_update if type(base) is SGD else _adam_update
    launches, store = update(base, saved, g_h, g_p, masters, scale, found_inf)
    if len(launches) > 1:
        for launch in launches:
            launch.check(*launch.arguments)
    with all_or_none([launch.written for launch in launches]):
        for launch in launches:
            launch.operator(*launch.arguments)
    store()


def merge(base: Optimizer, saved: Slots, g_h: Slots, g_p: Slots) -> None:
    """Restore the weights and g_p <- g_h + g_p."""
    for bucket in buckets(base.param_groups, saved, g_h, g_p):
        ops.merge_(bucket.params, bucket.pick(saved), bucket.pick(g_h), bucket.pick(g_p))


def base_step(
    base: Optimizer, gradients: Slots, scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """The base's own step on the merged gradients, none where found_inf says so."""
    for p, g in zip(params_of(base.param_groups), gradients):
        p.grad = None if g is None else as_part_of(p, g)
        if g is not None and scale is not None:
            g.div_(scale.to(g.device))
    # A base that knows nothing of found_inf needs the answer, as in GradScaler.step.
    if found_inf is None or not found_inf.item():
        base.step()
    base.zero_grad()


@contextmanager
def all_or_none(written: Sequence[list[Tensor]]) -> Iterator[None]:
    """What several launches write inside the block, put back where a later one fails.

    Only the reference can fail there, out of memory: it keeps copies.
    """
    may_fail = len(written) > 1 and not ops.computes_in_place(written[0][0].device)
    kept = [(t, t.clone()) for tensors in written[:-1] for t in tensors] if may_fail else []
    try:
        yield
    except BaseException:
        for t, before in kept:
            t.copy_(before)
        raise


Update = tuple[list[_Launch], Callable[[], None]]  # the launches, and what stores new state


def lr_tensor(lr: float | Tensor) -> Tensor:
    return lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu")


def _kept(params: list[Tensor], masters: Slots) -> list[Tensor]:
    """Where the weights are kept: the dtype and the layout of the state."""
    return [p if master is None else master for p, master in zip(params, masters)]


def _fitting(kept: list[Tensor], found: Slots, name: str) -> Slots:
    """State in the layout of the weights, and in float32 beside master weights."""
    found = [
        t.float() if t is not None and w.dtype == torch.float32 != t.dtype else t
        for t, w in zip(found, kept)
    ]
    return in_layout_of(kept, found, name)


# ---------------------------------------------------------------- SGD


def _sgd_update(
    base: Optimizer,
    saved: Slots,
    g_h: Slots,
    g_p: Slots,
    masters: Slots,
    scale: Tensor | None,
    found_inf: Tensor | None,
) -> Update:
    params = params_of(base.param_groups)
    kept = _kept(local_params_of(base.param_groups), masters)
    found = _momentum_buffers(base, g_p)
    known = _fitting(kept, found, "momentum_buffer")
    m = _made_where_missing(base, known, g_p, kept)
    launches = []
    for bucket in buckets(base.param_groups, masters, saved, g_h, known, g_p):
        group = bucket.group
        is_first = known[bucket.indices[0]] is None
        written = [*bucket.params, *bucket.pick(m), *bucket.pick(masters)]
        arguments = (
            bucket.params, bucket.pick(saved), bucket.pick(g_h), bucket.pick(g_p),
            bucket.pick(m), lr_tensor(group["lr"]), group["momentum"],
            # The first step of torch.optim.SGD takes the gradient undampened.
            0.0 if is_first else group["dampening"],
            group["weight_decay"], group["nesterov"], group["maximize"], scale, found_inf,
            bucket.pick(masters),
        )  # fmt: skip
        launches.append(_Launch(ops.check_sgd_update, ops.sgd_update_, arguments, written))

    def store() -> None:
        dampened = any(group["dampening"] for group in base.param_groups)
        if dampened and found_inf is not None and found_inf.item():
            return  # the next step is still the first one
        for p, buffer, before in zip(params, m, found):
            if buffer is not None and buffer is not before:
                base.state[p]["momentum_buffer"] = as_part_of(p, buffer)

    return launches, store


def _momentum_buffers(base: Optimizer, g_p: Slots) -> Slots:
    """The momentum buffers that there are, for parameters with a gradient."""
    found: Slots = []
    for group in base.param_groups:
        if group["momentum"] == 0:
            found += [None] * len(group["params"])
            continue
        for p in group["params"]:
            of_p = base.state.get(p) if g_p[len(found)] is not None else None
            found.append(of_p.get("momentum_buffer") if of_p else None)
    return locals_of(found)


def _made_where_missing(base: Optimizer, m: Slots, g_p: Slots, kept: list[Tensor]) -> Slots:
    """The momentum buffers with zeros for those that a first step needs."""
    made: Slots = []
    for group in base.param_groups:
        for _ in group["params"]:
            i = len(made)
            missing = m[i] is None and g_p[i] is not None and group["momentum"] != 0
            made.append(torch.zeros_like(kept[i]) if missing else m[i])
    return made


# ---------------------------------------------------------------- Adam and AdamW


def _adam_update(
    base: Optimizer,
    saved: Slots,
    g_h: Slots,
    g_p: Slots,
    masters: Slots,
    scale: Tensor | None,
    found_inf: Tensor | None,
) -> Update:
    params = params_of(base.param_groups)
    kept = _kept(local_params_of(base.param_groups), masters)
    state = {
        "exp_avg": _moments(base, "exp_avg", g_p, kept),
        "exp_avg_sq": _moments(base, "exp_avg_sq", g_p, kept),
        "max_exp_avg_sq": _moments(base, "max_exp_avg_sq", g_p, kept),
        "step": _step_counts(base, g_p),
    }
    m, v, v_max, step = state.values()
    launches = []
    for bucket in buckets(base.param_groups, masters, saved, g_h, g_p):
        group = bucket.group
        kinds = (m, v, v_max, step, masters)
        written = [*bucket.params, *(t for slots in kinds for t in bucket.pick(slots))]
        arguments = (
            bucket.params, bucket.pick(saved), bucket.pick(g_h), bucket.pick(g_p),
            bucket.pick(m), bucket.pick(v), bucket.pick(v_max), bucket.pick(step),
            lr_tensor(group["lr"]), *group["betas"], group["eps"], group["weight_decay"],
            # torch before 2.7 has AdamW beside Adam, and no such setting.
            group.get("decoupled_weight_decay", type(base) is AdamW), group["maximize"],
            scale, found_inf, bucket.pick(masters),
        )  # fmt: skip
        launches.append(_Launch(ops.check_adam_update, ops.adam_update_, arguments, written))

    def store() -> None:
        for name, slots in state.items():
            for p, t in zip(params, slots):
                if t is not None:
                    base.state[p][name] = t if name == "step" else as_part_of(p, t)

    return launches, store


def _moments(base: Optimizer, name: str, g_p: Slots, kept: list[Tensor]) -> Slots:
    """What the base has of this name for parameters with a gradient; zeros where it has none."""
    found: Slots = []
    for group in base.param_groups:
        wanted = group["amsgrad"] or name != "max_exp_avg_sq"
        for p in group["params"]:
            i = len(found)
            if g_p[i] is None or not wanted:
                found.append(None)
                continue
            known = base.state[p].get(name) if p in base.state else None
            found.append(torch.zeros_like(kept[i]) if known is None else local(known))
    return _fitting(kept, found, name)


def _step_counts(base: Optimizer, g_p: Slots) -> Slots:
    """The steps taken, for parameters with a gradient: new ones where torch has them."""
    # Of a new count on the CPU; those on the device are float32 in every case.
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    found: Slots = []
    for group in base.param_groups:
        on_device = group["capturable"] or group["fused"]
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

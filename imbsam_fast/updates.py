"""The update of each base: by one fused kernel, or by its own step() on merged gradients.

Arguments are slots, one entry a parameter: `saved`, the weights that a perturbation left, g_h and
g_p, and of `ImbSAM._scaling` how many times too large the gradients are, and found_inf.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from . import ops
from .buckets import Slots, buckets, params_of


def is_fused(base: Optimizer) -> bool:
    """Whether `fused_update` does what base.step() would do."""
    return type(base) is SGD


def fused_update(
    base: Optimizer,
    saved: Slots,
    g_h: Slots,
    g_p: Slots,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Restore the weights and update them and the base's state with g_h + g_p.

    Every launch is checked before the first one, so that a group that is refused keeps the others
    from being updated.
    """
    _sgd_update(base, saved, g_h, g_p, scale, found_inf)


def merge(base: Optimizer, saved: Slots, g_h: Slots, g_p: Slots) -> None:
    """Restore the weights and g_p <- g_h + g_p."""
    for bucket in buckets(base.param_groups, saved, g_h, g_p):
        ops.merge_(bucket.params, bucket.pick(saved), bucket.pick(g_h), bucket.pick(g_p))


def base_step(
    base: Optimizer, gradients: Slots, scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """The base's own step on the merged gradients, none where found_inf says so."""
    for p, g in zip(params_of(base.param_groups), gradients):
        p.grad = g
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


def lr_tensor(lr: float | Tensor) -> Tensor:
    return lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)


# ---------------------------------------------------------------- SGD


def _sgd_update(
    base: Optimizer,
    saved: Slots,
    g_h: Slots,
    g_p: Slots,
    scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    params = params_of(base.param_groups)
    found = _momentum_buffers(base, g_p)
    known = ops.in_layout_of(params, found, "momentum_buffer")
    m = _made_where_missing(base, known, g_p)
    launches = []
    for bucket in buckets(base.param_groups, saved, g_h, known, g_p):
        group = bucket.group
        is_first = known[bucket.indices[0]] is None
        launches.append((
            bucket.params, bucket.pick(saved), bucket.pick(g_h), bucket.pick(g_p),
            bucket.pick(m), lr_tensor(group["lr"]), group["momentum"],
            # The first step of torch.optim.SGD takes the gradient undampened.
            0.0 if is_first else group["dampening"],
            group["weight_decay"], group["nesterov"], group["maximize"], scale, found_inf,
        ))  # fmt: skip
    if len(launches) > 1:
        for arguments in launches:
            ops.check_sgd_update(*arguments)
    with all_or_none([[*theta, *m] for theta, _, _, _, m, *_ in launches]):
        for arguments in launches:
            ops.sgd_update_(*arguments)
    dampened = any(group["dampening"] for group in base.param_groups)
    if dampened and found_inf is not None and found_inf.item():
        return  # the next step is still the first one
    for p, buffer, before in zip(params, m, found):
        if buffer is not before:
            base.state[p]["momentum_buffer"] = buffer


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
    return found


def _made_where_missing(base: Optimizer, m: Slots, g_p: Slots) -> Slots:
    """The momentum buffers with zeros for those that a first step needs."""
    made: Slots = []
    for group in base.param_groups:
        for p in group["params"]:
            i = len(made)
            missing = m[i] is None and g_p[i] is not None and group["momentum"] != 0
            made.append(torch.zeros_like(p) if missing else m[i])
    return made

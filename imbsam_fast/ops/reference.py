"""The specification of every operation in plain torch, readable beside docs/design.md's equations.

It is a backend like the others (same names, same argument order; `update_` for every update), works
on any device and in float64, and is what the compiled kernels are tested against. List arguments
hold one tensor per parameter, all of one dtype, on one device, pairwise in the same layout;
`operators.py` checks that. An empty list stands for an absent input (a zero gradient, weights
that were not perturbed, no momentum). Whatever allocates comes before the first write, so
that running out of memory changes nothing.

Arithmetic runs in float32 for float32, bfloat16 and float16 data, in float64 for float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.arithmetic import CHUNK, advance_, arithmetic_dtype
from .reference_soft import split_soft_cross_entropy as split_soft_cross_entropy
from .reference_soft import split_soft_cross_entropy_backward as split_soft_cross_entropy_backward

# Added to the norm so that a zero gradient gives a zero step (the authors' released code).
NORM_GUARD = 1e-16


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order, (numel,), without a copy."""
    return tensor.as_strided((tensor.numel(),), (1,))


def chunked_sums(values: Sequence[Tensor]) -> Tensor:
    """float64 (chunks,): the sum over every CHUNK elements of every tensor."""
    sums = [chunk.sum() for v in values if v.numel() for chunk in flat(v).double().split(CHUNK)]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64, device="cpu")


def squared_norm(g_t: Sequence[Tensor], theta: Sequence[Tensor] = ()) -> Tensor:
    """Partial sums of ||g_t||^2, or with theta (ASAM) of ||theta g_t||^2: float64 (chunks,)."""
    scaled = [t.double() * g.double() for t, g in zip(theta, g_t)] if theta else g_t
    return chunked_sums([g.double().square() for g in scaled]).to(g_t[0].device)


def perturbation_scale(partials: Tensor, rho: float, dtype: torch.dtype) -> Tensor:
    """rho / (norm + guard) as a scalar in the arithmetic dtype of `dtype`."""
    norm = partials.sum().sqrt().to(arithmetic_dtype(dtype))
    return rho / (norm + NORM_GUARD)


def perturb_(
    theta: Sequence[Tensor],
    g_t: Sequence[Tensor],
    partials: Tensor,  # (any,) float64, summing to the squared norm over all parameters
    rho: float,
    adaptive: bool = False,
    master: Sequence[Tensor] = (),  # the float32 weights whose rounding theta is; else []
    held: Sequence[Tensor] = (),  # what g_t is taken away from
) -> None:
    """theta <- theta + rho g_t / ||g_t||; held <- held - g_t; g_t <- the unperturbed theta.

    Adaptive (ASAM): theta <- theta + rho theta^2 g_t / ||theta g_t||. With master weights these
    stand for theta on the right, and g_t is left as it is: the master weights are the saved ones.
    """
    dtype = arithmetic_dtype(theta[0].dtype)
    scale = perturbation_scale(partials, rho, dtype)
    perturbed = []
    for w, g in zip(master or theta, g_t):
        direction = w.to(dtype).square() * g.to(dtype) if adaptive else g.to(dtype)
        perturbed.append(w.to(dtype) + scale * direction)
    for h, g in zip(held, g_t):
        h.copy_(h.to(dtype) - g.to(dtype))
    for t, g, new in zip(theta, g_t, perturbed):
        if not master:
            g.copy_(t)
        t.copy_(new)


def combined_gradient(
    g_h: Tensor | None, g_p: Tensor, grad_scale: Tensor | None, maximize: bool
) -> Tensor:
    """g_h + g_p in the arithmetic dtype, without the loss scale; negative to maximize."""
    dtype = arithmetic_dtype(g_p.dtype)
    g = g_p.to(dtype) if g_h is None else g_h.to(dtype) + g_p.to(dtype)
    if grad_scale is not None:
        g = g * (1 / grad_scale.to(g.device, dtype).squeeze())
    return -g if maximize else g


def write_where_found(
    written: Sequence[tuple[Tensor, Tensor, Tensor]], found_inf: Tensor | None
) -> None:
    """Give each tensor its first value, or where found_inf is not 0 its second one."""
    values = [new for _, new, _ in written]
    if found_inf is not None:
        values = [
            torch.where(found_inf.to(t.device).squeeze() != 0, old, new) for t, new, old in written
        ]
    for (t, _, _), value in zip(written, values):
        t.copy_(value)


def sgd_update_(
    theta: Sequence[Tensor],
    saved: Sequence[Tensor],  # [] where theta was not perturbed
    g_h: Sequence[Tensor],  # [] for zero
    g_p: Sequence[Tensor],
    m: Sequence[Tensor],  # momentum buffers, zero before the first step; [] without momentum
    lr: Tensor,  # one element, as grad_scale and found_inf
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,  # the gradients are this many times too large
    found_inf: Tensor | None = None,  # non-zero: only restore theta
    master: Sequence[Tensor] = (),  # float32 weights, with saved [] and m in float32
) -> None:
    """Restore theta, then one torch.optim.SGD step with the gradient g_h + g_p.

    d = g_h + g_p + weight_decay theta;  m <- momentum m + (1 - dampening) d;
    theta <- theta - lr m   (nesterov: theta - lr (d + momentum m)).

    With master weights these are restored to and updated, and theta becomes their rounding.
    """
    dtype = arithmetic_dtype(theta[0].dtype)
    written = []
    for i, t in enumerate(theta):
        start = (master or saved or theta)[i].to(dtype)
        g = combined_gradient(g_h[i] if g_h else None, g_p[i], grad_scale, maximize)
        d = g + weight_decay * start
        velocity = momentum * m[i].to(dtype) + (1 - dampening) * d if m else d
        direction = d + momentum * velocity if m and nesterov else velocity
        stepped = start - lr.to(t.device, dtype).squeeze() * direction
        written += [(w, stepped, start) for w in (t, *master[i : i + 1])]
        if m:
            written.append((m[i], velocity, m[i].to(dtype)))
    write_where_found(written, found_inf)


def adam_update_(
    theta: Sequence[Tensor],
    saved: Sequence[Tensor],  # [] where theta was not perturbed
    g_h: Sequence[Tensor],  # [] for zero
    g_p: Sequence[Tensor],
    m: Sequence[Tensor],  # exp_avg, zero before the first step, as v and v_max
    v: Sequence[Tensor],  # exp_avg_sq
    v_max: Sequence[Tensor],  # max_exp_avg_sq; [] without amsgrad
    step: Sequence[Tensor],  # float32 or float64, one element each: the steps taken before
    lr: Tensor,  # one element, as grad_scale and found_inf
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,  # AdamW; else Adam, whose weight decay is a part of the gradient
    maximize: bool,
    grad_scale: Tensor | None = None,  # the gradients are this many times too large
    found_inf: Tensor | None = None,  # non-zero: only restore theta
    master: Sequence[Tensor] = (),  # float32 weights, with saved [] and m, v, v_max in float32
) -> None:
    """Restore theta, then one torch.optim.AdamW or Adam step with the gradient g_h + g_p.

    d = g_h + g_p;  m <- beta1 m + (1 - beta1) d;  v <- beta2 v + (1 - beta2) d^2;
    step <- step + 1;  m^ = m / (1 - beta1^step);  v^ = v / (1 - beta2^step)
    theta <- theta - lr (m^ / (sqrt(v^) + eps) + weight_decay theta).

    Adam: d = g_h + g_p + weight_decay theta, and no weight decay in the last line. With v_max,
    v_max <- max(v_max, v) stands for v in v^. With master weights these are restored to and
    updated, and theta becomes their rounding.
    """
    dtype = arithmetic_dtype(theta[0].dtype)
    coupled, decoupled_decay = (0.0, weight_decay) if decoupled else (weight_decay, 0.0)
    written = []
    for i, t in enumerate(theta):
        start = (master or saved or theta)[i].to(dtype)
        g = combined_gradient(g_h[i] if g_h else None, g_p[i], grad_scale, maximize)
        d = g + coupled * start
        first = beta1 * m[i].to(dtype) + (1 - beta1) * d
        second = beta2 * v[i].to(dtype) + (1 - beta2) * (d * d)
        bound = torch.maximum(v_max[i].to(dtype), second) if v_max else second
        taken = step[i].to(t.device, torch.float64).squeeze() + 1
        m_hat = first * (1 / (1 - beta1**taken)).to(dtype)
        root_v_hat = bound.sqrt() * (1 / (1 - beta2**taken).sqrt()).to(dtype)
        direction = m_hat / (root_v_hat + eps) + decoupled_decay * start
        stepped = start - lr.to(t.device, dtype).squeeze() * direction
        written += [(w, stepped, start) for w in (t, *master[i : i + 1])]
        moments = [(m, first), (v, second), *([(v_max, bound)] if v_max else [])]
        written += [(kept[i], new, kept[i].to(dtype)) for kept, new in moments]
    write_where_found(written, found_inf)
    advance_(step, found_inf)


def rmsprop_update_(
    theta: Sequence[Tensor],
    saved: Sequence[Tensor],  # [] where theta was not perturbed
    g_h: Sequence[Tensor],  # [] for zero
    g_p: Sequence[Tensor],
    v: Sequence[Tensor],  # square_avg, zero before the first step, as m and g_avg
    m: Sequence[Tensor],  # momentum_buffer; [] without momentum
    g_avg: Sequence[Tensor],  # grad_avg; [] where it is not centered
    step: Sequence[Tensor],  # float32 or float64, one element each: the steps taken, counted only
    lr: Tensor,  # one element, as grad_scale and found_inf
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: bool,
    grad_scale: Tensor | None = None,  # the gradients are this many times too large
    found_inf: Tensor | None = None,  # non-zero: only restore theta
    master: Sequence[Tensor] = (),  # float32 weights, with saved [] and v, m, g_avg in float32
) -> None:
    """Restore theta, then one torch.optim.RMSprop step with the gradient g_h + g_p.

    d = g_h + g_p + weight_decay theta;  v <- alpha v + (1 - alpha) d^2;
    g_avg <- alpha g_avg + (1 - alpha) d;  u = d / (sqrt(v - g_avg^2) + eps);
    m <- momentum m + u;  theta <- theta - lr m.

    Without g_avg it is zero in u; without m, u stands for m. With master weights these are restored
    to and updated, and theta becomes their rounding.
    """
    dtype = arithmetic_dtype(theta[0].dtype)
    written = []
    for i, t in enumerate(theta):
        start = (master or saved or theta)[i].to(dtype)
        g = combined_gradient(g_h[i] if g_h else None, g_p[i], grad_scale, maximize)
        d = g + weight_decay * start
        squares = alpha * v[i].to(dtype) + (1 - alpha) * (d * d)
        changed, spread = [(v, squares)], squares
        if g_avg:  # as torch.lerp, which leaves the smaller of two errors
            mean = g_avg[i].to(dtype)
            near = 1 - alpha < 0.5
            mean = mean + (1 - alpha) * (d - mean) if near else d - alpha * (d - mean)
            spread = squares - mean * mean
            changed.append((g_avg, mean))
        direction = d / (spread.sqrt() + eps)
        if m:
            direction = momentum * m[i].to(dtype) + direction
            changed.append((m, direction))
        stepped = start - lr.to(t.device, dtype).squeeze() * direction
        written += [(w, stepped, start) for w in (t, *master[i : i + 1])]
        written += [(kept[i], new, kept[i].to(dtype)) for kept, new in changed]
    write_where_found(written, found_inf)
    advance_(step, found_inf)


def update_(
    op: str,  # an update of this module
    theta: Sequence[Tensor],
    saved: Sequence[Tensor],
    g_h: Sequence[Tensor],
    g_p: Sequence[Tensor],
    state: Sequence[Sequence[Tensor]],  # its lists after g_p and before step
    step: Sequence[Tensor],  # [] where it has none
    lr: Tensor,
    settings: Sequence[float],  # those between lr and maximize
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    master: Sequence[Tensor],
) -> None:
    """Any of the updates: how a backend takes them, whatever the base is."""
    lists = (theta, saved, g_h, g_p, *state, *([step] if step else []))
    globals()[op](*lists, lr, *settings, maximize, grad_scale, found_inf, master)


def merge_(
    theta: Sequence[Tensor],
    saved: Sequence[Tensor],  # [] where theta was not perturbed
    g_h: Sequence[Tensor],  # [] for zero
    g_p: Sequence[Tensor],
) -> None:
    """Restore theta and g_p <- g_h + g_p, for a base optimizer that does the rest."""
    dtype = arithmetic_dtype(theta[0].dtype)
    sums = [h.to(dtype) + p.to(dtype) for h, p in zip(g_h, g_p)]
    for t, start in zip(theta, saved):
        t.copy_(start)
    for p, total in zip(g_p, sums):
        p.copy_(total)


def grad_check(g_h: Sequence[Tensor], g_p: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Partial sums of ||g_h + g_p||^2, float64 (chunks,), and found_inf, float32 (1,).

    found_inf is 1 where an element of g_h + g_p is infinite or not a number, else 0: the
    form in which torch.amp.GradScaler and `sgd_update_` take it. g_h may be [].
    """
    total = [
        (h.to(arithmetic_dtype(h.dtype)) + p.to(arithmetic_dtype(p.dtype)))
        for h, p in zip(g_h, g_p)
    ] or g_p
    finite = torch.stack([t.isfinite().all() for t in total]).all()
    return squared_norm(total), (~finite).float().reshape(1)


def split_cross_entropy(
    logits: Tensor,  # (N, K)
    targets: Tensor,  # (N,) int64
    plain: Tensor,  # (K,) in the arithmetic dtype, as sharp and class_weight
    sharp: Tensor,  # (K,)
    class_weight: Tensor | None,  # (K,)
    label_smoothing: float,
    ignore_index: int,
    batch_size: float | None,  # b; None: the number of rows that are not ignored
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """head = 1/b sum_i plain[y_i] l_i and tail = 1/b sum_i sharp[y_i] l_i.

    l_i is torch's cross-entropy of row i (0 for an ignored row). Returns head, tail and b as
    scalars and lse (N, 2), which the backward needs: each row's maximum and the logarithm of
    its sum of exp(z - maximum). Their sum is the log-sum-exp; apart, they lose nothing where
    logits are far from zero. All in the arithmetic dtype. Head and tail are 0 where no row
    counts.
    """
    logits = logits.to(arithmetic_dtype(logits.dtype))
    losses = F.cross_entropy(
        logits, targets, class_weight, None, ignore_index, None, "none", label_smoothing
    )
    counted = targets != ignore_index
    y = targets.where(counted, 0)
    b = counted.sum().to(logits.dtype) if batch_size is None else logits.new_tensor(batch_size)
    head, tail = (
        # A row that carries no weight counts nothing whatever its loss is.
        torch.where(weights[y] == 0, 0, weights[y] * losses).sum() / b.clamp(min=1)
        for weights in (plain, sharp)
    )
    maximum = logits.amax(dim=1, keepdim=True)
    lse = torch.cat([maximum, (logits - maximum).exp().sum(dim=1, keepdim=True).log()], dim=1)
    return head, tail, b, lse


def split_cross_entropy_backward(
    grad_head: Tensor | None,  # (), None for zero
    grad_tail: Tensor | None,  # (), None for zero
    logits: Tensor,  # (N, K)
    targets: Tensor,  # (N,)
    lse: Tensor,  # (N, 2), from the forward
    b: Tensor,  # ()
    plain: Tensor,  # (K,)
    sharp: Tensor,  # (K,)
    class_weight: Tensor | None,  # (K,)
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """The gradient for the logits, (N, K) in their dtype.

    With r_i = (grad_head plain[y_i] + grad_tail sharp[y_i]) / b, p = softmax(logits), class
    weights w (1 if None) with sum W, and smoothing s, row i is
    r_i [((1 - s) w_y + s W / K) p_k - (1 - s) w_y 1[k = y] - s w_k / K].
    """
    dtype = arithmetic_dtype(logits.dtype)
    num_classes = logits.shape[1]
    w = torch.ones_like(plain) if class_weight is None else class_weight
    counted = targets != ignore_index
    y = targets.where(counted, 0)
    row = lse.new_zeros(len(targets))
    if grad_head is not None:
        row = row + grad_head.to(dtype) * plain[y]
    if grad_tail is not None:
        row = row + grad_tail.to(dtype) * sharp[y]
    row = (row * counted / b.clamp(min=1)).unsqueeze(1)
    hard = ((1 - label_smoothing) * w[y]).unsqueeze(1)
    smooth = label_smoothing / num_classes * w
    maximum, log_sum = lse.split(1, dim=1)
    p = (logits.to(dtype) - maximum - log_sum).exp()
    inner = (hard + smooth.sum()) * p - smooth
    inner = inner.scatter_add(1, y.unsqueeze(1), -hard)
    # A row that carries no weight has a zero gradient whatever its logits are.
    return torch.where(row == 0, torch.zeros_like(inner), row * inner).to(logits.dtype)

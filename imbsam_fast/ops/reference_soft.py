"""Cross-entropy with label distributions in plain torch: a part of reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.arithmetic import arithmetic_dtype


def split_soft_cross_entropy(
    logits: Tensor,  # (N, K)
    q: Tensor,  # (N, K) in the arithmetic dtype, as the class weights; not negative
    plain: Tensor,  # (K,)
    sharp: Tensor,  # (K,)
    class_weight: Tensor | None,  # (K,)
    label_smoothing: float,
    batch_size: float | None,  # b; None: the number of rows that are not all zero
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """head = 1/b sum_i sum_k q_ik plain_k l_ik and tail = 1/b sum_i sum_k q_ik sharp_k l_ik.

    l_ik is the loss of row i with the label k, smoothing s and class weights w included:
    l_ik = -(1 - s) w_k log p_ik - s / K sum_j w_j log p_ij. So q may be a label's one-hot vector.

    Returns head, tail and b as scalars and what the backward needs, (N, 6): each row's maximum and
    log-sum as in `split_cross_entropy`, then sum_k q_k plain_k w_k, the same with sharp, sum_k q_k
    plain_k and sum_k q_k sharp_k. All in the arithmetic dtype.
    """
    logits = logits.to(arithmetic_dtype(logits.dtype))
    w = torch.ones_like(plain) if class_weight is None else class_weight
    log_p = logits.log_softmax(1)
    losses = -(1 - label_smoothing) * w * log_p
    if label_smoothing:
        losses = losses - label_smoothing / len(w) * (w * log_p).sum(1, keepdim=True)
    counted = (q != 0).any(1).sum().to(logits.dtype)
    b = counted if batch_size is None else logits.new_tensor(batch_size)
    shares = q * plain, q * sharp
    head, tail = (
        # A class without weight in a row counts nothing whatever its loss is.
        torch.where(share == 0, 0, share * losses).sum() / b.clamp(min=1)
        for share in shares
    )
    maximum = logits.amax(dim=1)
    log_sum = (logits - maximum.unsqueeze(1)).exp().sum(dim=1).log()
    sums = [(share * factor).sum(1) for factor in (w, 1) for share in shares]
    return head, tail, b, torch.stack([maximum, log_sum, *sums], dim=1)


def split_soft_cross_entropy_backward(
    grad_head: Tensor | None,  # (), None for zero
    grad_tail: Tensor | None,  # (), None for zero
    logits: Tensor,  # (N, K)
    q: Tensor,  # (N, K)
    rows: Tensor,  # (N, 6), from the forward
    b: Tensor,  # ()
    plain: Tensor,  # (K,)
    sharp: Tensor,  # (K,)
    class_weight: Tensor | None,  # (K,)
    label_smoothing: float,
) -> Tensor:
    """The gradient for the logits, (N, K) in their dtype.

    With c_k = (grad_head plain_k + grad_tail sharp_k) / b, p = softmax(logits), class weights w
    (1 if None) with sum W, and smoothing s, row i is
    [(1 - s) sum_j q_j c_j w_j + s W / K sum_j q_j c_j] p_k
    - (1 - s) q_k c_k w_k - s / K sum_j q_j c_j w_k.
    """
    dtype = arithmetic_dtype(logits.dtype)
    w = torch.ones_like(plain) if class_weight is None else class_weight
    c, weighted, mass = torch.zeros_like(plain), rows.new_zeros(len(q)), rows.new_zeros(len(q))
    carries = torch.zeros(len(q), dtype=torch.bool, device=q.device)
    for part, (gradient, weights) in enumerate(((grad_head, plain), (grad_tail, sharp))):
        if gradient is not None:
            factor = gradient.to(dtype) / b.clamp(min=1)
            c = c + factor * weights
            weighted = weighted + factor * rows[:, 2 + part]
            mass = mass + factor * rows[:, 4 + part]
            carries = carries | ((factor != 0) & (rows[:, 4 + part] != 0))
    p = (logits.to(dtype) - rows[:, :1] - rows[:, 1:2]).exp()
    smooth = (label_smoothing / len(w) * mass).unsqueeze(1)
    soft = ((1 - label_smoothing) * weighted).unsqueeze(1) + smooth * w.sum()
    gradient = soft * p - q * ((1 - label_smoothing) * c * w)
    if label_smoothing:
        gradient = gradient - smooth * w
    # A row that carries no weight has a zero gradient whatever its logits are.
    return torch.where(carries.unsqueeze(1), gradient, 0).to(logits.dtype)

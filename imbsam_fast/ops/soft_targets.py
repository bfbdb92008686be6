"""The loss operator for label distributions: schema, argument checks, fake, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.arithmetic import arithmetic_dtype
from . import dispatch, reference
from .arguments import is_transformed
from .library import LIBRARY, NAMESPACE, define, fake
from .operators import (
    check_class_weights,
    check_logits,
    check_loss_settings,
    fake_gradient,
    fake_losses,
    refuse_double_backward,
)


def split_soft_cross_entropy(
    logits: Tensor,
    q: Tensor,
    plain: Tensor,
    sharp: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    batch_size: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The head and the tail loss of label distributions, differentiable for the logits.

    See reference.split_soft_cross_entropy, which runs itself under torch.func and forward-mode
    differentiation, as that of labels does.
    """
    op = "split_soft_cross_entropy"
    check_logits(op, logits)
    expected = (logits.shape, arithmetic_dtype(logits.dtype), logits.device)
    if (q.shape, q.dtype, q.device) != expected:
        raise ValueError(
            f"{op}: q is {q.dtype} {tuple(q.shape)} on {q.device}, expected {expected[1]} "
            f"{tuple(logits.shape)} on {logits.device}"
        )
    check_class_weights(op, logits, plain=plain, sharp=sharp, class_weight=class_weight)
    check_loss_settings(op, label_smoothing, batch_size)
    arguments = (logits, q, plain, sharp, class_weight, label_smoothing, batch_size)
    if is_transformed():
        return reference.split_soft_cross_entropy(*arguments)[:2]
    head, tail, _, _ = NAMESPACE.split_soft_cross_entropy(*arguments)
    return head, tail


@define(
    "split_soft_cross_entropy(Tensor logits, Tensor q, Tensor plain, Tensor sharp,"
    " Tensor? class_weight, float label_smoothing, float? batch_size)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _split_soft_cross_entropy(logits, *args):
    return dispatch.select(logits.device).split_soft_cross_entropy(logits, *args)


@fake("split_soft_cross_entropy")
def _(logits, *args):
    return fake_losses(logits, 6)


@define(
    "split_soft_cross_entropy_backward(Tensor? grad_head, Tensor? grad_tail, Tensor logits,"
    " Tensor q, Tensor rows, Tensor b, Tensor plain, Tensor sharp, Tensor? class_weight,"
    " float label_smoothing) -> Tensor"
)
def _split_soft_cross_entropy_backward(grad_head, grad_tail, logits, *args):
    backend = dispatch.select(logits.device)
    return backend.split_soft_cross_entropy_backward(grad_head, grad_tail, logits, *args)


fake("split_soft_cross_entropy_backward")(fake_gradient)


def _setup_context(ctx, inputs, output) -> None:
    logits, q, plain, sharp, class_weight, ctx.label_smoothing, _ = inputs
    _, _, b, rows = output
    ctx.save_for_backward(logits, q, rows, b, plain, sharp, class_weight)
    ctx.mark_non_differentiable(b, rows)
    ctx.set_materialize_grads(False)  # None tells the kernel to skip that part's rows


def _backward(ctx, grad_head, grad_tail, *_):
    gradient = None
    if grad_head is not None or grad_tail is not None:
        gradient = NAMESPACE.split_soft_cross_entropy_backward(
            grad_head, grad_tail, *ctx.saved_tensors, ctx.label_smoothing
        )
    return gradient, None, None, None, None, None, None


torch.library.register_autograd(
    "imbsam_fast::split_soft_cross_entropy", _backward, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    "imbsam_fast::split_soft_cross_entropy_backward", refuse_double_backward, lib=LIBRARY
)

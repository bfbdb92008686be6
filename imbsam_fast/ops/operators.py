"""The operators that torch sees: schemas, argument checks, fakes, autograd.

Each function here has the arguments of its namesake in `reference.py`. It checks them and
calls the operator `torch.ops.imbsam_fast.<name>`, which hands over to the backend that
`dispatch.select` names. Operators trace under torch.compile(fullgraph=True). Those of the fused
bases are in updates.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.arithmetic import CHUNK, arithmetic_dtype
from ..validation import check_batch_size
from . import dispatch, reference
from .arguments import DTYPES, check_lists, check_master, is_transformed, unobserved
from .library import LIBRARY, NAMESPACE, define, fake, mutated


def computes_in_place(device: torch.device) -> bool:
    """Whether the operators on `device` write without memory of their own for the results."""
    return dispatch.backend_name(device.type) != "reference"


# ---------------------------------------------------------------- the optimizer phases


def squared_norm(g_t: Sequence[Tensor], theta: Sequence[Tensor] = ()) -> Tensor:
    """See reference.squared_norm."""
    read = check_lists("squared_norm", g_t=g_t, theta=theta)
    return NAMESPACE.squared_norm(g_t, theta) if read is None else _squared_norm(*read)


@define("squared_norm(Tensor[] g_t, Tensor[] theta) -> Tensor")
def _squared_norm(g_t, theta):
    return dispatch.select(g_t[0].device).squared_norm(g_t, theta)


@fake("squared_norm")
def _(g_t, theta):
    return _empty_partials(g_t)


def _empty_partials(tensors: Sequence[Tensor]) -> Tensor:
    chunks = sum((t.numel() + CHUNK - 1) // CHUNK for t in tensors)
    return torch.empty(chunks, dtype=torch.float64, device=tensors[0].device)


def perturb_(
    theta: Sequence[Tensor],
    g_t: Sequence[Tensor],
    partials: Tensor,
    rho: float,
    adaptive: bool = False,
    master: Sequence[Tensor] = (),
    held: Sequence[Tensor] = (),
) -> None:
    """See reference.perturb_."""
    read = check_lists("perturb_", theta=theta, g_t=g_t, held=held)
    kept = check_master("perturb_", theta, master=master) if master else [master]
    if not isinstance(rho, (int, float)) or not math.isfinite(rho):
        raise ValueError(f"perturb_: rho is {rho!r}, expected a finite number")
    if partials.dtype != torch.float64 or partials.dim() != 1:
        raise ValueError(
            f"perturb_: partials is {partials.dtype} {tuple(partials.shape)}, expected float64 (n,)"
        )
    if partials.device != theta[0].device:
        raise ValueError(
            f"perturb_: partials is on {partials.device}, expected {theta[0].device} as theta"
        )
    if read is None or kept is None:
        NAMESPACE.perturb_(theta, g_t, partials, rho, adaptive, master, held)
        return
    theta, g_t, held = read
    _perturb_(theta, g_t, partials, rho, adaptive, kept[0], held)


@define(
    "perturb_(Tensor(a!)[] theta, Tensor(b!)[] g_t, Tensor partials, float rho, bool adaptive,"
    " Tensor[] master, Tensor(c!)[] held) -> ()"
)
def _perturb_(theta, g_t, partials, rho, adaptive, master, held):
    dispatch.select(theta[0].device).perturb_(theta, g_t, partials, rho, adaptive, master, held)
    mutated(theta, () if master else g_t, held)


def merge_(
    theta: Sequence[Tensor],
    saved: Sequence[Tensor],
    g_h: Sequence[Tensor],
    g_p: Sequence[Tensor],
) -> None:
    """See reference.merge_."""
    read = check_lists("merge_", theta=theta, g_p=g_p, saved=saved, g_h=g_h)
    if not g_p:
        raise ValueError("merge_: g_p is empty, expected one gradient for every parameter")
    if read is None:
        NAMESPACE.merge_(theta, saved, g_h, g_p)
    else:
        theta, g_p, saved, g_h = read
        _merge_(theta, saved, g_h, g_p)


@define("merge_(Tensor(a!)[] theta, Tensor[] saved, Tensor[] g_h, Tensor(b!)[] g_p) -> ()")
def _merge_(theta, saved, g_h, g_p):
    dispatch.select(theta[0].device).merge_(theta, saved, g_h, g_p)
    mutated(theta, g_p)


for _name in ("perturb_", "merge_"):
    fake(_name)(lambda *args: None)


def grad_check(g_h: Sequence[Tensor], g_p: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See reference.grad_check."""
    read = check_lists("grad_check", g_p=g_p, g_h=g_h)
    return NAMESPACE.grad_check(g_h, g_p) if read is None else _grad_check(*reversed(read))


@define("grad_check(Tensor[] g_h, Tensor[] g_p) -> (Tensor, Tensor)")
def _grad_check(g_h, g_p):
    return dispatch.select(g_p[0].device).grad_check(g_h, g_p)


@fake("grad_check")
def _(g_h, g_p):
    return _empty_partials(g_p), torch.empty(1, dtype=torch.float32, device=g_p[0].device)


# ---------------------------------------------------------------- the loss


def split_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    plain: Tensor,
    sharp: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    batch_size: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The head and the tail loss, differentiable for the logits.

    See reference.split_cross_entropy, which runs itself under torch.func and forward-mode
    differentiation: it is made of torch's operations, which know all derivatives and vmap.
    """
    _check_cross_entropy(logits, targets, plain, sharp, class_weight, label_smoothing, batch_size)
    arguments = (
        logits, targets, plain, sharp, class_weight, label_smoothing, ignore_index, batch_size
    )  # fmt: skip
    if is_transformed():
        return reference.split_cross_entropy(*arguments)[:2]
    if type(logits) is Tensor and unobserved():
        return _SplitCrossEntropy.apply(*arguments)
    head, tail, _, _ = NAMESPACE.split_cross_entropy(*arguments)
    return head, tail


def _check_cross_entropy(
    logits, targets, plain, sharp, class_weight, label_smoothing, batch_size
) -> None:
    op = "split_cross_entropy"
    check_logits(op, logits)
    if targets.dtype != torch.int64 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"{op}: targets is {targets.dtype} {tuple(targets.shape)}, expected torch.int64 "
            f"({logits.shape[0]},)"
        )
    check_class_weights(op, logits, plain=plain, sharp=sharp, class_weight=class_weight)
    if targets.device != logits.device:
        raise ValueError(f"{op}: targets is on {targets.device}, expected {logits.device}")
    check_loss_settings(op, label_smoothing, batch_size)


def check_logits(op: str, logits: Tensor) -> None:
    """Refuse logits that are not (N, K)."""
    if logits.dim() != 2 or logits.dtype not in DTYPES or logits.shape[1] == 0:
        raise ValueError(
            f"{op}: logits is {logits.dtype} {tuple(logits.shape)}, expected (N, K) with K > 0 "
            f"in one of {', '.join(map(str, DTYPES))}"
        )


def check_class_weights(op: str, logits: Tensor, **weights: Tensor | None) -> None:
    """Refuse what is not (K,) in the arithmetic dtype beside the logits."""
    expected = (logits.shape[1:], arithmetic_dtype(logits.dtype), logits.device)
    for name, w in weights.items():
        if w is not None and (w.shape, w.dtype, w.device) != expected:
            raise ValueError(
                f"{op}: {name} is {w.dtype} {tuple(w.shape)} on {w.device}, expected "
                f"{expected[1]} {tuple(expected[0])} on {expected[2]}"
            )


def check_loss_settings(op: str, label_smoothing: float, batch_size: float | None) -> None:
    """Refuse numbers out of range."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing!r}, expected 0 to 1")
    check_batch_size(f"{op}: batch_size", batch_size)


@define(
    "split_cross_entropy(Tensor logits, Tensor targets, Tensor plain, Tensor sharp,"
    " Tensor? class_weight, float label_smoothing, int ignore_index, float? batch_size)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _split_cross_entropy(logits, *args):
    return dispatch.select(logits.device).split_cross_entropy(logits, *args)


def fake_losses(logits: Tensor, row_numbers: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Head, tail and b, and so many numbers a row for the backward."""
    scalar = logits.new_empty((), dtype=arithmetic_dtype(logits.dtype))
    return scalar, scalar.clone(), scalar.clone(), scalar.new_empty(logits.shape[0], row_numbers)


def fake_gradient(grad_head, grad_tail, logits, *args):
    """Of the logits, whatever else the backward takes."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@fake("split_cross_entropy")
def _(logits, *args):
    return fake_losses(logits, 2)


@define(
    "split_cross_entropy_backward(Tensor? grad_head, Tensor? grad_tail, Tensor logits,"
    " Tensor targets, Tensor lse, Tensor b, Tensor plain, Tensor sharp, Tensor? class_weight,"
    " float label_smoothing, int ignore_index) -> Tensor"
)
def _split_cross_entropy_backward(grad_head, grad_tail, logits, *args):
    backend = dispatch.select(logits.device)
    return backend.split_cross_entropy_backward(grad_head, grad_tail, logits, *args)


fake("split_cross_entropy_backward")(fake_gradient)


def _save_for_backward(ctx, inputs, output) -> None:
    logits, targets, plain, sharp, class_weight, label_smoothing, ignore_index, _ = inputs
    _, _, b, lse = output
    ctx.save_for_backward(logits, targets, lse, b, plain, sharp, class_weight)
    ctx.settings = (label_smoothing, ignore_index)
    ctx.set_materialize_grads(False)  # None tells the kernel to skip that part's rows


def _setup_context(ctx, inputs, output) -> None:
    _save_for_backward(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx, grad_head, grad_tail, *_, direct=False):
    grad_logits = None
    if grad_head is not None or grad_tail is not None:
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes for every look
        backend = dispatch.select(saved[0].device) if direct else NAMESPACE
        grad_logits = backend.split_cross_entropy_backward(
            grad_head, grad_tail, *saved, *ctx.settings
        )
    return grad_logits, None, None, None, None, None, None, None


class _SplitCrossEntropy(torch.autograd.Function):
    """The operator without torch's dispatcher, which takes longer than a small batch."""

    @staticmethod
    def forward(ctx, *inputs):
        output = dispatch.select(inputs[0].device).split_cross_entropy(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output[:2]

    @staticmethod
    def backward(ctx, grad_head, grad_tail):
        # With create_graph=True the operator refuses in its own words.
        direct = unobserved() and not torch.is_grad_enabled()
        return _backward(ctx, grad_head, grad_tail, direct=direct)


def refuse_double_backward(ctx, *grads):
    """Say what to take instead."""
    raise RuntimeError(
        "split_cross_entropy cannot be differentiated twice; for second derivatives use "
        "split_loss(functools.partial(F.cross_entropy, reduction='none'), split)"
    )


torch.library.register_autograd(
    "imbsam_fast::split_cross_entropy", _backward, setup_context=_setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    "imbsam_fast::split_cross_entropy_backward", refuse_double_backward, lib=LIBRARY
)

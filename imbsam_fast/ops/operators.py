"""The operators that torch sees: schemas, argument checks, fakes, autograd.

Each function here has the arguments of its namesake in `reference.py`. It checks them and
calls the operator `torch.ops.imbsam_fast.<name>`, which hands over to the backend that
`dispatch.select` names. Operators trace under torch.compile(fullgraph=True).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..kernels.arithmetic import CHUNK, arithmetic_dtype
from ..validation import check_batch_size
from . import dispatch, reference
from .arguments import (
    DTYPES,
    check_lists,
    check_master,
    check_scalars,
    check_steps,
    is_transformed,
    unobserved,
)

_library = torch.library.Library("imbsam_fast", "DEF")
_NAMESPACE = torch.ops.imbsam_fast


def _define(schema: str):
    """Register the decorated function as the operator `schema` on every device."""

    def register(implementation):
        implementation = torch.no_grad()(implementation)
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(schema.partition("(")[0], implementation, "CompositeExplicitAutograd")
        return implementation

    return register


def _fake(name: str):
    return torch.library.register_fake(f"imbsam_fast::{name}", lib=_library)


def _mutated(*lists: Sequence[Tensor]) -> None:
    """Tell torch what a kernel wrote: autograd, and autocast, which keeps casts of weights."""
    increment_version([t for tensors in lists for t in tensors])
    torch.clear_autocast_cache()


def computes_in_place(device: torch.device) -> bool:
    """Whether the operators on `device` write without memory of their own for the results."""
    return dispatch.backend_name(device.type) != "reference"


# ---------------------------------------------------------------- the optimizer phases


def squared_norm(g_t: Sequence[Tensor], theta: Sequence[Tensor] = ()) -> Tensor:
    """See reference.squared_norm."""
    direct = check_lists("squared_norm", g_t=g_t, theta=theta)
    return (_squared_norm if direct else _NAMESPACE.squared_norm)(g_t, theta)


@_define("squared_norm(Tensor[] g_t, Tensor[] theta) -> Tensor")
def _squared_norm(g_t, theta):
    return dispatch.select(g_t[0].device).squared_norm(g_t, theta)


@_fake("squared_norm")
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
    direct = check_lists("perturb_", theta=theta, g_t=g_t, held=held)
    if master:
        direct &= check_master("perturb_", theta, master=master)
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
    arguments = (theta, g_t, partials, rho, adaptive, master, held)
    (_perturb_ if direct else _NAMESPACE.perturb_)(*arguments)


@_define(
    "perturb_(Tensor(a!)[] theta, Tensor(b!)[] g_t, Tensor partials, float rho, bool adaptive,"
    " Tensor[] master, Tensor(c!)[] held) -> ()"
)
def _perturb_(theta, g_t, partials, rho, adaptive, master, held):
    dispatch.select(theta[0].device).perturb_(theta, g_t, partials, rho, adaptive, master, held)
    _mutated(theta, () if master else g_t, held)


def check_sgd_update(
    theta, saved, g_h, g_p, m, lr, momentum, dampening, weight_decay, nesterov, maximize,
    grad_scale=None, found_inf=None, master=(),
) -> bool:  # fmt: skip
    """Refuse arguments that sgd_update_ would refuse; returns what check_lists does."""
    direct = _check_update("sgd_update_", theta, saved, g_h, g_p, master, m=m)
    if (momentum != 0) != (len(m) > 0):
        raise ValueError(
            f"sgd_update_: m has {len(m)} tensors with momentum {momentum}, "
            "expected momentum buffers exactly when momentum is not 0"
        )
    check_scalars("sgd_update_", lr=lr, grad_scale=grad_scale, found_inf=found_inf)
    return direct


def _check_update(op, theta, saved, g_h, g_p, master, **state) -> bool:
    """Refuse the lists of an update; `state` is kept like the weights."""
    if master and saved:
        raise ValueError(f"{op}: saved has {len(saved)} tensors, expected none beside master")
    lists = {"theta": theta, "g_p": g_p, "saved": saved, "g_h": g_h}
    direct = check_lists(op, **lists, **({} if master else state))
    if not g_p:
        raise ValueError(f"{op}: g_p is empty, expected one gradient for every parameter")
    if master:
        direct &= check_master(op, theta, master=master, **state)
    return direct


def sgd_update_(
    theta: Sequence[Tensor],
    saved: Sequence[Tensor],
    g_h: Sequence[Tensor],
    g_p: Sequence[Tensor],
    m: Sequence[Tensor],
    lr: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    master: Sequence[Tensor] = (),
) -> None:
    """See reference.sgd_update_."""
    arguments = (
        theta, saved, g_h, g_p, m, lr, momentum, dampening, weight_decay, nesterov, maximize,
        grad_scale, found_inf, master,
    )  # fmt: skip
    direct = check_sgd_update(*arguments)
    (_sgd_update_ if direct else _NAMESPACE.sgd_update_)(*arguments)


@_define(
    "sgd_update_(Tensor(a!)[] theta, Tensor[] saved, Tensor[] g_h, Tensor[] g_p,"
    " Tensor(b!)[] m, Tensor lr, float momentum, float dampening, float weight_decay,"
    " bool nesterov, bool maximize, Tensor? grad_scale, Tensor? found_inf,"
    " Tensor(c!)[] master) -> ()"
)
def _sgd_update_(theta, saved, g_h, g_p, m, *scalars_and_master):
    backend = dispatch.select(theta[0].device)
    backend.sgd_update_(theta, saved, g_h, g_p, m, *scalars_and_master)
    _mutated(theta, m, scalars_and_master[-1])


def check_adam_update(
    theta, saved, g_h, g_p, m, v, v_max, step, lr, beta1, beta2, eps, weight_decay, decoupled,
    maximize, grad_scale=None, found_inf=None, master=(),
) -> bool:  # fmt: skip
    """Refuse arguments that adam_update_ would refuse; returns what check_lists does."""
    direct = _check_update("adam_update_", theta, saved, g_h, g_p, master, m=m, v=v, v_max=v_max)
    for name, list_ in (("m", m), ("v", v)):
        if not list_:
            raise ValueError(f"adam_update_: {name} is empty, expected one tensor a parameter")
    check_steps("adam_update_", step, theta)
    check_scalars("adam_update_", lr=lr, grad_scale=grad_scale, found_inf=found_inf)
    return direct


def adam_update_(
    theta: Sequence[Tensor],
    saved: Sequence[Tensor],
    g_h: Sequence[Tensor],
    g_p: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    v_max: Sequence[Tensor],
    step: Sequence[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    master: Sequence[Tensor] = (),
) -> None:
    """See reference.adam_update_."""
    arguments = (
        theta, saved, g_h, g_p, m, v, v_max, step, lr, beta1, beta2, eps, weight_decay, decoupled,
        maximize, grad_scale, found_inf, master,
    )  # fmt: skip
    direct = check_adam_update(*arguments)
    (_adam_update_ if direct else _NAMESPACE.adam_update_)(*arguments)


@_define(
    "adam_update_(Tensor(a!)[] theta, Tensor[] saved, Tensor[] g_h, Tensor[] g_p, Tensor(b!)[] m,"
    " Tensor(c!)[] v, Tensor(d!)[] v_max, Tensor(e!)[] step, Tensor lr, float beta1, float beta2,"
    " float eps, float weight_decay, bool decoupled, bool maximize, Tensor? grad_scale,"
    " Tensor? found_inf, Tensor(f!)[] master) -> ()"
)
def _adam_update_(theta, saved, g_h, g_p, m, v, v_max, step, *scalars_and_master):
    backend = dispatch.select(theta[0].device)
    backend.adam_update_(theta, saved, g_h, g_p, m, v, v_max, step, *scalars_and_master)
    _mutated(theta, m, v, v_max, step, scalars_and_master[-1])


def merge_(
    theta: Sequence[Tensor],
    saved: Sequence[Tensor],
    g_h: Sequence[Tensor],
    g_p: Sequence[Tensor],
) -> None:
    """See reference.merge_."""
    direct = check_lists("merge_", theta=theta, g_p=g_p, saved=saved, g_h=g_h)
    if not g_p:
        raise ValueError("merge_: g_p is empty, expected one gradient for every parameter")
    (_merge_ if direct else _NAMESPACE.merge_)(theta, saved, g_h, g_p)


@_define("merge_(Tensor(a!)[] theta, Tensor[] saved, Tensor[] g_h, Tensor(b!)[] g_p) -> ()")
def _merge_(theta, saved, g_h, g_p):
    dispatch.select(theta[0].device).merge_(theta, saved, g_h, g_p)
    _mutated(theta, g_p)


for _name in ("perturb_", "sgd_update_", "adam_update_", "merge_"):
    _fake(_name)(lambda *args: None)


def grad_check(g_h: Sequence[Tensor], g_p: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See reference.grad_check."""
    direct = check_lists("grad_check", g_p=g_p, g_h=g_h)
    return (_grad_check if direct else _NAMESPACE.grad_check)(g_h, g_p)


@_define("grad_check(Tensor[] g_h, Tensor[] g_p) -> (Tensor, Tensor)")
def _grad_check(g_h, g_p):
    return dispatch.select(g_p[0].device).grad_check(g_h, g_p)


@_fake("grad_check")
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
    head, tail, _, _ = _NAMESPACE.split_cross_entropy(*arguments)
    return head, tail


def _check_cross_entropy(
    logits, targets, plain, sharp, class_weight, label_smoothing, batch_size
) -> None:
    op = "split_cross_entropy"
    if logits.dim() != 2 or logits.dtype not in DTYPES or logits.shape[1] == 0:
        raise ValueError(
            f"{op}: logits is {logits.dtype} {tuple(logits.shape)}, expected (N, K) with K > 0 "
            f"in one of {', '.join(map(str, DTYPES))}"
        )
    if targets.dtype != torch.int64 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"{op}: targets is {targets.dtype} {tuple(targets.shape)}, expected torch.int64 "
            f"({logits.shape[0]},)"
        )
    expected = (logits.shape[1:], arithmetic_dtype(logits.dtype), logits.device)
    for name, w in (("plain", plain), ("sharp", sharp), ("class_weight", class_weight)):
        if w is not None and (w.shape, w.dtype, w.device) != expected:
            raise ValueError(
                f"{op}: {name} is {w.dtype} {tuple(w.shape)} on {w.device}, expected "
                f"{expected[1]} {tuple(expected[0])} on {expected[2]}"
            )
    if targets.device != logits.device:
        raise ValueError(f"{op}: targets is on {targets.device}, expected {logits.device}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing!r}, expected 0 to 1")
    check_batch_size(f"{op}: batch_size", batch_size)


@_define(
    "split_cross_entropy(Tensor logits, Tensor targets, Tensor plain, Tensor sharp,"
    " Tensor? class_weight, float label_smoothing, int ignore_index, float? batch_size)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _split_cross_entropy(logits, *args):
    return dispatch.select(logits.device).split_cross_entropy(logits, *args)


@_fake("split_cross_entropy")
def _(logits, *args):
    scalar = logits.new_empty((), dtype=arithmetic_dtype(logits.dtype))
    return scalar, scalar.clone(), scalar.clone(), scalar.new_empty(logits.shape[0], 2)


@_define(
    "split_cross_entropy_backward(Tensor? grad_head, Tensor? grad_tail, Tensor logits,"
    " Tensor targets, Tensor lse, Tensor b, Tensor plain, Tensor sharp, Tensor? class_weight,"
    " float label_smoothing, int ignore_index) -> Tensor"
)
def _split_cross_entropy_backward(grad_head, grad_tail, logits, *args):
    backend = dispatch.select(logits.device)
    return backend.split_cross_entropy_backward(grad_head, grad_tail, logits, *args)


@_fake("split_cross_entropy_backward")
def _(grad_head, grad_tail, logits, *args):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


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
        backend = dispatch.select(saved[0].device) if direct else _NAMESPACE
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


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError(
        "split_cross_entropy cannot be differentiated twice; for second derivatives use "
        "split_loss(functools.partial(F.cross_entropy, reduction='none'), split)"
    )


torch.library.register_autograd(
    "imbsam_fast::split_cross_entropy", _backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd(
    "imbsam_fast::split_cross_entropy_backward", _refuse_double_backward, lib=_library
)

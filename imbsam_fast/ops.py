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
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import dispatch, native
from .reference import CHUNK, arithmetic_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

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


def _unobserved() -> bool:
    """Whether no compiler, profiler, transform or dispatch mode wants to see the operators.

    Plain tensors then go straight to the backend: torch's dispatcher takes longer than the
    kernels of a small network.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.autograd._profiler_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or is_in_torch_dispatch_mode()
    )


def _fake(name: str):
    return torch.library.register_fake(f"imbsam_fast::{name}", lib=_library)


# ---------------------------------------------------------------- argument checks


def _describe(t: Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)} with strides {t.stride()} on {t.device}"


def check_dense(name: str, t: Tensor) -> None:
    """Refuse a tensor whose elements do not fill one block of memory without overlap."""
    if t.is_contiguous():
        return
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape)):
        if size > 1 and stride != expected:
            raise ValueError(
                f"{name} is {_describe(t)}, expected a dense layout "
                "(contiguous or a permutation of it)"
            )
        expected *= size


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape order their elements in memory alike."""
    strides = a.stride(), b.stride()
    return strides[0] == strides[1] or all(n <= 1 or s == t for n, s, t in zip(a.shape, *strides))


def _only_ordered_otherwise(t: Tensor, p: Tensor) -> bool:
    return (t.shape, t.dtype, t.device) == (p.shape, p.dtype, p.device) and not same_layout(t, p)


def in_layout_of(
    params: Sequence[Tensor], tensors: list[Tensor | None], name: str
) -> list[Tensor | None]:
    """`tensors`, those that order their elements otherwise than their parameter copied.

    Raises TypeError for one that is not strided, calling it `name`.
    """
    if _unobserved() and native.pairs_match(params, tensors):
        return tensors
    for i, t in enumerate(tensors):
        if t is not None and t.layout != torch.strided:
            raise TypeError(f"{name} of parameter {i} is {t.layout}, expected strided")
    return [
        torch.empty_like(p).copy_(t) if t is not None and _only_ordered_otherwise(t, p) else t
        for p, t in zip(params, tensors)
    ]


def one_kind(tensors: Sequence[Tensor]) -> bool:
    """Whether one launch can take all of them."""
    if _unobserved() and native.one_kind(tensors):
        return True
    return all((t.device, t.dtype) == (tensors[0].device, tensors[0].dtype) for t in tensors)


def check_lists(op: str, **lists: Sequence[Tensor]) -> bool:
    """Refuse lists that do not match the first one tensor by tensor; [] is always allowed.

    Returns whether the operator need not go through torch's dispatcher.
    """
    if _unobserved() and native.lists_match([*lists.values()]):
        return True  # else what follows finds out what is wrong, or that nothing is
    (first_name, first), *others = lists.items()
    if not first:
        raise ValueError(f"{op}: {first_name} is empty, expected at least one tensor")
    expected = _signatures(first)
    dtype, device = first[0].dtype, first[0].device
    if dtype not in DTYPES:
        raise TypeError(
            f"{op}: {first_name}[0] is {dtype}, expected one of {', '.join(map(str, DTYPES))}"
        )
    for i, (t, signature) in enumerate(zip(first, expected)):
        if t.layout != torch.strided:
            raise TypeError(f"{op}: {first_name}[{i}] is {t.layout}, expected a strided tensor")
        if signature[:2] != (dtype, device):
            raise ValueError(
                f"{op}: {first_name}[{i}] is {t.dtype} on {t.device}, expected {dtype} on "
                f"{device} as {first_name}[0]"
            )
        check_dense(f"{op}: {first_name}[{i}]", t)
    for name, tensors in others:
        if tensors and len(tensors) != len(first):
            raise ValueError(
                f"{op}: {name} has {len(tensors)} tensors, expected {len(first)} as {first_name}"
            )
        if tensors and _signatures(tensors) != expected:
            _check_pairs(op, name, tensors, first_name, first)
    return False


def _signatures(tensors: Sequence[Tensor]) -> list[tuple]:
    """What must agree between lists, compared at once."""
    return [(t.dtype, t.device, t.layout, t.shape, t.stride()) for t in tensors]


def _check_pairs(
    op: str, name: str, tensors: Sequence[Tensor], first_name: str, first: Sequence[Tensor]
) -> None:
    for i, (t, f) in enumerate(zip(tensors, first)):
        if t.layout != torch.strided:
            raise TypeError(f"{op}: {name}[{i}] is {t.layout}, expected a strided tensor")
        same = (t.dtype, t.device, t.shape) == (f.dtype, f.device, f.shape)
        if not (same and same_layout(t, f)):
            raise ValueError(
                f"{op}: {name}[{i}] is {_describe(t)}, expected {_describe(f)} as {first_name}[{i}]"
            )


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
) -> None:
    """See reference.perturb_."""
    direct = check_lists("perturb_", theta=theta, g_t=g_t)
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
    (_perturb_ if direct else _NAMESPACE.perturb_)(theta, g_t, partials, rho, adaptive)


@_define(
    "perturb_(Tensor(a!)[] theta, Tensor(b!)[] g_t, Tensor partials, float rho, bool adaptive)"
    " -> ()"
)
def _perturb_(theta, g_t, partials, rho, adaptive):
    dispatch.select(theta[0].device).perturb_(theta, g_t, partials, rho, adaptive)
    _mutated(theta, g_t)


def check_sgd_update(
    theta, saved, g_h, g_p, m, lr, momentum, *_, grad_scale=None, found_inf=None
) -> bool:
    """Refuse arguments that sgd_update_ would refuse; returns what check_lists does."""
    direct = check_lists("sgd_update_", theta=theta, g_p=g_p, saved=saved, g_h=g_h, m=m)
    if not g_p:
        raise ValueError("sgd_update_: g_p is empty, expected one gradient for every parameter")
    if (momentum != 0) != (len(m) > 0):
        raise ValueError(
            f"sgd_update_: m has {len(m)} tensors with momentum {momentum}, "
            "expected momentum buffers exactly when momentum is not 0"
        )
    for name, scalar in (("lr", lr), ("grad_scale", grad_scale), ("found_inf", found_inf)):
        if scalar is not None and scalar.numel() != 1:
            raise ValueError(
                f"sgd_update_: {name} has shape {tuple(scalar.shape)}, expected one element"
            )
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
) -> None:
    """See reference.sgd_update_."""
    direct = check_sgd_update(
        theta, saved, g_h, g_p, m, lr, momentum, grad_scale=grad_scale, found_inf=found_inf
    )
    (_sgd_update_ if direct else _NAMESPACE.sgd_update_)(
        theta, saved, g_h, g_p, m, lr, momentum, dampening, weight_decay, nesterov, maximize,
        grad_scale, found_inf,
    )  # fmt: skip


@_define(
    "sgd_update_(Tensor(a!)[] theta, Tensor[] saved, Tensor[] g_h, Tensor[] g_p,"
    " Tensor(b!)[] m, Tensor lr, float momentum, float dampening, float weight_decay,"
    " bool nesterov, bool maximize, Tensor? grad_scale, Tensor? found_inf) -> ()"
)
def _sgd_update_(theta, saved, g_h, g_p, m, *scalars):
    dispatch.select(theta[0].device).sgd_update_(theta, saved, g_h, g_p, m, *scalars)
    _mutated(theta, m)


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


for _name in ("perturb_", "sgd_update_", "merge_"):
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

    See reference.split_cross_entropy.
    """
    _check_cross_entropy(logits, targets, plain, sharp, class_weight, label_smoothing, batch_size)
    arguments = (
        logits, targets, plain, sharp, class_weight, label_smoothing, ignore_index, batch_size
    )  # fmt: skip
    if type(logits) is Tensor and _unobserved():
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
    fits = isinstance(batch_size, (int, float)) and 1 <= batch_size < math.inf
    if batch_size is not None and not fits:
        raise ValueError(f"{op}: batch_size is {batch_size!r}, expected a finite number >= 1")


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
        direct = _unobserved() and not torch.is_grad_enabled()
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

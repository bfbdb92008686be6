"""The compiled backend: the operations of `reference.py`, handed to csrc/ as raw pointers.

Here for tensors on the CPU, and what native_cuda.py shares.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch  # first, so that _C shares torch's OpenMP runtime
from torch import Tensor

from ..kernels.arithmetic import CHUNK, arithmetic_dtype

try:
    from . import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _load_error = str(error)
    warnings.warn(
        f"imbsam_fast runs in pure torch, much slower: its compiled module did not load ({error})",
        stacklevel=2,
    )

if _C is not None:  # from torch 2.10 on, _C reads tensors without a detour through Python
    _C.connect(torch.Tensor, torch.nn.Parameter)

# imbsam::DType
_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def reason_unavailable(device_type: str) -> str | None:
    """None where the compiled operations run on `device_type`, else why they do not."""
    if _C is None:
        return f"the compiled module imbsam_fast.ops._C did not load: {_load_error}"
    if device_type == "cuda":
        return _reason_no_cuda()
    if device_type != "cpu":
        return f"this build has no kernels for {device_type} devices"
    return None


def _reason_no_cuda() -> str | None:
    if not _C.has_cuda:
        return "imbsam_fast.ops._C was built without CUDA (no nvcc there, or IMBSAM_CUDA=OFF)"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return _C.cuda_reason_unavailable()


def isas() -> list[str]:
    """The CPU instruction sets of this build that run on this machine, best last."""
    return _C.isas()


def isa_in_use() -> str:
    """The instruction set that the CPU kernels use."""
    return _C.isa_in_use()


@contextmanager
def use_isa(name: str):
    """For tests: run the CPU kernels of one instruction set inside the block."""
    previous = _C.isa_in_use()
    _C.use_isa(name)
    try:
        yield
    finally:
        _C.use_isa(previous)


# What follows is None where _C cannot tell: subclasses of Tensor, torch older than 2.10.


def read_lists(lists: Sequence[Sequence[Tensor]]) -> list[Any] | None:
    """The lists with their addresses, where check_lists accepts them."""
    return None if _C is None else _C.read_lists(lists)


def pairs_match(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> bool:
    """Whether the tensors of each pair are alike, pairs with None apart; False if unsure."""
    return _C is not None and _C.pairs_match(a, b)


def take_gradients(params: list[Tensor]) -> list[Tensor | None] | None:
    """`p.grad` of each, where all of them are laid out as their parameters; it is None then."""
    return None if _C is None else _C.take_gradients(params)


def all_alone(tensors: Sequence[Tensor | None]) -> bool:
    """Whether each is referred to by this list alone, and alone on its memory; False if unsure."""
    return _C is not None and _C.all_alone(tensors)


def state_of(
    state: Any, params: list[Tensor], name: str, needed: Sequence[Tensor | None]
) -> list[Tensor | None] | None:
    """`state[p][name]` where it is and `needed` has a tensor, all laid out as the parameters."""
    return None if _C is None else _C.state_of(state, params, name, needed)


def partition(
    sizes: list[int], params: list[Tensor], lists: Sequence[Sequence[Tensor | None]]
) -> list[tuple[int, Sequence[int]]] | None:
    """What one launch takes of `params`, groups of so many: the group and the indices."""
    return None if _C is None else _C.partition(sizes, params, lists)


def occupancy(slots: Sequence[Tensor | None]) -> bool | None:
    """True where all entries are tensors, False where none is."""
    return None if _C is None else _C.occupancy(slots)


def _value(scalar: Tensor | None, default: float = 0.0) -> float:
    return default if scalar is None else scalar.item()


def _table(tensors: Any) -> tuple[int, Any]:
    """The dtype and the sizes, as the compiled operations take them."""
    if type(tensors) is _C.TensorList:
        return tensors.dtype_code, tensors
    return _DTYPE_CODES[tensors[0].dtype], [t.numel() for t in tensors]


def _chunks(tensors: Any) -> int:
    """The partial sums over these tensors."""
    if type(tensors) is _C.TensorList:
        return tensors.chunks
    return sum((t.numel() + CHUNK - 1) // CHUNK for t in tensors)


def squared_norm(g_t: Sequence[Tensor], theta: Sequence[Tensor] = ()) -> Tensor:
    """See reference.squared_norm."""
    partials = torch.empty(_chunks(g_t), dtype=torch.float64, device="cpu")
    _C.squared_norm(*_table(g_t), g_t, theta, partials.data_ptr(), torch.get_num_threads())
    return partials


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
    partials = partials.contiguous()
    _C.perturb_(
        *_table(theta), theta, g_t, master, held, partials.data_ptr(), len(partials), rho,
        adaptive, torch.get_num_threads(),
    )  # fmt: skip


def update_(
    op: str,
    theta: Sequence[Tensor],
    saved: Sequence[Tensor],
    g_h: Sequence[Tensor],
    g_p: Sequence[Tensor],
    state: Sequence[Sequence[Tensor]],
    step: Sequence[Tensor],
    lr: Tensor,
    settings: Sequence[float],
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    master: Sequence[Tensor],
) -> None:
    """See reference.update_."""
    _C.update_(
        op, *_table(theta), theta, saved, g_h, g_p, state, master,
        step, _DTYPE_CODES[step[0].dtype] if step else 0, lr.item(), settings, maximize,
        _value(grad_scale, default=1.0), _value(found_inf) != 0,
        torch.get_num_threads(),
    )  # fmt: skip


def _on_cpu() -> tuple[int, int, int]:
    """Threads, and no device and stream."""
    return torch.get_num_threads(), 0, 0


def _sums_on(device: torch.device) -> Callable[[int], Tensor]:
    """What makes partial sums."""
    return partial(torch.empty, dtype=torch.float64, device=device)


def _flag(finite: bool) -> Tensor:
    """What grad_check finds."""
    return torch.tensor([0.0 if finite else 1.0], dtype=torch.float32, device="cpu")


def perturb_all(device: torch.device, *arguments: Any) -> bool:
    """See optim.one_call.perturb."""
    *lists, pending = arguments
    return _C.perturb_all(*lists, _sums_on(device), pending, *_on_cpu())  # type: ignore[call-arg]


def read_update(*arguments: Any) -> Any:
    """See optim.one_call.update; None where Python has to look."""
    return _C.read_update(*arguments)


def grad_check_all(device: torch.device, phase: Any) -> tuple[Tensor, Tensor]:
    """`grad_check` of what a phase has read."""
    partials, finite = phase.grad_check(_sums_on(device), None, *_on_cpu())
    return partials, _flag(finite)


def update_all(
    device: torch.device, phase: Any, op: str, lr: Any, settings: Any, maximize: Any,
    grad_scale: Tensor | None, found_inf: Tensor | None, pending: Any,
) -> None:  # fmt: skip
    """The update of what a phase has read."""
    numbers = _value(grad_scale, default=1.0), _value(found_inf) != 0
    phase.update(op, lr, settings, maximize, *numbers, 0, 0, pending, *_on_cpu())


def merge_(
    theta: Sequence[Tensor],
    saved: Sequence[Tensor],
    g_h: Sequence[Tensor],
    g_p: Sequence[Tensor],
) -> None:
    """See reference.merge_."""
    _C.merge_(
        *_table(theta), theta, saved, g_h, g_p,
        torch.get_num_threads(),
    )  # fmt: skip


def grad_check(g_h: Sequence[Tensor], g_p: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See reference.grad_check."""
    partials = torch.empty(_chunks(g_p), dtype=torch.float64, device="cpu")
    finite = _C.grad_check(*_table(g_p), g_h, g_p, partials.data_ptr(), torch.get_num_threads())
    return partials, _flag(finite)


def _rows(logits: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Logits with unit stride along the classes, and how the kernels are told of them."""
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        logits = logits.contiguous()
    return logits, (_DTYPE_CODES[logits.dtype], *logits.shape, logits.stride(0))


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    """What kernels read in one piece; None stays None."""
    return [t if t is None else t.contiguous() for t in tensors]


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def split_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    plain: Tensor,
    sharp: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    batch_size: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference.split_cross_entropy."""
    logits, rows = _rows(logits)
    dtype = arithmetic_dtype(logits.dtype)
    head, tail, b = (torch.empty((), dtype=dtype, device="cpu") for _ in range(3))
    lse = torch.empty(len(logits), 2, dtype=dtype, device="cpu")
    targets, plain, sharp, class_weight = _contiguous(targets, plain, sharp, class_weight)
    _C.split_cross_entropy(
        *rows, _pointer(logits), _pointer(targets), _pointer(plain), _pointer(sharp),
        _pointer(class_weight), label_smoothing, ignore_index, batch_size,
        _pointer(head), _pointer(tail), _pointer(b), _pointer(lse), torch.get_num_threads(),
    )  # fmt: skip
    return head, tail, b, lse


def split_cross_entropy_backward(
    grad_head: Tensor | None,
    grad_tail: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    b: Tensor,
    plain: Tensor,
    sharp: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """See reference.split_cross_entropy_backward."""
    logits, rows = _rows(logits)
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device="cpu")
    targets, lse, plain, sharp, class_weight = _contiguous(targets, lse, plain, sharp, class_weight)
    _C.split_cross_entropy_backward(
        *rows, _value(grad_head), _value(grad_tail), _pointer(logits), _pointer(targets),
        _pointer(lse), b.item(), _pointer(plain), _pointer(sharp),
        _pointer(class_weight), label_smoothing, ignore_index, _pointer(grad_logits),
        torch.get_num_threads(),
    )  # fmt: skip
    return grad_logits


def split_soft_cross_entropy(
    logits: Tensor,
    q: Tensor,
    plain: Tensor,
    sharp: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    batch_size: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference.split_soft_cross_entropy."""
    (logits, rows), (q, q_rows) = _rows(logits), _rows(q)
    dtype = arithmetic_dtype(logits.dtype)
    head, tail, b = (torch.empty((), dtype=dtype, device="cpu") for _ in range(3))
    numbers = torch.empty(len(logits), 6, dtype=dtype, device="cpu")
    plain, sharp, class_weight = _contiguous(plain, sharp, class_weight)
    _C.split_soft_cross_entropy(
        *rows, _pointer(logits), _pointer(q), q_rows[-1], _pointer(plain), _pointer(sharp),
        _pointer(class_weight), label_smoothing, batch_size, _pointer(head), _pointer(tail),
        _pointer(b), _pointer(numbers), torch.get_num_threads(),
    )  # fmt: skip
    return head, tail, b, numbers


def split_soft_cross_entropy_backward(
    grad_head: Tensor | None,
    grad_tail: Tensor | None,
    logits: Tensor,
    q: Tensor,
    rows: Tensor,
    b: Tensor,
    plain: Tensor,
    sharp: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    """See reference.split_soft_cross_entropy_backward."""
    (logits, sizes), (q, q_rows) = _rows(logits), _rows(q)
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device="cpu")
    rows, plain, sharp, class_weight = _contiguous(rows, plain, sharp, class_weight)
    _C.split_soft_cross_entropy_backward(
        *sizes, _value(grad_head), _value(grad_tail), _pointer(logits), _pointer(q), q_rows[-1],
        _pointer(rows), b.item(), _pointer(plain), _pointer(sharp), _pointer(class_weight),
        label_smoothing, _pointer(grad_logits), torch.get_num_threads(),
    )  # fmt: skip
    return grad_logits

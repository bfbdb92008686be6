"""The compiled backend on NVIDIA GPUs: the operations of `reference.py`, handed to csrc/cuda/.

Everything is put on the current stream of the tensors' device and nothing waits for it, so that
operations can be captured in a CUDA graph, after one run that loads the kernels. What is allocated
here is used on that stream alone: the caching allocator needs no `record_stream`. A number that
lies in a CPU tensor (a learning rate) is read when the operation is called, and so becomes a
constant of a captured graph; one on the device is read when the kernel runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.arithmetic import advance_, arithmetic_dtype, check_not_captured, steps_on
from .native import _C, _chunks, _contiguous, _pointer, _rows, _sums_on, _table, _value


def _on(device: torch.device) -> tuple[int, int]:
    """The device and its current stream, as the compiled operations take them."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def squared_norm(g_t: Sequence[Tensor], theta: Sequence[Tensor] = ()) -> Tensor:
    """See reference.squared_norm."""
    device = g_t[0].device
    partials = torch.empty(_chunks(g_t), dtype=torch.float64, device=device)
    _C.cuda_squared_norm(*_table(g_t), g_t, theta, _pointer(partials), *_on(device))
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
    _C.cuda_perturb_(
        *_table(theta), theta, g_t, master, held, _pointer(partials), len(partials), rho, adaptive,
        *_on(theta[0].device),
    )  # fmt: skip


def _scalar(
    scalar: Tensor | None, device: torch.device, dtype: torch.dtype, default: float = 0.0
) -> tuple[float, Tensor | None]:
    """The value of a scalar on the CPU, or the scalar in the arithmetic dtype on the device."""
    if scalar is None or scalar.device.type == "cpu":
        return _value(scalar, default), None
    return default, scalar.to(device, dtype)


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
    device = theta[0].device
    dtype = arithmetic_dtype(theta[0].dtype)
    lr_value, lr_there = _scalar(lr, device, dtype)
    scale_value, scale_there = _scalar(grad_scale, device, dtype, default=1.0)
    inf_value, inf_there = _scalar(found_inf, device, dtype)
    check_not_captured(op, device, step)
    counts = _counts(step, device) if _C.needs_counts(op) else []
    _C.cuda_update_(
        op, *_table(theta), theta, saved, g_h, g_p, state, master, counts,
        lr_value, settings, maximize, scale_value, inf_value != 0,
        _pointer(lr_there), _pointer(scale_there), _pointer(inf_there), *_on(device),
    )  # fmt: skip
    advance_(step, found_inf)


def perturb_all(device: torch.device, *arguments: Any) -> bool:
    """See optim.one_call.perturb."""
    *lists, pending = arguments
    on_cuda = 0, *_on(device)
    return _C.perturb_all(*lists, _sums_on(device), pending, *on_cuda)  # type: ignore[call-arg]


def read_update(
    groups: Any, params: Any, lists: Any, state: Any, names: Any, wanted: Any, step: bool,
    *rest: Any,
) -> Any:  # fmt: skip
    """See optim.one_call.update; with counts of steps, which are to be on the device, not."""
    return (
        None if step else _C.read_update(groups, params, lists, state, names, wanted, step, *rest)
    )


def grad_check_all(device: torch.device, phase: Any) -> tuple[Tensor, Tensor]:
    """`grad_check` of what a phase has read."""
    found_inf = torch.zeros(1, dtype=torch.float32, device=device)
    partials, _ = phase.grad_check(_sums_on(device), found_inf, 0, *_on(device))
    return partials, found_inf


def update_all(
    device: torch.device, phase: Any, op: str, lr: Any, settings: Any, maximize: Any,
    grad_scale: Tensor | None, found_inf: Tensor | None, pending: Any,
) -> None:  # fmt: skip
    """The update of what a phase has read."""
    dtype = torch.float64 if phase.is_double else torch.float32
    scale_value, scale_there = _scalar(grad_scale, device, dtype, default=1.0)
    inf_value, inf_there = _scalar(found_inf, device, dtype)
    phase.update(
        op, lr, settings, maximize, scale_value, inf_value != 0,
        _pointer(scale_there), _pointer(inf_there), pending, 0, *_on(device),
    )  # fmt: skip


def _counts(step: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """The steps taken, one float32 each on the device; copies of those that lie elsewhere."""
    if all((s.device, s.dtype) == (device, torch.float32) for s in step):
        return step
    return steps_on(device, step).unbind()


def merge_(
    theta: Sequence[Tensor],
    saved: Sequence[Tensor],
    g_h: Sequence[Tensor],
    g_p: Sequence[Tensor],
) -> None:
    """See reference.merge_."""
    _C.cuda_merge_(*_table(theta), theta, saved, g_h, g_p, *_on(theta[0].device))


def grad_check(g_h: Sequence[Tensor], g_p: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See reference.grad_check."""
    device = g_p[0].device
    partials = torch.empty(_chunks(g_p), dtype=torch.float64, device=device)
    found_inf = torch.zeros(1, dtype=torch.float32, device=device)
    _C.cuda_grad_check(
        *_table(g_p), g_h, g_p, _pointer(partials), _pointer(found_inf), *_on(device)
    )
    return partials, found_inf


def _weight_sum(class_weight: Tensor | None, label_smoothing: float) -> Tensor | None:
    """What smoothed labels need of the class weights, float64; None where nothing is needed."""
    if class_weight is None or not label_smoothing:
        return None
    return class_weight.sum(dtype=torch.float64)


def _gradients(logits: Tensor, *gradients: Tensor | None) -> list[Tensor | None]:
    """Of the losses, as the kernels read them."""
    on = logits.device, arithmetic_dtype(logits.dtype)
    return [gradient if gradient is None else gradient.to(*on) for gradient in gradients]


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
    dtype, device = arithmetic_dtype(logits.dtype), logits.device
    head, tail, b = (torch.empty((), dtype=dtype, device=device) for _ in range(3))
    lse = torch.empty(len(logits), 2, dtype=dtype, device=device)
    losses = torch.empty(len(logits), dtype=torch.float64, device=device)
    targets, plain, sharp, class_weight = _contiguous(targets, plain, sharp, class_weight)
    _C.cuda_split_cross_entropy(
        *rows, _pointer(logits), _pointer(targets), _pointer(plain), _pointer(sharp),
        _pointer(class_weight), label_smoothing, ignore_index, batch_size, _pointer(losses),
        _pointer(head), _pointer(tail), _pointer(b), _pointer(lse), *_on(device),
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
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    targets, lse, plain, sharp, class_weight = _contiguous(targets, lse, plain, sharp, class_weight)
    weight_sum = _weight_sum(class_weight, label_smoothing)
    grad_head, grad_tail = _gradients(logits, grad_head, grad_tail)
    _C.cuda_split_cross_entropy_backward(
        *rows, _pointer(grad_head), _pointer(grad_tail), _pointer(logits), _pointer(targets),
        _pointer(lse), _pointer(b), _pointer(plain), _pointer(sharp), _pointer(class_weight),
        _pointer(weight_sum), label_smoothing, ignore_index, _pointer(grad_logits),
        *_on(logits.device),
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
    dtype, device = arithmetic_dtype(logits.dtype), logits.device
    head, tail, b = (torch.empty((), dtype=dtype, device=device) for _ in range(3))
    numbers = torch.empty(len(logits), 6, dtype=dtype, device=device)
    losses = torch.empty(len(logits), 3, dtype=torch.float64, device=device)
    plain, sharp, class_weight = _contiguous(plain, sharp, class_weight)
    _C.cuda_split_soft_cross_entropy(
        *rows, _pointer(logits), _pointer(q), q_rows[-1], _pointer(plain), _pointer(sharp),
        _pointer(class_weight), label_smoothing, batch_size, _pointer(losses), _pointer(head),
        _pointer(tail), _pointer(b), _pointer(numbers), *_on(device),
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
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows, plain, sharp, class_weight = _contiguous(rows, plain, sharp, class_weight)
    weight_sum = _weight_sum(class_weight, label_smoothing)
    grad_head, grad_tail = _gradients(logits, grad_head, grad_tail)
    _C.cuda_split_soft_cross_entropy_backward(
        *sizes, _pointer(grad_head), _pointer(grad_tail), _pointer(logits), _pointer(q),
        q_rows[-1], _pointer(rows), _pointer(b), _pointer(plain), _pointer(sharp),
        _pointer(class_weight), _pointer(weight_sum), label_smoothing, _pointer(grad_logits),
        *_on(logits.device),
    )  # fmt: skip
    return grad_logits

"""What every backend agrees on: chunks of partial sums, the dtype of arithmetic, counts of steps.

Plain torch, at the bottom of all imports: the Triton kernels need it and `ops` builds on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Elements that share one partial sum of squared_norm and grad_check, in every backend.
CHUNK = 32768


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which data of `dtype` is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_not_captured(op: str, device: torch.device, step: Sequence[Tensor]) -> None:
    """Refuse counts of steps that lie elsewhere while a CUDA graph is captured on the device."""
    elsewhere = len(step) > 0 and step[0].device != device
    if elsewhere and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{op}: step is on {step[0].device} while a CUDA graph is captured, which "
            f"would keep its value, expected {device}: a base with capturable=True"
        )


def steps_on(device: torch.device, step: Sequence[Tensor]) -> Tensor:
    """The steps taken, float32 (parameters,) on the device, for kernels that run there."""
    stacked = torch.stack([s.reshape(()) for s in step])
    return stacked.to(device, torch.float32, non_blocking=True)


def advance_(step: Sequence[Tensor], found_inf: Tensor | None) -> None:
    """step <- step + 1, or where found_inf is not 0 not; nothing for []."""
    if not step:
        return
    if found_inf is None:
        torch._foreach_add_(list(step), 1)
    else:
        taken = (found_inf == 0).to(step[0]).squeeze()
        torch._foreach_add_(list(step), [taken] * len(step))

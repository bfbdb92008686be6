"""When a result counts as right: the tolerances of every dtype, and bit equality."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# How far plain torch may be from the float64 truth, relative to the numbers that were rounded.
TOLERANCE = {
    torch.float64: 4e-15,
    torch.float32: 2e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 1e-3,
}

# How far a kernel may be from plain torch's error: one rounding of the dtype. The truth for
# float64 data is itself rounded as often.
ROUNDING = {d: torch.finfo(d).eps for d in TOLERANCE} | {torch.float64: 4e-15}

# A sum in float64, in whatever order, relative to the same sum in another order.
SUM_TOLERANCE = 1e-13

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def flattened(list_: Sequence[Tensor]) -> Tensor:
    """All elements of a list in one CPU tensor."""
    return torch.cat([t.detach().reshape(-1) for t in list_]).cpu() if list_ else torch.zeros(0)


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """-0.0 differs from 0.0 and NaN equals itself."""
    assert [(t.dtype, t.shape) for t in actual] == [(t.dtype, t.shape) for t in expected]
    a, e = (flattened(list_) for list_ in (actual, expected))
    differ = a.view(_BITS[a.element_size()]) != e.view(_BITS[e.element_size()])
    assert not differ.any(), f"{int(differ.sum())} of {len(a)} elements differ"


def assert_equal_but_for_roots(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal up to the last bits: on some CPUs torch's square root is not rounded to nearest."""
    for a, e in zip(actual, expected, strict=True):
        tolerance = 4 * torch.finfo(e.dtype).eps
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def assert_as_accurate(actual: Tensor, plain: Tensor, truth: Tensor, scale: Tensor | float) -> None:
    """The error against `truth` is at most that of plain torch in the same dtype, plus ROUNDING.

    Plain torch must itself be within TOLERANCE. `scale` is the size of the numbers that were
    rounded, one number or broadcastable to `truth`.
    """
    assert actual.dtype == plain.dtype and actual.shape == plain.shape == truth.shape
    truth = truth.detach().double().cpu()
    scale = torch.as_tensor(scale, dtype=torch.float64).cpu()
    error, plain_error = ((x.detach().double().cpu() - truth).abs() for x in (actual, plain))
    excess = plain_error - TOLERANCE[actual.dtype] * scale
    assert (excess <= 0).all(), f"plain torch is off by {excess.max():.3g} more than its tolerance"
    excess = error - plain_error - ROUNDING[actual.dtype] * scale
    assert (excess <= 0).all(), f"error exceeds plain torch's by {excess.max():.3g} and a rounding"


def assert_lists_as_accurate(
    actual: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor]
) -> None:
    """assert_as_accurate for all elements, relative to the largest of them."""
    assert [t.shape for t in actual] == [t.shape for t in plain] == [t.shape for t in truth]
    flat = [flattened(list_) for list_ in (actual, plain, truth)]
    assert_as_accurate(*flat, scale=float(flat[2].abs().max()) if len(flat[2]) else 0.0)


def assert_sums(actual: Tensor, expected: Tensor, tolerance: float = SUM_TOLERANCE) -> None:
    """Partial sums: float64, each equal to the expected one but for the order of additions."""
    assert actual.dtype == torch.float64 and actual.shape == expected.shape
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=tolerance, atol=0)

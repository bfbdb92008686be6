"""What the CUDA kernels of the losses compute, without a GPU: as in test_cuda_on_host.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import assert_as_accurate, assert_same_bits
from cuda_on_host import build
from samples import DTYPES, class_weights, distributions, logits_and_targets
from test_cuda_on_host import host, kernels, on_host, sectors_used
from test_soft_targets import OPTIONS as SOFT_OPTIONS
from test_soft_targets import check as check_soft
from test_soft_targets import formula as soft_formula
from test_split_cross_entropy import LAYOUTS, OPTIONS, PARTS, check

from imbsam_fast.ops import native_cuda, reference
from imbsam_fast.ops.reference import arithmetic_dtype

__all__ = ["host", "kernels", "on_host"]  # fixtures, for every test here

pytestmark = pytest.mark.slow  # compiles the CUDA sources

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# ---------------------------------------------------------------- labels


@each_dtype
@pytest.mark.parametrize(
    ("rows", "classes"),
    [(0, 5), (1, 1), (3, 7), (5, 64), (5, 1003), (3, 8142), (1, 33_000), (8195, 3)],
)
def test_cross_entropy(rows: int, classes: int, dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(rows, classes, dtype)
    plain, sharp, _ = class_weights(classes, dtype)
    check(logits, targets, plain, sharp, batch_size=16.0)  # float16 could not hold 1 / 8195


@each_dtype
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "class_weight"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_cross_entropy_options(
    part: str, weighted: bool, options: dict, dtype: torch.dtype
) -> None:
    logits, targets = logits_and_targets(7, 301, dtype)
    targets[::4] = 3
    plain, sharp, class_weight = class_weights(301, dtype)
    check(logits, targets, plain, sharp, class_weight if weighted else None, part=part, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cross_entropy_of_strided_logits(layout: Any, dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(5, 37, dtype)
    check(layout(logits), targets, *class_weights(37, dtype), label_smoothing=0.1)


@each_dtype
@pytest.mark.parametrize("classes", [1, 7, 33, 1003, 5000])
def test_the_maximum_of_a_row_is_exact(classes: int, dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(9, classes, dtype)
    for i, row in enumerate(logits):
        row[i * 997 % classes] = 100 + i  # of another warp in each row
    plain, sharp, _ = class_weights(classes, dtype)
    arguments = logits, targets, plain, sharp, None, 0.0, -100, None
    lse = native_cuda.split_cross_entropy(*arguments)[3]
    assert_same_bits([lse[:, 0]], [logits.amax(dim=1).to(lse.dtype)])


@each_dtype
@pytest.mark.parametrize("classes", [9, 24, 40, 301, 1003])
def test_gradients_aligned_otherwise_than_logits(classes: int, dtype: torch.dtype) -> None:
    """Rows of a padded vocabulary, from every alignment."""
    padded, targets = logits_and_targets(9, classes + 13, dtype)
    logits = padded[:, 3 : 3 + classes]
    check(logits, targets % classes, *class_weights(classes, dtype), label_smoothing=0.1)


@each_dtype
@pytest.mark.parametrize("ascending", [True, False])
def test_the_maximum_of_a_row_rises_and_falls(ascending: bool, dtype: torch.dtype) -> None:
    """The running maximum changes with every pack, or never after the first."""
    logits = torch.linspace(-40, 40, 3 * 5000).reshape(3, 5000).to(dtype)
    logits = logits if ascending else logits.flip(1)
    targets = torch.tensor([0, 2500, 4999])
    plain, sharp, class_weight = class_weights(5000, dtype)
    check(logits, targets, plain, sharp, class_weight, label_smoothing=0.1)


@each_dtype
def test_masked_classes_and_not_a_number(dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(6, 700, dtype)
    plain = sharp = torch.ones(700, dtype=arithmetic_dtype(dtype))
    logits[:, :600] = -float("inf")  # whole packs of some threads
    targets = 600 + targets % 100
    check(logits, targets, plain, sharp)
    logits[1, 5], logits[2, 650] = float("nan"), float("inf")
    logits[3] = -float("inf")
    _, _, b, lse = native_cuda.split_cross_entropy(
        logits, targets, plain, sharp, None, 0.0, -100, None
    )
    gradient = native_cuda.split_cross_entropy_backward(
        torch.ones_like(b), None, logits, targets, lse, b, plain, sharp, None, 0.0, -100
    )
    assert gradient.isnan().any(dim=1).tolist() == [False, True, True, True, False, False]


@each_dtype
def test_rows_without_weight_are_not_read(dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(8, 33, dtype)
    plain, sharp, _ = class_weights(33, dtype)
    targets[:4] = torch.tensor([-100, 2, 5, 8])  # ignored, or of plain weight 0
    arguments = targets, plain, sharp, None, 0.0, -100
    _, _, b, lse = native_cuda.split_cross_entropy(logits, *arguments, None)
    rest = lse, b, plain, sharp, None, 0.0, -100
    logits[:4] = float("nan")
    gradient = native_cuda.split_cross_entropy_backward(
        torch.ones_like(b), None, logits, targets, *rest
    )
    assert_same_bits([gradient[:4]], [torch.zeros(4, 33, dtype=dtype)])
    assert gradient[4:].isfinite().all()


# ---------------------------------------------------------------- label distributions


@each_dtype
@pytest.mark.parametrize(
    ("rows", "classes"),
    [(0, 5), (1, 1), (3, 7), (5, 64), (5, 1003), (2, 8142), (1, 33_000)],
)
def test_soft_cross_entropy(rows: int, classes: int, dtype: torch.dtype) -> None:
    logits, q = distributions(rows, classes, dtype)
    plain, sharp, _ = class_weights(classes, dtype)
    check_soft(logits, q, plain, sharp, batch_size=16.0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)  # in which losses are added up
def test_soft_losses_of_more_rows_than_a_block_adds_up(dtype: torch.dtype) -> None:
    logits, q = distributions(8195, 3, dtype)
    arguments = logits, q, *class_weights(3, dtype)[:2], None, 0.0, None
    found = native_cuda.split_soft_cross_entropy(*arguments)
    plain = reference.split_soft_cross_entropy(*arguments)
    truth = soft_formula(*(x.double() for x in arguments[:4]))
    for a, p, t in zip(found[:2], plain[:2], truth):
        assert_as_accurate(a, p, t, scale=t.abs())
    assert found[2] == plain[2] == (q != 0).any(1).sum() < 8195


@each_dtype
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "class_weight"])
@pytest.mark.parametrize("options", SOFT_OPTIONS.values(), ids=list(SOFT_OPTIONS))
def test_soft_cross_entropy_options(
    part: str, weighted: bool, options: dict, dtype: torch.dtype
) -> None:
    logits, q = distributions(7, 301, dtype)
    plain, sharp, class_weight = class_weights(301, dtype)
    check_soft(logits, q, plain, sharp, class_weight if weighted else None, part=part, **options)


@each_dtype
@pytest.mark.parametrize("classes", [9, 24, 301])
def test_distributions_aligned_otherwise_than_logits(classes: int, dtype: torch.dtype) -> None:
    logits, q = distributions(9, classes + 13, dtype)
    weights = class_weights(classes, dtype)
    check_soft(logits[:, 3 : 3 + classes], q[:, 1 : 1 + classes], *weights, label_smoothing=0.1)
    wide, other = distributions(9, classes, dtype)
    check_soft(wide, q[:, 3 : 3 + classes], *weights)
    check_soft(logits[:, 1 : 1 + classes], other, *weights)


@pytest.mark.parametrize("which", ["logits", "q"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_soft_cross_entropy_of_strided_rows(layout: Any, which: str) -> None:
    logits, q = distributions(5, 37, torch.float32)
    if which == "logits":
        logits = layout(logits)
    else:
        q = layout(q)
    check_soft(logits, q, *class_weights(37, torch.float32), label_smoothing=0.1)


@each_dtype
def test_classes_that_are_masked_where_q_is_0(dtype: torch.dtype) -> None:
    logits, q = distributions(6, 700, dtype)
    q[:, :600] = 0
    logits[:, :600] = -float("inf")  # whole packs of some threads
    plain, sharp, _ = class_weights(700, dtype)
    check_soft(logits, q, plain, sharp)
    plain[650:] = sharp[650:] = 0  # a class without weight counts nothing either
    logits[:, 660:] = -float("inf")
    found = native_cuda.split_soft_cross_entropy(logits, q, plain, sharp, None, 0.0, None)
    assert all(value.isfinite().all() for value in found)


@each_dtype
def test_soft_rows_without_weight_are_not_read(dtype: torch.dtype) -> None:
    logits, q = distributions(8, 33, dtype)
    plain, sharp, _ = class_weights(33, dtype)
    q[:4] = 0
    q[1, 2] = q[2, 5] = q[3, 8] = 1  # of plain weight 0
    _, _, b, rows = native_cuda.split_soft_cross_entropy(logits, q, plain, sharp, None, 0.0, None)
    logits[:4] = q[:4] = float("nan")
    gradient = native_cuda.split_soft_cross_entropy_backward(
        torch.ones_like(b), None, logits, q, rows, b, plain, sharp, None, 0.0
    )
    assert_same_bits([gradient[:4]], [torch.zeros(4, 33, dtype=dtype)])
    assert gradient[4:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_elements_beside_distributions_are_accessed_coalesced(
    on_host: build.Host, dtype: torch.dtype
) -> None:
    if on_host.is_source:
        pytest.skip("sources do not tell their accesses")
    logits, q = distributions(3, 301, dtype)
    q[:] = 1 / 301
    weights = class_weights(301, dtype)
    _, _, b, rows = native_cuda.split_soft_cross_entropy(logits, q, *weights, 0.1, None)
    on_host.noted(True)
    native_cuda.split_soft_cross_entropy_backward(
        torch.ones_like(b), torch.ones_like(b), logits, q, rows, b, *weights, 0.1
    )
    assert sectors_used(on_host.noted(False)) > 0.6

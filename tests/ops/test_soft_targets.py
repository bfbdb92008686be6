"""The loss operation for label distributions, on every backend, against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import TOLERANCE, assert_as_accurate, assert_same_bits
from conftest import INTERPRETED, Backend
from samples import DTYPES, class_weights, distributions, logits_and_targets
from test_split_cross_entropy import LAYOUTS, PARTS, losses_and_gradient
from torch import Tensor

from imbsam_fast import ops
from imbsam_fast.ops.dispatch import use_backend
from imbsam_fast.ops.reference import arithmetic_dtype

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

SIZES = [(0, 10), (1, 1), (5, 2), (5, 103), (64, 10), (64, 1003), (2, 8142)]

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing 1": {"label_smoothing": 1.0},
    "batch_size": {"label_smoothing": 0.2, "batch_size": 2.5},
}


def formula(
    logits: Tensor,
    q: Tensor,
    plain: Tensor,
    sharp: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    batch_size: float | None = None,
) -> tuple[Tensor, Tensor]:
    """In float64: the expected loss of a label drawn from q, split by that label."""
    w = torch.ones_like(plain) if class_weight is None else class_weight
    log_p = logits.log_softmax(1)
    own = log_p.masked_fill(q == 0, 0)  # also where its logit is -inf
    losses = -(1 - label_smoothing) * w * own
    if label_smoothing:
        losses = losses - label_smoothing / len(w) * (w * log_p).sum(1, keepdim=True)
    b = max(int((q != 0).any(1).sum()), 1) if batch_size is None else batch_size
    head, tail = ((q * weights * losses).sum() / b for weights in (plain, sharp))
    return head, tail


def check(logits: Tensor, q: Tensor, *weights: Any, part: str = "both", **options: Any) -> None:
    """Losses and gradient of the backend in use are as accurate as the reference's."""
    found = [
        losses_and_gradient(logits, part, ops.split_soft_cross_entropy, q, *weights, **options)
    ]
    with use_backend("reference"):
        found += [
            losses_and_gradient(logits, part, ops.split_soft_cross_entropy, q, *weights, **options)
        ]
    on_cpu = [w.double().cpu() if torch.is_tensor(w) else w for w in weights]
    truth = losses_and_gradient(
        logits.detach().double().cpu(), part, formula, q.double().cpu(), *on_cpu, **options
    )
    assert found[0][0].dtype == found[0][1].dtype == arithmetic_dtype(logits.dtype)
    assert found[0][2].dtype == logits.dtype
    for a, p, t in zip(found[0][:2], found[1][:2], truth[:2]):
        assert_as_accurate(a, p, t, scale=t.abs())
    scale = row_sizes(q.double().cpu(), *on_cpu, part=part, **options)
    assert_as_accurate(found[0][2], found[1][2], truth[2], scale)


def row_sizes(
    q: Tensor,
    plain: Tensor,
    sharp: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    batch_size: float | None = None,
    part: str = "both",
) -> Tensor:
    """(N, 1): the size of the terms that are rounded in a row's gradient."""
    w = torch.ones_like(plain) if class_weight is None else class_weight
    c = PARTS[part][0] * plain + PARTS[part][1] * sharp
    b = max(int((q != 0).any(1).sum()), 1) if batch_size is None else batch_size
    hard, smooth = (1 - label_smoothing) * (q @ (c * w)), label_smoothing * w.mean() * (q @ c)
    return ((hard + smooth) / b).unsqueeze(1)


@each_dtype
@pytest.mark.parametrize(("rows", "classes"), SIZES)
def test_sizes(backend: Backend, rows: int, classes: int, dtype: torch.dtype) -> None:
    logits, q = distributions(rows, classes, dtype, backend.device)
    check(logits, q, *class_weights(classes, dtype, backend.device)[:2])


@each_dtype
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "class_weight"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_options(
    backend: Backend, part: str, weighted: bool, options: dict, dtype: torch.dtype
) -> None:
    logits, q = distributions(7, 37, dtype, backend.device)
    plain, sharp, class_weight = class_weights(37, dtype, backend.device)
    check(logits, q, plain, sharp, class_weight if weighted else None, part=part, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_hot_rows_are_labels(backend: Backend, smoothing: float, dtype: torch.dtype) -> None:
    """Ignored ones are rows of zeros, in b too."""
    logits, targets = logits_and_targets(20, 37, dtype, backend.device)
    targets[::6] = -100
    q = F.one_hot(targets.clamp(min=0), 37).to(logits.dtype) * (targets != -100).unsqueeze(1)
    weights = class_weights(37, dtype, backend.device)
    hard = losses_and_gradient(
        logits, "both", ops.split_cross_entropy, targets, *weights, label_smoothing=smoothing
    )
    soft = losses_and_gradient(
        logits, "both", ops.split_soft_cross_entropy, q, *weights, label_smoothing=smoothing
    )
    for a, b in zip(soft, hard):
        torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_same_bits([soft[2][::6]], [torch.zeros_like(soft[2][::6])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_head_alone_is_cross_entropy(
    backend: Backend, smoothing: float, dtype: torch.dtype
) -> None:
    logits, q = distributions(64, 10, dtype, backend.device)
    q[(q == 0).all(1), 0] = 1  # torch counts rows of zeros
    ones = logits.new_ones(10)
    head, tail, gradient = losses_and_gradient(
        logits, "head", ops.split_soft_cross_entropy, q, ones, 0 * ones, label_smoothing=smoothing
    )
    z = logits.clone().requires_grad_()
    expected = F.cross_entropy(z, q, label_smoothing=smoothing)
    expected.backward()
    torch.testing.assert_close(head, expected.detach(), rtol=2 * TOLERANCE[dtype], atol=0)
    torch.testing.assert_close(gradient, z.grad, rtol=0, atol=TOLERANCE[dtype])
    assert tail.item() == 0.0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["logits", "q"])
def test_strides(backend: Backend, which: str, layout: Any) -> None:
    logits, q = distributions(5, 37, torch.float32, backend.device)
    given = {"logits": logits, "q": q}
    given[which] = layout(given[which])
    assert not given[which].is_contiguous()
    weights = class_weights(37, torch.float32, backend.device)
    check(given["logits"], given["q"], *weights, label_smoothing=0.1)


@each_dtype
@pytest.mark.parametrize("part", PARTS)
def test_masked_classes(backend: Backend, part: str, dtype: torch.dtype) -> None:
    """A logit of -inf where q is 0: torch's cross_entropy makes that not a number."""
    logits, q = distributions(9, 37, dtype, backend.device)
    masked = q == 0
    masked[masked.all(1)] = False
    logits[masked] = -float("inf")
    plain, sharp, _ = class_weights(37, dtype, backend.device)
    check(logits, q, plain, sharp, part=part)


@each_dtype
@pytest.mark.parametrize("part", PARTS)
def test_rows_without_weight_get_zeros(backend: Backend, part: str, dtype: torch.dtype) -> None:
    logits, q = distributions(12, 9, dtype, backend.device)
    plain, sharp, _ = class_weights(9, dtype, backend.device)
    weight = PARTS[part][0] * plain + PARTS[part][1] * sharp
    q[:3] = F.one_hot(torch.tensor([2, 2, 2]), 9).to(q) if part != "tail" else 0
    q[3:6] = 0
    without = (q * weight).sum(1) == 0
    assert without.any() and not without.all()
    logits[without] = float("nan")
    gradient = losses_and_gradient(logits, part, ops.split_soft_cross_entropy, q, plain, sharp)[2]
    assert_same_bits([gradient[without]], [torch.zeros_like(gradient[without])])
    assert gradient[~without].isfinite().all()


@pytest.mark.quick  # on every backend
def test_parts_that_cancel_are_not_taken_for_none(backend: Backend) -> None:
    """Half head, half tail, the one's gradient the other's opposite."""
    logits = torch.tensor([[0.0, 1.0]], device=backend.device, requires_grad=True)
    q = torch.tensor([[0.5, 0.5]], device=backend.device)
    plain, sharp = torch.eye(2, device=backend.device)
    head, tail = ops.split_soft_cross_entropy(logits, q, plain, sharp)
    (gradient,) = torch.autograd.grad(head - tail, logits)
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[-0.5, 0.5]]))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_gradcheck(backend: Backend, options: dict[str, Any]) -> None:
    logits, q = distributions(4, 5, torch.float64, backend.device)
    weights = class_weights(5, torch.float64, backend.device)
    assert torch.autograd.gradcheck(
        lambda z: ops.split_soft_cross_entropy(z, q, *weights, **options),
        logits.requires_grad_(),
        fast_mode=backend == INTERPRETED,  # a product with a random vector, not every column
    )


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(set_threads: Any, threads: int) -> None:
    logits, q = distributions(40, 2003, torch.float32)
    weights = class_weights(2003, torch.float32)
    outputs = []
    for number in (1, threads):
        set_threads(number)
        outputs.append(
            losses_and_gradient(logits, "both", ops.split_soft_cross_entropy, q, *weights)
        )
    assert_same_bits(*outputs)


def bad(name: str | None) -> dict[str, Any]:
    """Valid arguments but for the one that `name` says, before a colon."""
    logits, q = distributions(6, 10, torch.float32)
    plain, sharp, class_weight = class_weights(10, torch.float32)
    arguments = {"logits": logits, "q": q, "plain": plain, "sharp": sharp}
    arguments |= {"class_weight": class_weight}
    changes: dict[str, Any] = {
        "logits: 3-D": logits[None],
        "logits: int64": logits.long(),
        "q: int64": q.long(),
        "q: float64": q.double(),
        "q: half": q.half(),
        "q: too few": q[:-1],
        "q: 1-D": q[:, 0],
        "q: another device": q.to("meta"),
        "plain: float64": plain.double(),
        "sharp: one": sharp[:1],
        "class_weight: 2-D": class_weight[None],
        "batch_size: 0": 0.0,
        "label_smoothing: 2": 2.0,
    }
    if name is None:
        return changes
    return arguments | {name.partition(":")[0]: changes[name]}


@pytest.mark.parametrize("what", bad(None))
def test_refusals_name_the_argument(what: str) -> None:
    with pytest.raises(ValueError, match=f"^split_soft_cross_entropy: {what.partition(':')[0]} "):
        ops.split_soft_cross_entropy(**bad(what))

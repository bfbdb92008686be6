"""The loss operation and its gradient, on every backend, against the formula in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import TOLERANCE, assert_as_accurate, assert_same_bits
from conftest import INTERPRETED, Backend
from samples import DTYPES, class_weights, distributions, logits_and_targets
from torch import Tensor

from imbsam_fast import ops
from imbsam_fast.ops.dispatch import use_backend
from imbsam_fast.ops.reference import arithmetic_dtype

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Both losses, with what makes their logits and targets: what holds for each.
LOSSES: dict[str, tuple[Any, Any]] = {
    "labels": (ops.split_cross_entropy, logits_and_targets),
    "distributions": (ops.split_soft_cross_entropy, distributions),
}
each_loss = pytest.mark.parametrize(("loss", "batch"), LOSSES.values(), ids=list(LOSSES))

SIZES = [(rows, classes) for classes in (1, 2, 10, 100, 1003) for rows in (0, 1, 5, 64)]
SIZES += [(0, 8142), (1, 8142), (5, 8142)]


def formula(
    logits: Tensor,
    targets: Tensor,
    plain: Tensor,
    sharp: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    batch_size: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The head and the tail loss in float64, row by row."""
    num_classes = logits.shape[1]
    w = torch.ones_like(plain) if class_weight is None else class_weight
    head = tail = logits.new_zeros(())
    counted = [i for i, y in enumerate(targets.tolist()) if y != ignore_index]
    for i in counted:
        y = targets[i]
        log_p = logits[i].log_softmax(0)
        loss = -(1 - label_smoothing) * w[y] * log_p[y]
        if label_smoothing:
            loss = loss - label_smoothing / num_classes * (w * log_p).sum()
        head = head + plain[y] * loss
        tail = tail + sharp[y] * loss
    b = max(len(counted), 1) if batch_size is None else batch_size
    return head / b, tail / b


PARTS = {"head": (1.0, 0.0), "tail": (0.0, 1.0), "both": (0.5, 3.0)}


def losses_and_gradient(
    logits: Tensor, part: str, loss: Any, *args: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """head, tail and the gradient of the part; `logits` keeps its memory layout."""
    logits = logits.detach().requires_grad_()
    head, tail = loss(logits, *args, **options)
    total = sum(f * x for f, x in zip(PARTS[part], (head, tail)) if f and x.requires_grad)
    gradient = torch.zeros_like(logits)
    if torch.is_tensor(total):
        (gradient,) = torch.autograd.grad(total, logits)
    return head.detach(), tail.detach(), gradient


def check(
    logits: Tensor, targets: Tensor, *weights: Any, part: str = "both", **options: Any
) -> None:
    """Losses and gradient of the backend in use are as accurate as the reference's."""
    actual = losses_and_gradient(
        logits, part, ops.split_cross_entropy, targets, *weights, **options
    )
    with use_backend("reference"):
        plain = losses_and_gradient(
            logits, part, ops.split_cross_entropy, targets, *weights, **options
        )
    on_cpu = [w.double().cpu() if torch.is_tensor(w) else w for w in weights]
    truth = losses_and_gradient(
        logits.detach().double().cpu(), part, formula, targets.cpu(), *on_cpu, **options
    )
    assert actual[0].dtype == actual[1].dtype == arithmetic_dtype(logits.dtype)
    assert actual[2].dtype == logits.dtype
    for a, p, t in zip(actual[:2], plain[:2], truth[:2]):
        assert_as_accurate(a, p, t, scale=t.abs())
    scale = row_weights(targets.cpu(), *on_cpu, part=part, **options)
    assert_as_accurate(actual[2], plain[2], truth[2], scale)


def row_weights(
    targets: Tensor,
    plain: Tensor,
    sharp: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    batch_size: float | None = None,
    part: str = "both",
) -> Tensor:
    """(N, 1): what multiplies softmax - onehot in a row, the size of the terms that are rounded."""
    counted = targets != ignore_index
    y = targets.where(counted, 0)
    w = torch.ones_like(plain) if class_weight is None else class_weight
    b = max(int(counted.sum()), 1) if batch_size is None else batch_size
    r = counted * (PARTS[part][0] * plain[y] + PARTS[part][1] * sharp[y]) / b
    return (r * ((1 - label_smoothing) * w[y] + label_smoothing * w.mean())).unsqueeze(1)


# ---------------------------------------------------------------- values


@each_dtype
@pytest.mark.parametrize(("rows", "classes"), SIZES)
def test_sizes(backend: Backend, rows: int, classes: int, dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(rows, classes, dtype, backend.device)
    plain, sharp, _ = class_weights(classes, dtype, backend.device)
    check(logits, targets, plain, sharp)


OPTIONS: dict[str, dict[str, Any]] = {
    "smoothing": {"label_smoothing": 0.1},
    "smoothing 1": {"label_smoothing": 1.0},
    "batch_size": {"batch_size": 100.0},
    "batch_size 2.5": {"batch_size": 2.5},
    "ignored": {"ignore_index": 3},
    "all": {"label_smoothing": 0.2, "ignore_index": 3, "batch_size": 50.0},
}


@each_dtype
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "class_weight"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_options(
    backend: Backend, part: str, weighted: bool, options: dict, dtype: torch.dtype
) -> None:
    logits, targets = logits_and_targets(13, 37, dtype, backend.device)
    targets[::4] = 3
    plain, sharp, class_weight = class_weights(37, dtype, backend.device)
    check(logits, targets, plain, sharp, class_weight if weighted else None, part=part, **options)


@each_dtype
@pytest.mark.parametrize("batch_size", [None, 7.0])
def test_all_rows_ignored(backend: Backend, batch_size: float | None, dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(5, 10, dtype, backend.device)
    weights = class_weights(10, dtype, backend.device)
    head, tail, gradient = losses_and_gradient(
        logits,
        "both",
        ops.split_cross_entropy,
        targets.fill_(-100),
        *weights,
        0.1,
        -100,
        batch_size,
    )
    assert head.item() == tail.item() == 0.0
    assert gradient.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 3}], ids=["", "smoothing", "ignored"]
)
def test_head_alone_is_cross_entropy(
    backend: Backend, options: dict[str, Any], dtype: torch.dtype
) -> None:
    logits, targets = logits_and_targets(64, 10, dtype, backend.device)
    ones = logits.new_ones(10)
    head, tail, gradient = losses_and_gradient(
        logits, "head", ops.split_cross_entropy, targets, ones, 0 * ones, **options
    )
    logits.requires_grad_()
    expected = F.cross_entropy(logits, targets, **options)
    expected.backward()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(head, expected.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(gradient, logits.grad, rtol=0, atol=tolerance)
    assert tail.item() == 0.0


# ---------------------------------------------------------------- memory layouts


def wide(logits: Tensor) -> Tensor:
    return torch.cat([logits, logits], dim=1)[:, 3 : 3 + logits.shape[1]].copy_(logits)


def transposed(logits: Tensor) -> Tensor:
    return logits.t().contiguous().t()


def every_other_class(logits: Tensor) -> Tensor:
    return logits.repeat_interleave(2, dim=1)[:, ::2]


def one_row_expanded(logits: Tensor) -> Tensor:
    return logits[:1].expand_as(logits)


def sliding_window(logits: Tensor) -> Tensor:
    return logits.reshape(-1).unfold(0, logits.shape[1], 2)[: len(logits)]


LAYOUTS = [wide, transposed, every_other_class, one_row_expanded, sliding_window]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_logits(backend: Backend, layout: Any, dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(5, 37, dtype, backend.device)
    strided = layout(logits)
    assert not strided.is_contiguous()
    check(strided, targets, *class_weights(37, dtype, backend.device), label_smoothing=0.1)


def test_strided_targets_and_weights(backend: Backend) -> None:
    logits, targets = logits_and_targets(10, 9, torch.float32, backend.device)
    weights = class_weights(9, torch.float32, backend.device)
    strided = [x.repeat_interleave(2)[::2] for x in (targets, *weights)]
    assert not any(x.is_contiguous() for x in strided)
    check(logits, *strided, label_smoothing=0.1)


# ---------------------------------------------------------------- extreme logits


@each_dtype
@pytest.mark.parametrize("part", PARTS)
def test_masked_classes(backend: Backend, part: str, dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(20, 37, dtype, backend.device)
    masked = torch.arange(37, device=backend.device) % 3 == 1
    masked = masked & (targets.unsqueeze(1) != torch.arange(37, device=backend.device))
    logits[masked] = -float("inf")
    plain, sharp, _ = class_weights(37, dtype, backend.device)
    check(logits, targets, plain, sharp, part=part)
    _, _, gradient = losses_and_gradient(
        logits, part, ops.split_cross_entropy, targets, plain, sharp
    )
    assert gradient[masked].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_logits_far_apart(backend: Backend, size: float, dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(20, 10, dtype, backend.device)
    plain, sharp, _ = class_weights(10, dtype, backend.device)
    check(size * logits, targets, plain, sharp)


@pytest.mark.parametrize("shift", [30.0, 1e4, -1e4])
def test_logits_far_from_zero(backend: Backend, shift: float) -> None:
    """The loss does not change when all logits of a row shift; its accuracy should not either."""
    logits, targets = logits_and_targets(20, 10, torch.float32, backend.device)
    logits = logits + shift
    ones = logits.new_ones(10)
    head, _, gradient = losses_and_gradient(
        logits, "head", ops.split_cross_entropy, targets, ones, 0 * ones
    )
    plain = logits.clone().requires_grad_()
    plain_loss = F.cross_entropy(plain, targets)
    (plain_gradient,) = torch.autograd.grad(plain_loss, plain)
    truth = logits.double().cpu().requires_grad_()
    truth_loss = F.cross_entropy(truth, targets.cpu())
    (truth_gradient,) = torch.autograd.grad(truth_loss, truth)
    assert_as_accurate(head, plain_loss, truth_loss, scale=truth_loss.abs().detach())
    assert_as_accurate(gradient, plain_gradient, truth_gradient, scale=1 / len(targets))


@each_dtype
@pytest.mark.parametrize("part", PARTS)
def test_rows_without_weight_get_zeros(backend: Backend, part: str, dtype: torch.dtype) -> None:
    """Whatever their logits are: zero times not-a-number would poison the gradient."""
    logits, targets = logits_and_targets(12, 9, dtype, backend.device)
    targets[:3] = -100
    plain, sharp, _ = class_weights(9, dtype, backend.device)
    weight = PARTS[part][0] * plain + PARTS[part][1] * sharp
    without = (targets == -100) | (weight[targets.clamp(min=0)] == 0)
    assert without.any() and not without.all()
    clean = losses_and_gradient(logits, part, ops.split_cross_entropy, targets, plain, sharp)[2]
    logits[without] = float("nan")
    poisoned = losses_and_gradient(logits, part, ops.split_cross_entropy, targets, plain, sharp)[2]
    assert_same_bits([poisoned[without]], [torch.zeros_like(poisoned[without])])
    assert_same_bits([poisoned[~without]], [clean[~without]])


@each_loss
@each_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("k", [0, 15, 36])
def test_nan_is_not_hidden(
    backend: Backend, loss: Any, batch: Any, k: int, value: float, dtype: torch.dtype
) -> None:
    logits, targets = batch(4, 37, dtype, backend.device)
    logits[2, k] = value
    plain = sharp = torch.ones(37, dtype=arithmetic_dtype(dtype), device=backend.device)
    head, tail, gradient = losses_and_gradient(logits, "both", loss, targets, plain, sharp)
    assert head.isnan() and tail.isnan()
    assert gradient.isnan().any(dim=1).tolist() == [False, False, True, False]


# ---------------------------------------------------------------- autograd


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_gradcheck(backend: Backend, options: dict[str, Any]) -> None:
    logits, targets = logits_and_targets(4, 5, torch.float64, backend.device)
    weights = class_weights(5, torch.float64, backend.device)
    assert torch.autograd.gradcheck(
        lambda z: ops.split_cross_entropy(z, targets, *weights, **options),
        logits.requires_grad_(),
        fast_mode=backend == INTERPRETED,  # a product with a random vector, not every column
    )


def test_no_gradient_asked_for(backend: Backend) -> None:
    logits, targets = logits_and_targets(4, 5, torch.float32, backend.device)
    weights = class_weights(5, torch.float32, backend.device)
    head, tail = ops.split_cross_entropy(logits, targets, *weights)
    assert not head.requires_grad and not tail.requires_grad


@each_loss
def test_second_derivatives_are_refused_and_transforms_run(
    backend: Backend, loss: Any, batch: Any
) -> None:
    logits, targets = batch(4, 5, torch.float64, backend.device)
    weights = class_weights(5, torch.float64, backend.device)

    def total(z: Tensor) -> Tensor:
        return sum(loss(z, targets, *weights))  # type: ignore[return-value]

    z = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(z), z, create_graph=True)
    torch.testing.assert_close(gradient.detach(), torch.func.grad(total)(logits))
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*split_loss"):
        gradient.square().sum().backward()


@each_loss
def test_compiled_as_one_graph_it_is_the_operator(loss: Any, batch: Any) -> None:
    logits, targets = batch(6, 9, torch.float32)
    weights = class_weights(9, torch.float32)
    graphs: list[str] = []

    def noting(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=noting)
    options = {"label_smoothing": 0.1}
    eager = losses_and_gradient(logits, "both", loss, targets, *weights, **options)
    assert_same_bits(
        losses_and_gradient(logits, "both", compiled, targets, *weights, **options), eager
    )
    assert len(graphs) == 1 and f"ops.imbsam_fast.{loss.__name__}(" in graphs[0]


@each_loss
def test_a_transform_inside_of_a_compiled_function(loss: Any, batch: Any) -> None:
    """Where the operator could not follow."""
    logits, targets = batch(6, 9, torch.float64)
    weights = class_weights(9, torch.float64)

    def gradient(z: Tensor) -> Tensor:
        return torch.func.grad(lambda z: sum(loss(z, targets, *weights)))(z)

    torch._dynamo.reset()
    compiled = torch.compile(gradient, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits), gradient(logits))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("target", [10, 11, -1, 2**40])
def test_target_out_of_range(backend: Backend, target: int) -> None:
    if backend.name == "triton":
        pytest.skip("test_triton.py says what its kernels do")
    if backend.device != "cpu":
        pytest.skip("reading a target back would synchronise the device")
    logits, targets = logits_and_targets(6, 10, torch.float32)
    targets[4] = target
    weights = class_weights(10, torch.float32)
    with pytest.raises(IndexError, match=str(target)) as caught:
        ops.split_cross_entropy(logits, targets, *weights)
    if backend.name == "native":
        assert f"targets[4] is {target}, expected 0 to 9 or ignore_index -100" in str(caught.value)


def bad(name: str) -> dict[str, Any]:
    """Valid arguments but for the one that `name` says, before a colon."""
    logits, targets = logits_and_targets(6, 10, torch.float32)
    plain, sharp, class_weight = class_weights(10, torch.float32)
    arguments = {"logits": logits, "targets": targets, "plain": plain, "sharp": sharp}
    arguments |= {"class_weight": class_weight}
    changes: dict[str, Any] = {
        "logits: 1-D": logits[0],
        "logits: 3-D": logits[None],
        "logits: int64": logits.long(),
        "logits: complex": logits.to(torch.complex64),
        "logits: no class": logits[:, :0],
        "targets: int32": targets.int(),
        "targets: float32": targets.float(),
        "targets: too few": targets[:-1],
        "targets: 2-D": targets[:, None],
        "targets: another device": targets.to("meta"),
        "plain: too few": plain[:-1],
        "plain: float64": plain.double(),
        "plain: another device": plain.to("meta"),
        "sharp: too many": torch.cat([sharp, sharp]),
        "sharp: one": sharp[:1],
        "class_weight: float16": class_weight.half(),
        "class_weight: 2-D": class_weight[None],
        "batch_size: 0": 0.0,
        "batch_size: negative": -1.0,
        "batch_size: nan": float("nan"),
        "batch_size: inf": float("inf"),
        "label_smoothing: 2": 2.0,
        "label_smoothing: negative": -0.1,
        "label_smoothing: nan": float("nan"),
    }
    if name is None:
        return changes
    return arguments | {name.partition(":")[0]: changes[name]}


@pytest.mark.parametrize("what", bad(None))
def test_refusals_name_the_argument(what: str) -> None:
    with pytest.raises(ValueError, match=f"^split_cross_entropy: {what.partition(':')[0]} "):
        ops.split_cross_entropy(**bad(what))


def test_an_infinite_loss_stays_in_its_part(backend: Backend) -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf]], device=backend.device)
    weights = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], device=backend.device)
    targets = torch.tensor([0, 2], device=backend.device)
    head, tail = ops.split_cross_entropy(logits, targets, *weights)
    torch.testing.assert_close(head.item(), math.log(3) / 2)
    assert tail.item() == math.inf

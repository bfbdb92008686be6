"""The criteria: SplitCrossEntropy and what split_loss makes of a per-sample loss."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import TOLERANCE, assert_same_bits
from conftest import Backend
from samples import DTYPES, logits_and_targets
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imbsam_fast import ClassSplit, SplitCrossEntropy, SplitLoss, ops, split_loss
from imbsam_fast.ops.reference import arithmetic_dtype

# Classes 0, 3, 6 and 9 of ten are head.
SPLIT = ClassSplit.from_counts([500, 3, 7] * 3 + [500], eta=100)

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "smoothing": {"label_smoothing": 0.1},
    "ignored": {"ignore_index": 4},
    "weight": {"weight": torch.linspace(0.5, 2, 10)},
}

each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


def batch(dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return logits_and_targets(64, 10, dtype, device)


def per_row(logits: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
    options = {k: v.to(logits) if torch.is_tensor(v) else v for k, v in options.items()}
    return F.cross_entropy(logits, targets, reduction="none", **options)


# ---------------------------------------------------------------- SplitCrossEntropy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_option
def test_parts(backend: Backend, options: dict[str, Any], dtype: torch.dtype) -> None:
    logits, targets = batch(dtype, backend.device)
    loss = SplitCrossEntropy(SPLIT, **options)(logits, targets)
    rows = per_row(logits.double(), targets, options)
    counted = int((targets != options.get("ignore_index", -100)).sum())
    is_head = targets % 3 == 0
    assert isinstance(loss, SplitLoss)
    tolerance = TOLERANCE[arithmetic_dtype(dtype)]
    for part, mask in ((loss.head, is_head), (loss.tail, ~is_head)):
        assert part.dtype == arithmetic_dtype(dtype) and part.shape == ()
        expected = rows[mask].sum().item() / counted
        assert part.item() == pytest.approx(expected, rel=tolerance)
    assert_same_bits([loss.total], [loss.head + loss.tail])


@each_option
def test_no_tail_is_cross_entropy(backend: Backend, options: dict[str, Any]) -> None:
    logits, targets = batch(torch.float64, backend.device)
    head, tail = SplitCrossEntropy(ClassSplit.none(), **options)(logits, targets)
    if "weight" in options:  # the mean is over rows, not over their weights
        expected = per_row(logits, targets, options).mean()
    else:
        expected = F.cross_entropy(logits, targets, **options)
    torch.testing.assert_close(head, expected, rtol=1e-14, atol=0)
    assert tail.item() == 0


def test_all_tail_is_no_tail_in_the_other_part(backend: Backend) -> None:
    logits, targets = batch(torch.float32, backend.device)
    plain = SplitCrossEntropy(ClassSplit.none())(logits, targets)
    sharp = SplitCrossEntropy(ClassSplit.all_tail())(logits, targets)
    assert_same_bits([*plain], [sharp.tail, sharp.head])


def test_batch_size_adds_up_over_parts_of_a_batch(backend: Backend) -> None:
    logits, targets = batch(torch.float64, backend.device)
    criterion = SplitCrossEntropy(SPLIT)
    whole = criterion(logits, targets)
    parts = [criterion(logits[i : i + 16], targets[i : i + 16], 64) for i in range(0, 64, 16)]
    for name in ("head", "tail"):
        total = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(total, getattr(whole, name), rtol=1e-14, atol=0)


def test_tail_weight_scales_the_tail_and_its_gradient() -> None:
    logits, targets = batch()
    once, twice = (SplitCrossEntropy(SPLIT, tail_weight=w) for w in (1.0, 2.0))
    assert twice(logits, targets).head == once(logits, targets).head
    gradients = []
    for criterion in (once, twice):
        z = logits.clone().requires_grad_()
        loss = criterion(z, targets)
        gradients.append((loss.tail.detach(), *torch.autograd.grad(loss.tail, z)))
    for a, b in zip(*gradients):
        torch.testing.assert_close(2 * a, b, rtol=1e-14, atol=0)


def test_gradcheck_of_the_criterion(backend: Backend) -> None:
    logits, targets = logits_and_targets(5, 10, torch.float64, backend.device)
    criterion = SplitCrossEntropy(SPLIT, label_smoothing=0.1, tail_weight=2.0)
    assert torch.autograd.gradcheck(lambda z: tuple(criterion(z, targets)), logits.requires_grad_())


def test_settings_reach_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(ops, "split_cross_entropy", lambda *a: seen.extend(a) or (a[0], a[0]))
    logits, targets = batch()
    SplitCrossEntropy(SPLIT, label_smoothing=0.25, ignore_index=7)(logits, targets, 12.0)
    assert seen[5:] == [0.25, 7, 12.0]


def test_a_half_model_keeps_the_split_unrounded() -> None:
    logits, targets = batch(torch.float16)
    split = ClassSplit.focal([700, 200, 50, 20, 10, 7, 5, 4, 3, 1], gamma=2, lam=0.3)
    before = SplitCrossEntropy(split)(logits, targets)
    model = nn.Sequential(nn.Linear(1, 1), SplitCrossEntropy(split)).half()
    assert_same_bits([*model[1](logits, targets)], [*before])


def test_the_weight_is_saved_with_the_criterion() -> None:
    criterion = SplitCrossEntropy(ClassSplit.none(), weight=torch.ones(10))
    state = SplitCrossEntropy(ClassSplit.none(), weight=torch.arange(10.0)).state_dict()
    criterion.load_state_dict(state)
    assert criterion.weight is not None and criterion.weight.tolist() == list(range(10))


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "split": ({"split": torch.ones(3)}, TypeError, "split is Tensor, expected a ClassSplit"),
    "smoothing 1.5": ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5, expected"),
    "smoothing nan": ({"label_smoothing": float("nan")}, ValueError, "label_smoothing is nan"),
    "weight 2-D": ({"weight": torch.ones(1, 10)}, ValueError, r"weight is torch.float32 \(1, 10\)"),
    "weight int": ({"weight": torch.ones(10, dtype=int)}, ValueError, "weight is torch.int64"),
    "tail_weight 0": ({"tail_weight": 0.0}, ValueError, "tail_weight is 0.0, expected"),
    "tail_weight inf": ({"tail_weight": float("inf")}, ValueError, "tail_weight is inf"),
    "tail_weight nan": ({"tail_weight": float("nan")}, ValueError, "tail_weight is nan"),
}


@pytest.mark.parametrize(
    ("changes", "error", "message"), BAD_ARGUMENTS.values(), ids=list(BAD_ARGUMENTS)
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SplitCrossEntropy(**{"split": SPLIT, **changes})


def test_another_number_of_classes_is_refused() -> None:
    logits, targets = logits_and_targets(4, 7, torch.float32)
    with pytest.raises(ValueError, match="the split has 10 classes, expected 7"):
        SplitCrossEntropy(SPLIT)(logits, targets)
    with pytest.raises(ValueError, match=r"class_weight is torch.float32 \(10,\)"):
        SplitCrossEntropy(ClassSplit.none(), weight=torch.ones(10))(logits, targets)


# ---------------------------------------------------------------- split_loss


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets) ** 2


def test_split_loss_of_a_regression() -> None:
    # Ages 0 to 3 as labels; 1 and 2 are rare.
    split = ClassSplit.from_counts([900, 10, 20, 800])
    outputs = torch.tensor([0.5, 1.0, 4.0, 3.0], requires_grad=True)
    targets = torch.tensor([0, 2, 1, 3])
    loss = split_loss(squared_error, split, tail_weight=2.0)(outputs, targets)
    assert loss.head.item() == 0.25 / 4
    assert loss.tail.item() == 2 * (1 + 9) / 4
    loss.tail.backward()
    assert outputs.grad is not None
    assert outputs.grad.tolist() == [0.0, -1.0, 3.0, 0.0]


def test_split_loss_batch_size() -> None:
    criterion = split_loss(squared_error, ClassSplit.all_tail())
    outputs, targets = torch.tensor([1.0, 3.0]), torch.tensor([0, 1])
    assert criterion(outputs, targets).tail.item() == 2.5
    assert criterion(outputs, targets, batch_size=10).tail.item() == 0.5
    empty = criterion(outputs[:0], targets[:0])
    assert empty.head.item() == empty.tail.item() == 0


def test_split_loss_of_cross_entropy_is_split_cross_entropy() -> None:
    logits, targets = batch()
    per_sample = functools.partial(F.cross_entropy, reduction="none")
    for split in (SPLIT, ClassSplit.none(), ClassSplit.all_tail()):
        torch.testing.assert_close(
            tuple(split_loss(per_sample, split)(logits, targets)),
            tuple(SplitCrossEntropy(split)(logits, targets)),
            rtol=1e-14,
            atol=0,
        )


def test_split_loss_has_second_derivatives() -> None:
    logits, targets = logits_and_targets(4, 10, torch.float64)
    criterion = split_loss(functools.partial(F.cross_entropy, reduction="none"), SPLIT)
    assert torch.autograd.gradgradcheck(
        lambda z: tuple(criterion(z, targets)), logits.requires_grad_()
    )


class Scaled(nn.Module):
    """A per-sample loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.factor * squared_error(outputs, targets)


def test_split_loss_holds_the_parameters_of_a_module() -> None:
    criterion = split_loss(Scaled(), SPLIT)
    (parameter,) = criterion.parameters()
    criterion(torch.tensor([3.0]), torch.tensor([1])).tail.backward()
    assert parameter.grad is not None and parameter.grad.item() == 4.0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_split_loss_takes_labels_of_any_integers(dtype: torch.dtype) -> None:
    """In 8 bits -100 is 156, which may be a class."""
    split = ClassSplit.from_counts([500] * 150 + [5] * 50)
    targets = torch.tensor([156, 156, 0, 3, 199, 7])
    criterion = split_loss(lambda outputs, targets: outputs * targets, split)
    outputs = torch.arange(6.0)
    assert criterion(outputs, targets.to(dtype)) == criterion(outputs, targets)
    expected, found = (criterion.parts(t) for t in (targets, targets.to(dtype)))  # type: ignore[operator]
    assert torch.equal(found.head, expected.head) and torch.equal(found.tail, expected.tail)
    assert found[2:] == expected[2:] == (6, 0.5)


@pytest.mark.parametrize("target", [-99, -1, 10, 1000])
def test_split_loss_refuses_labels_outside_the_split(target: int) -> None:
    criterion = split_loss(squared_error, SPLIT)
    with pytest.raises(IndexError):
        criterion(torch.ones(2), torch.tensor([3, target]))


@pytest.mark.parametrize(
    ("per_sample", "shape"),
    [
        (lambda outputs, targets: outputs.mean(), r"\(\)"),
        (lambda outputs, targets: outputs, r"\(4, 1\)"),
        (lambda outputs, targets: outputs[:3, 0], r"\(3,\)"),
    ],
)
def test_split_loss_refuses_another_shape(per_sample: Any, shape: str) -> None:
    criterion = split_loss(per_sample, SPLIT)
    message = rf"per_sample_loss returned shape {shape}, expected \(4,\)"
    with pytest.raises(ValueError, match=message):
        criterion(torch.ones(4, 1), torch.zeros(4, dtype=torch.int64))


def test_split_loss_bad_arguments() -> None:
    with pytest.raises(TypeError, match="per_sample_loss is 3, expected a callable"):
        split_loss(3, SPLIT)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="split is list, expected a ClassSplit"):
        split_loss(squared_error, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tail_weight is -1"):
        split_loss(squared_error, SPLIT, tail_weight=-1)


def test_the_criterion_inside_activation_checkpointing() -> None:
    criterion = SplitCrossEntropy(SPLIT)
    targets = torch.tensor([0, 9, 3, 8])
    found = []
    for reentrant in (None, False):
        logits = torch.linspace(-1, 1, 40).reshape(4, 10).requires_grad_()

        def part(z: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(criterion(2 * z, targets))

        head, tail = (
            part(logits) if reentrant is None else checkpoint(part, logits, use_reentrant=reentrant)
        )
        head.backward(retain_graph=True)
        tail.backward()
        found.append(logits.grad)
    torch.testing.assert_close(*found)


def test_the_criterion_under_vmap() -> None:
    criterion = SplitCrossEntropy(SPLIT)
    targets = torch.tensor([0, 9, 3])
    logits = torch.randn(2, 3, 10)
    mapped = torch.vmap(lambda z: criterion(z, targets).total)(logits)
    expected = torch.stack([criterion(z, targets).total for z in logits])
    torch.testing.assert_close(mapped, expected)


def test_scratch_memory_is_on_the_cpu_whatever_the_default_device_is() -> None:
    criterion = SplitCrossEntropy(SPLIT)
    logits, targets = torch.randn(3, 10), torch.tensor([0, 9, 3])
    expected = criterion(logits, targets)
    with torch.device("meta"):
        found = criterion(logits, targets)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("targets", [torch.ones(3, 4, 2), torch.rand(3), torch.ones(3).bool()])
def test_split_loss_asks_for_labels(targets: Tensor) -> None:
    criterion = split_loss(lambda o, t: ((o - 1) ** 2).mean(1), ClassSplit.all_tail())
    with pytest.raises(ValueError, match=r"targets is .*, expected integer labels \(N,\)"):
        criterion(torch.randn(3, 4), targets)

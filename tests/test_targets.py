"""Criteria of other targets than one label a row: distributions, dense labels, many labels."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import TOLERANCE, assert_as_accurate
from samples import DTYPES, distributions, logits_and_targets
from torch import Tensor, nn

from imbsam_fast import ClassSplit, SplitBCEWithLogits, SplitCrossEntropy, ops, split_loss
from imbsam_fast.losses import parts_of

# Classes 0, 3, 6 and 9 of ten are head.
SPLIT = ClassSplit.from_counts([500, 3, 7] * 3 + [500], eta=100)
IS_TAIL = SPLIT.sharp > 0


def by_hand(logits: Tensor, q: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """For each class the loss that its label would have, weighed by q and put into its part."""
    options = {k: v.to(logits) if torch.is_tensor(v) else v for k, v in options.items()}
    tail_weight = options.pop("tail_weight", 1.0)
    of_class = [
        F.cross_entropy(logits, torch.full((len(q),), k), reduction="none", **options)
        for k in range(10)
    ]
    terms = q * torch.stack(of_class, 1)
    b = int((q != 0).any(1).sum())
    return terms[:, ~IS_TAIL].sum() / b, tail_weight * terms[:, IS_TAIL].sum() / b


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"weight": torch.linspace(0.5, 2, 10), "tail_weight": 2.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distributions_in_any_dtype(dtype, target_dtype, options):
    logits, q = distributions(40, 10, dtype)
    q = q.to(target_dtype)
    loss = SplitCrossEntropy(SPLIT, **options)(logits, q)
    for part, expected in zip(loss, by_hand(logits.double(), q.double(), dict(options))):
        assert part.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # q of higher precision is rounded to the losses' dtype.
        assert float(part) == pytest.approx(float(expected), rel=max(TOLERANCE[part.dtype], 1e-12))


def test_without_tail_it_is_torchs_cross_entropy_and_as_accurate():
    logits, q = distributions(64, 100, torch.float32)
    q[(q == 0).all(1), 0] = 1  # which torch counts
    for smoothing in (0.0, 0.1):
        criterion = SplitCrossEntropy(ClassSplit.none(), label_smoothing=smoothing)
        plain, truth = (
            F.cross_entropy(z, p, label_smoothing=smoothing)
            for z, p in ((logits, q), (logits.double(), q.double()))
        )
        assert_as_accurate(criterion(logits, q).head, plain, truth, scale=truth)


def test_a_mixed_batch_is_the_mixture_of_two_of_labels():
    logits, y = logits_and_targets(32, 10, torch.float64)
    other = y.flip(0)
    q = 0.3 * F.one_hot(y, 10).double() + 0.7 * F.one_hot(other, 10).double()
    criterion = SplitCrossEntropy(SPLIT, label_smoothing=0.1)
    mixed, first, second = (criterion(logits, targets) for targets in (q, y, other))
    for m, a, b in zip(mixed, first, second):
        torch.testing.assert_close(m, 0.3 * a + 0.7 * b, rtol=1e-13, atol=0)


# ---------------------------------------------------------------- dense targets


def dense(*positions: int) -> tuple[Tensor, Tensor]:
    """Logits (3, 10, ...) and labels (3, ...) with ignored ones."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 10, *positions, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 10, (3, *positions), generator=generator)
    targets.flatten()[::4] = -100
    return logits, targets


@pytest.mark.parametrize("positions", [(7,), (4, 5), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["", "smoothing"])
def test_dense_labels(positions, options):
    logits, targets = dense(*positions)
    z = logits.clone().requires_grad_()
    loss = SplitCrossEntropy(SPLIT, **options)(z, targets)
    truth = logits.clone().requires_grad_()
    losses = F.cross_entropy(truth, targets, reduction="none", **options)
    counted = targets != -100
    in_tail = IS_TAIL[targets.clamp(min=0)] & counted
    expected = [losses[part].sum() / counted.sum() for part in (counted & ~in_tail, in_tail)]
    torch.testing.assert_close([*loss], expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss.total, z), torch.autograd.grad(sum(expected), truth)
    )
    everything = SplitCrossEntropy(ClassSplit.none(), **options)(logits, targets)
    torch.testing.assert_close(everything.head, F.cross_entropy(logits, targets, **options))


def test_dense_distributions():
    logits, targets = dense(4, 5)
    q = F.one_hot(targets.clamp(min=0), 10).double() * (targets != -100).unsqueeze(-1)
    hard = SplitCrossEntropy(SPLIT)(logits, targets)
    soft = SplitCrossEntropy(SPLIT)(logits, q.movedim(-1, 1))
    torch.testing.assert_close([*soft], [*hard], rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (lambda z: z, True),
        (lambda z: z.contiguous(memory_format=torch.channels_last), False),
        (lambda z: z[:2].contiguous(memory_format=torch.channels_last), False),
        (lambda z: z.movedim(1, -1).contiguous().movedim(-1, 1), False),
    ],
    ids=["contiguous", "channels_last", "fewer rows", "classes last"],
)
def test_logits_are_copied_where_their_classes_lie_apart_alone(monkeypatch, make, copies):
    logits, targets = dense(4, 5)
    given = make(logits)
    seen = []
    operator = ops.split_cross_entropy
    monkeypatch.setattr(ops, "split_cross_entropy", lambda *a: seen.append(a[0]) or operator(*a))
    SplitCrossEntropy(SPLIT)(given, targets[: len(given)])
    assert (seen[0].data_ptr() != given.data_ptr()) == copies and seen[0].stride(1) == 1


def test_a_language_model_transposes_without_a_copy():
    logits = torch.randn(2, 7, 10, dtype=torch.float64)  # (N, T, K)
    targets = torch.randint(0, 10, (2, 7))
    criterion = SplitCrossEntropy(SPLIT)
    with pytest.raises(
        ValueError, match=r"targets .*\(2, 7\), expected \(2, 10\).*transpose\(1, 2"
    ):
        criterion(logits, targets)
    flat = criterion(logits.flatten(0, 1), targets.flatten())
    assert [*criterion(logits.transpose(1, 2), targets)] == [*flat]


# ---------------------------------------------------------------- split_loss


def test_split_loss_weighs_the_terms_of_the_classes():
    logits, q = distributions(20, 10, torch.float64)

    def terms(outputs: Tensor, targets: Tensor) -> Tensor:
        return -targets * outputs.log_softmax(1)

    loss = split_loss(terms, SPLIT, tail_weight=2.0)(logits, q)
    expected = SplitCrossEntropy(SPLIT, tail_weight=2.0)(logits, q)
    torch.testing.assert_close([*loss], [*expected], rtol=1e-13, atol=0)


def test_split_loss_divides_a_rows_loss_as_its_distribution_is():
    logits, q = distributions(20, 10, torch.float64)
    row_loss = functools.partial(F.cross_entropy, reduction="none")
    loss = split_loss(row_loss, SPLIT)(logits, q)
    losses, b = row_loss(logits, q), int((q != 0).any(1).sum())
    for part, mask in zip(loss, (~IS_TAIL, IS_TAIL)):
        torch.testing.assert_close(part, (q[:, mask].sum(1) * losses).sum() / b)


def test_split_loss_of_dense_labels():
    logits, targets = dense(4, 5)
    row_loss = functools.partial(F.cross_entropy, reduction="none")
    loss = split_loss(row_loss, SPLIT)(logits, targets)
    expected = SplitCrossEntropy(SPLIT)(logits, targets)
    torch.testing.assert_close([*loss], [*expected], rtol=1e-13, atol=0)


# ---------------------------------------------------------------- many labels a row


def yes_and_no(rows: int = 12) -> tuple[Tensor, Tensor]:
    logits, _ = logits_and_targets(rows, 10, torch.float64)
    return logits, (torch.rand(rows, 10, generator=torch.Generator().manual_seed(0)) < 0.3).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_labels(dtype):
    logits, targets = yes_and_no()
    logits = logits.to(dtype)
    weights = {"weight": torch.linspace(0.5, 2, 10), "pos_weight": torch.linspace(1, 4, 10)}
    loss = SplitBCEWithLogits(SPLIT, **weights, tail_weight=2.0)(logits, targets)
    terms = F.binary_cross_entropy_with_logits(
        logits.double(), targets, reduction="none", **{k: w.double() for k, w in weights.items()}
    )
    expected = [terms[:, ~IS_TAIL].sum() / 120, 2 * terms[:, IS_TAIL].sum() / 120]
    for part, value in zip(loss, expected):
        assert part.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert float(part) == pytest.approx(float(value), rel=TOLERANCE[part.dtype])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_without_tail_it_is_torchs_binary_cross_entropy(dtype):
    logits, targets = yes_and_no()
    criterion = SplitBCEWithLogits(ClassSplit.none())
    head, tail = criterion(logits, targets.to(dtype))
    torch.testing.assert_close(head, F.binary_cross_entropy_with_logits(logits, targets))
    assert tail == 0
    halves = [criterion(logits[i : i + 6], targets[i : i + 6], 12).head for i in (0, 6)]
    torch.testing.assert_close(sum(halves), head)


def test_gradients_of_many_labels():
    logits, targets = yes_and_no(4)
    criterion = SplitBCEWithLogits(SPLIT, pos_weight=torch.linspace(1, 4, 10))
    assert torch.autograd.gradcheck(
        lambda z: tuple(criterion(z, targets)), logits.clone().requires_grad_()
    )


# ---------------------------------------------------------------- rows of the parts


def test_parts_of_targets():
    criterion = SplitCrossEntropy(SPLIT)
    labels = torch.tensor([0, 1, -100, 3])
    found = parts_of(criterion, labels)
    assert found.head.tolist() == [True, False, False, True]
    assert found.tail.tolist() == [False, True, False, False]
    assert (found.counted, found.tail_share) == (3, 1 / 3)
    q = torch.zeros(4, 10)
    q[0, 0], q[1, 1], q[3, :2] = 1, 1, torch.tensor([0.75, 0.25])
    found = parts_of(criterion, q)
    assert found.head.tolist() == [True, False, False, True]
    assert found.tail.tolist() == [False, True, False, True]
    assert (found.counted, found.tail_share) == (3, 1.25 / 3)
    found = parts_of(criterion, torch.tensor([[0, 0, -100], [1, 3, -100], [-100, -100, -100]]))
    assert found.head.tolist() == [True, True, False]
    assert found.tail.tolist() == [False, True, False]
    assert (found.counted, found.tail_share) == (4, 1 / 4)
    found = parts_of(SplitBCEWithLogits(SPLIT), torch.eye(10)[:4])
    assert found.head.all() and found.tail.all()
    assert (found.counted, found.tail_share) == (4, 0.5)


@pytest.mark.parametrize("ignore_index", [-100, 0, 4, 9, 10, 255])
@pytest.mark.parametrize("split", [SPLIT, ClassSplit.all_tail(), ClassSplit.none()])
@pytest.mark.parametrize("ndim", [1, 2])
def test_an_ignored_label_is_in_no_part(split: ClassSplit, ignore_index: int, ndim: int):
    """Also where it is a class, or would be the next one."""
    labels = torch.tensor([0, 4, 9, 1, ignore_index, 3]).view(-1, *[1] * (ndim - 1))
    counted = (labels != ignore_index).view(-1)
    found = parts_of(SplitCrossEntropy(split, ignore_index=ignore_index), labels)
    head, tail = (mask.view(-1) for mask in (split.plain_mask(labels), split.tail_mask(labels)))
    assert found.head.tolist() == (head & counted).tolist()
    assert found.tail.tolist() == (tail & counted).tolist()
    assert found.counted == counted.sum()
    assert found.tail_share == (tail & counted).sum() / counted.sum()


# ---------------------------------------------------------------- refusals

N, K = 4, 10
LOGITS, LABELS, Q = torch.zeros(N, K), torch.zeros(N, dtype=torch.int64), torch.full((N, K), 0.1)
REFUSED: dict[str, tuple[nn.Module, tuple, str]] = {
    "labels as floats": (
        SplitCrossEntropy(SPLIT), (LOGITS, LABELS.float()),
        r"targets is torch.float32 \(4,\), expected \(4, 10\)",
    ),
    "another shape": (
        SplitCrossEntropy(SPLIT), (LOGITS, Q[:, :9]),
        r"targets is torch.float32 \(4, 9\), expected \(4, 10\)",
    ),
    "a gradient": (
        SplitCrossEntropy(SPLIT), (LOGITS, Q.clone().requires_grad_()),
        "targets requires a gradient, expected none",
    ),
    "other positions": (
        SplitCrossEntropy(SPLIT), (torch.zeros(N, K, 3), LABELS),
        r"targets is torch.int64 \(4,\), expected \(4, 3\)",
    ),
    "other classes than the split": (
        SplitCrossEntropy(SPLIT), (torch.zeros(N, 3), torch.zeros(N, 3)), "the split has 10",
    ),
    "one dimension": (SplitCrossEntropy(SPLIT), (LOGITS[0], LABELS), r"logits has shape"),
    "many labels, one a row": (
        SplitBCEWithLogits(SPLIT), (LOGITS, LABELS), r"targets is torch.int64 \(4,\), expected 0",
    ),
    "many labels, another shape": (
        SplitBCEWithLogits(SPLIT), (LOGITS, Q[:2]), r"targets is .*\(2, 10\), expected \(4, 10\)",
    ),
    "many labels, dense": (
        SplitBCEWithLogits(SPLIT), (LOGITS[None], Q), r"logits is .*\(1, 4, 10\), expected",
    ),
    "a loss of another shape": (
        split_loss(lambda z, y: z.sum(), SPLIT), (LOGITS, Q),
        r"per_sample_loss returned shape \(\), expected \(4,\), one loss a row, or \(4, 10\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_name_what_was_given(what):
    criterion, arguments, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        criterion(*arguments)


def test_settings_of_many_labels_are_checked():
    for settings, message in (
        ({"weight": torch.ones(3)}, "weight has 3 classes, expected 10 as in split"),
        ({"pos_weight": -torch.ones(10)}, "pos_weight is .*expected finite weights >= 0"),
        ({"tail_weight": 0.0}, "tail_weight is 0.0, expected a finite number > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SplitBCEWithLogits(SPLIT, **settings)

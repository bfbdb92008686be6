"""ClassSplit: the class weights from counts, their masks, and what survives moving and saving."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imbsam_fast import ClassSplit, SplitCrossEntropy

# CIFAR100-LT with imbalance factor 100.
CIFAR100_LT = [int(500 * 100 ** (-k / 99)) for k in range(100)]

COUNTS = [500, 100, 99, 101, 0, 100]


def weights(split: ClassSplit) -> tuple[list[float], list[float]]:
    return split.plain.tolist(), split.sharp.tolist()


# ---------------------------------------------------------------- from counts


@pytest.mark.parametrize(
    "counts", [COUNTS, tuple(COUNTS), torch.tensor(COUNTS)], ids=["list", "tuple", "tensor"]
)
def test_from_counts(counts: Any) -> None:
    split = ClassSplit.from_counts(counts, eta=100)
    assert weights(split) == ([1, 0, 0, 1, 0, 0], [0, 1, 1, 0, 1, 1])
    assert split.counts is not None and split.counts.tolist() == COUNTS
    assert split.num_classes == 6


def test_from_counts_exclusive() -> None:
    split = ClassSplit.from_counts(COUNTS, eta=100, inclusive=False)
    assert weights(split) == ([1, 1, 0, 1, 0, 1], [0, 0, 1, 0, 1, 0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
def test_from_counts_of_every_integer_dtype(dtype: torch.dtype) -> None:
    split = ClassSplit.from_counts(torch.tensor([200, 3], dtype=torch.uint8).to(dtype), eta=50)
    assert split.counts is not None and split.counts.dtype == torch.int64
    assert split.counts.tolist() == [200, 3] and split.sharp.tolist() == [0, 1]


def test_from_counts_of_one_class_is_not_any_number_of_classes() -> None:
    split = ClassSplit.from_counts([5], eta=float("inf"))
    assert split.num_classes == 1
    with pytest.raises(ValueError, match="the split has 1 classes, expected 3"):
        split.weights(3, torch.device("cpu"), torch.float32)


def test_the_counts_of_the_caller_stay_the_callers() -> None:
    counts = torch.tensor(COUNTS)
    plain, sharp = torch.ones(6), torch.zeros(6, dtype=torch.float64)
    splits = [ClassSplit.from_counts(counts), ClassSplit(plain, sharp, counts)]
    for x in (counts, plain, sharp):
        x.fill_(7)
    for split in splits:
        assert split.counts is not None and split.counts.tolist() == COUNTS
    assert weights(splits[1]) == ([1] * 6, [0] * 6)


def test_from_targets() -> None:
    labels = torch.tensor([0, 2, 2, 1, 2, 0])
    split = ClassSplit.from_targets(labels, eta=2)
    assert split.counts is not None and split.counts.tolist() == [2, 1, 3]
    assert weights(split) == ([0, 0, 1], [1, 1, 0])
    longer = ClassSplit.from_targets(labels.tolist(), num_classes=5, eta=2)
    assert longer.counts is not None and longer.counts.tolist() == [2, 1, 3, 0, 0]
    exclusive = ClassSplit.from_targets(labels, eta=2, inclusive=False)
    assert weights(exclusive) == ([1, 0, 1], [0, 1, 0])


# ---------------------------------------------------------------- the other methods


@pytest.mark.parametrize("num_classes", [1, 2, 1000])
@pytest.mark.parametrize(
    ("make", "plain", "sharp"), [(ClassSplit.none, 1, 0), (ClassSplit.all_tail, 0, 1)]
)
def test_splits_for_any_number_of_classes(
    make: Any, plain: float, sharp: float, num_classes: int
) -> None:
    split = make()
    assert split.num_classes is None
    p, s = split.weights(num_classes, torch.device("cpu"), torch.float32)
    assert p.tolist() == [plain] * num_classes and s.tolist() == [sharp] * num_classes
    assert p.dtype == s.dtype == torch.float32 and p.is_contiguous() and s.is_contiguous()
    assert split.tail_fraction == sharp


def test_focal() -> None:
    # pi = 0.8, 0.2, so sharp = 0.5 * 0.2^2, 0.5 * 0.8^2.
    split = ClassSplit.focal([80, 20], gamma=2, lam=0.5)
    assert split.sharp.tolist() == pytest.approx([0.02, 0.32], rel=1e-14)
    assert split.plain.tolist() == pytest.approx([0.98, 0.68], rel=1e-14)
    assert weights(ClassSplit.focal([80, 20], gamma=0, lam=1)) == ([0, 0], [1, 1])
    assert weights(ClassSplit.focal([80, 20], gamma=2, lam=0)) == ([1, 1], [0, 0])


def test_weights_are_converted_once_and_unrounded() -> None:
    third = torch.tensor([1 / 3], dtype=torch.float64)
    split = ClassSplit(third, 2 * third)
    cpu = torch.device("cpu")
    plain, sharp = split.weights(4, cpu, torch.float64)
    assert plain.tolist() == [1 / 3] * 4 and sharp.tolist() == [2 / 3] * 4
    assert split.weights(4, cpu, torch.float64)[0] is plain
    rounded = split.weights(4, cpu, torch.float32)[0]
    assert rounded.dtype == torch.float32 and torch.equal(rounded, plain.float())


# ---------------------------------------------------------------- masks


INTEGERS = [torch.int64, torch.int32, torch.int16]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_masks(dtype: torch.dtype) -> None:
    split = ClassSplit(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.0, 2.0, 0.5]))
    targets = torch.tensor([0, 1, 2, -100, 3, -1, 1000], dtype=dtype)
    assert split.tail_mask(targets).tolist() == [False, True, True, *[False] * 4]
    assert split.plain_mask(targets).tolist() == [True, False, True, *[False] * 4]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("num_classes", [3, 1000])
def test_masks_of_labels_in_one_byte(dtype: torch.dtype, num_classes: int) -> None:
    counts = [500, 3, 500] + [500] * (num_classes - 3)
    targets = torch.tensor([0, 1, 2, 1], dtype=dtype)
    assert ClassSplit.from_counts(counts).tail_mask(targets).tolist() == [False, True, False, True]


def test_masks_of_any_number_of_classes() -> None:
    targets = torch.tensor([[0, 5], [-100, 10**6]])
    assert ClassSplit.all_tail().tail_mask(targets).tolist() == [[True, True], [False, True]]
    assert not ClassSplit.none().tail_mask(targets).any()
    assert ClassSplit.none().plain_mask(targets).tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
@pytest.mark.parametrize("make", [ClassSplit.all_tail, lambda: ClassSplit.from_counts([5, 500])])
def test_masks_are_shaped_like_the_targets(make: Any, shape: tuple[int, ...]) -> None:
    mask = make().tail_mask(torch.zeros(shape, dtype=torch.int64))
    assert mask.shape == shape and mask.dtype == torch.bool and mask.all()


# ---------------------------------------------------------------- tail_fraction


def test_tail_fraction() -> None:
    assert ClassSplit.from_counts(CIFAR100_LT, eta=100).tail_fraction == pytest.approx(
        0.187, abs=5e-4
    )
    assert ClassSplit.from_counts([900, 60, 40], eta=60).tail_fraction == pytest.approx(
        0.1, rel=1e-14
    )
    assert ClassSplit.focal([80, 20], gamma=1, lam=0.5).tail_fraction == 1.0


def test_tail_fraction_without_counts() -> None:
    split = ClassSplit(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="needs the class counts, and counts is None"):
        _ = split.tail_fraction
    assert ClassSplit(torch.ones(3), torch.ones(3)).tail_fraction == 1.0


def test_tail_fraction_of_no_images() -> None:
    split = ClassSplit.from_counts([0, 0], eta=float("inf"))
    with pytest.raises(ValueError, match="counts"):
        _ = split.tail_fraction


# ---------------------------------------------------------------- as a module


def uneven() -> ClassSplit:
    """Weights that no dtype below float64 holds exactly."""
    return ClassSplit.focal([80, 20, 3], gamma=2, lam=0.3)


def same(a: ClassSplit, b: ClassSplit) -> bool:
    buffers = zip(a.buffers(), b.buffers())
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in buffers)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_a_cast_keeps_the_weights(cast: str) -> None:
    split = uneven()
    model = nn.Sequential(nn.Linear(2, 3), split)
    getattr(model, cast)()
    assert same(split, uneven())
    assert model[0].weight.dtype != torch.float32 or cast == "float"


def test_to_moves_the_weights() -> None:
    split = uneven().to("meta")
    assert {b.device.type for b in split.buffers()} == {"meta"}
    assert same(uneven().to("cpu", torch.float16), uneven())


def test_state_dict_round_trip_clears_the_cache() -> None:
    split = ClassSplit.from_counts([1, 2, 1000])
    targets, cpu = torch.arange(3), torch.device("cpu")
    before = split.weights(3, cpu, torch.float32)[1].tolist(), split.tail_mask(targets).tolist()
    assert before == ([1, 1, 0], [True, True, False])
    split.load_state_dict(ClassSplit.from_counts([1000, 2000, 3]).state_dict())
    assert split.weights(3, cpu, torch.float32)[1].tolist() == [0, 0, 1]
    assert split.tail_mask(targets).tolist() == [False, False, True]
    assert split.plain_mask(targets).tolist() == [True, True, False]
    assert split.counts is not None and split.counts.tolist() == [1000, 2000, 3]


def test_state_dict_of_the_criterion_restores_the_split() -> None:
    criterion = SplitCrossEntropy(ClassSplit.from_counts([1, 2, 1000]))
    saved = copy.deepcopy(SplitCrossEntropy(ClassSplit.from_counts([1000, 2, 1])).state_dict())
    logits, targets = torch.zeros(1, 3), torch.tensor([0])
    assert criterion(logits, targets).head.item() == 0
    criterion.load_state_dict(saved)
    assert criterion(logits, targets).tail.item() == 0


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("used", [False, True])
def test_copies_are_independent(duplicate: Any, used: bool) -> None:
    split = uneven()
    if used:
        split.weights(3, torch.device("cpu"), torch.float32)
        split.tail_mask(torch.arange(3))
    other = duplicate(split)
    assert same(other, split) and other.num_classes == 3
    other.load_state_dict(ClassSplit.from_counts([1000, 2000, 3]).state_dict())
    assert same(split, uneven())
    assert split.tail_mask(torch.arange(3)).all()
    assert other.tail_mask(torch.arange(3)).tolist() == [False, False, True]


def test_first_used_without_autograd() -> None:
    """Weights cached by a validation pass must serve the training that follows."""
    criterion = SplitCrossEntropy(ClassSplit.from_counts([1, 1000]))
    logits, targets = torch.zeros(2, 2), torch.tensor([0, 1])
    with torch.inference_mode():
        criterion(logits, targets)
        criterion.split.tail_mask(targets)
    logits.requires_grad_()
    criterion(logits, targets).total.backward()
    assert logits.grad is not None and logits.grad.tolist() == [[-0.25, 0.25], [0.25, -0.25]]


def test_repr() -> None:
    assert repr(ClassSplit.from_counts([900, 60, 40], eta=60)) == (
        "ClassSplit(3 classes, 2 tail, tail_fraction=0.100)"
    )
    assert repr(ClassSplit.all_tail()) == "ClassSplit(any number of classes, 1 tail)"


# ---------------------------------------------------------------- refusals

ONES = torch.ones(3)

REFUSED: dict[str, tuple[Any, str]] = {
    "2-D plain": (lambda: ClassSplit(torch.ones(2, 3), ONES), "plain is torch.float32 (2, 3)"),
    "integer sharp": (lambda: ClassSplit(ONES, torch.ones(3, dtype=int)), "sharp is torch.int64"),
    "no class": (lambda: ClassSplit(ONES[:0], ONES[:0]), "plain is torch.float32 (0,)"),
    "negative plain": (lambda: ClassSplit(-ONES, ONES), "plain is tensor([-1., -1., -1.])"),
    "nan sharp": (lambda: ClassSplit(ONES, ONES * float("nan")), "sharp is tensor([nan"),
    "infinite sharp": (lambda: ClassSplit(ONES, ONES / 0), "sharp is tensor([inf"),
    "lengths": (lambda: ClassSplit(ONES, ONES[:2]), "plain has 3 classes and sharp 2"),
    "too few counts": (lambda: ClassSplit(ONES, ONES, [1, 2]), "counts has 2 classes, expected 3"),
    "no counts": (lambda: ClassSplit.from_counts([]), "counts is empty"),
    "float counts": (lambda: ClassSplit.from_counts([1.5, 2.0]), "counts is [1.5, 2.0]"),
    "float tensor": (lambda: ClassSplit.from_counts(ONES), "counts is torch.float32 (3,)"),
    "2-D counts": (lambda: ClassSplit.from_counts(torch.ones(2, 2, dtype=int)), "(2, 2)"),
    "negative count": (lambda: ClassSplit.from_counts([3, -1]), "counts holds -1"),
    "negative eta": (lambda: ClassSplit.from_counts([3], eta=-1), "eta is -1"),
    "nan eta": (lambda: ClassSplit.from_counts([3], eta=float("nan")), "eta is nan"),
    "ignored label": (lambda: ClassSplit.from_targets([0, -100]), "targets holds -100"),
    "label too large": (
        lambda: ClassSplit.from_targets([0, 7], num_classes=5),
        "targets holds label 7, expected labels below num_classes, which is 5",
    ),
    "float labels": (lambda: ClassSplit.from_targets(ONES), "targets is torch.float32"),
    "gamma": (lambda: ClassSplit.focal([3], gamma=-1, lam=0.5), "gamma is -1"),
    "lam": (lambda: ClassSplit.focal([3], gamma=1, lam=1.5), "lam is 1.5"),
    "nan lam": (lambda: ClassSplit.focal([3], gamma=1, lam=float("nan")), "lam is nan"),
    "focal without images": (lambda: ClassSplit.focal([0, 0], gamma=1, lam=0.5), "counts "),
    "other classes": (
        lambda: uneven().weights(5, torch.device("cpu"), torch.float32),
        "the split has 3 classes, expected 5 as in the logits",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)


def test_weights_that_require_gradients_are_not_kept() -> None:
    plain: Tensor = torch.ones(3, requires_grad=True)
    assert not ClassSplit(plain, ONES).plain.requires_grad


def test_changed_weights_are_seen() -> None:
    """As a schedule that re-weights later in training does."""
    split = ClassSplit.from_counts([200, 10])
    cpu = torch.device("cpu")
    labels = torch.tensor([0, 1])
    assert split.weights(2, cpu, torch.float32)[1].tolist() == [0, 1]
    split.sharp.fill_(3.0)
    assert split.weights(2, cpu, torch.float32)[1].tolist() == [3, 3]
    assert split.tail_mask(labels).tolist() == [True, True]
    split.sharp = torch.tensor([0.0, 5.0], dtype=torch.float64)
    assert split.weights(2, cpu, torch.float32)[1].tolist() == [0, 5]
    assert split.tail_mask(labels).tolist() == [False, True]


def test_a_split_made_in_inference_mode() -> None:
    with torch.inference_mode():
        split = ClassSplit.from_counts([200, 10])
    assert split.tail_mask(torch.tensor([0, 1])).tolist() == [False, True]


# ---------------------------------------------------------------- counts that are a mapping


LABELS = [0] * 500 + [2] * 40 + [1] * 300 + [3] * 10  # in the order of a file, not of the classes


class Series:
    """What pandas' value_counts() returns: keys, ordered by value, and iteration over values."""

    def __init__(self, counts: Counter) -> None:
        self.counts = dict(counts.most_common())

    def keys(self) -> Any:
        return self.counts.keys()

    def items(self) -> Any:
        return self.counts.items()

    def __iter__(self) -> Any:
        return iter(self.counts.values())


@pytest.mark.parametrize("kind", [Counter, lambda labels: dict(Counter(labels)),
                                  lambda labels: Series(Counter(labels))])  # fmt: skip
def test_a_mapping_is_read_by_its_keys(kind: Any) -> None:
    counts = kind(LABELS)
    for split in (ClassSplit.from_counts(counts), ClassSplit.focal(counts, 1, 0.5),
                  ClassSplit(torch.ones(4), torch.ones(4), counts)):  # fmt: skip
        assert split.counts is not None and split.counts.tolist() == [500, 300, 40, 10]
    assert ClassSplit.from_counts(counts).sharp.tolist() == [0, 0, 1, 1]
    longer = ClassSplit.from_counts(counts, num_classes=6)
    assert longer.counts is not None and longer.counts.tolist() == [500, 300, 40, 10, 0, 0]
    assert ClassSplit.focal(counts, 1, 0.5, num_classes=6).num_classes == 6


def test_labels_may_be_counted_already() -> None:
    for targets in (LABELS, Counter(LABELS), torch.tensor(LABELS)):
        split = ClassSplit.from_targets(targets, num_classes=5)
        assert split.counts is not None and split.counts.tolist() == [500, 300, 40, 10, 0]


@pytest.mark.parametrize("take", [ClassSplit.from_counts, ClassSplit.from_targets,
                                  lambda c: ClassSplit.focal(c, 1, 0.5)])  # fmt: skip
@pytest.mark.parametrize(
    "counts",
    [{500, 3}, frozenset([1]), Counter(LABELS).keys(), Counter(LABELS).values(), b"ab", "12"],
)
def test_what_has_no_order_of_classes_is_refused(take: Any, counts: Any) -> None:
    with pytest.raises(
        TypeError, match=f"is {type(counts).__name__}, expected integers in the ord"
    ):
        take(counts)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({-100: 3, 0: 2}, "keys holds -100"),
        ({"cat": 3}, "keys is"),
        ({0: 1.5}, "values is"),
        ({}, "keys is empty"),
        ({7: 3}, "has class 7, expected classes below 4"),
        (Counter(torch.tensor([1, 1])), "has class 1 twice"),  # tensors are each a key of their own
        ([1, 2], "has 2 classes, expected 4"),
    ],
)
def test_mappings_that_are_no_counts(counts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassSplit.from_counts(counts, num_classes=4)


@pytest.mark.parametrize(
    ("counts", "message"),
    [([500, 300], "no class is tail: eta is 100, the smallest class has 300 images.*one of SGD"),
     ([50, 3], "no class is head: eta is 100, the largest class has 50 images.*one of SAM")],
)  # fmt: skip
def test_a_split_with_one_part_warns_once_with_the_numbers(counts: Any, message: str) -> None:
    labels = [k for k, n in enumerate(counts) for _ in range(n)]
    for make in (lambda: ClassSplit.from_counts(counts), lambda: ClassSplit.from_targets(labels)):
        with pytest.warns(UserWarning, match=message) as found:
            make()
        assert len(found) == 1 and found[0].filename == __file__


def test_no_warning_where_one_part_is_what_was_asked_for() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClassSplit.from_counts([500, 300], eta=0)
        ClassSplit.from_counts([5, 3], eta=float("inf"))
        ClassSplit.from_counts([500, 3])
        ClassSplit.none(), ClassSplit.all_tail(), ClassSplit.focal([5, 3], 1, 0.5)


def test_splits_are_made_on_the_cpu_whatever_the_default_device() -> None:
    labels = [0] * 5 + [1] * 500
    with torch.device("meta"):
        splits = [ClassSplit.from_counts([5, 500]), ClassSplit.from_targets(labels)]
        splits += [ClassSplit.none(), ClassSplit.all_tail()]
    assert {split.plain.device.type for split in splits} == {"cpu"}

"""TrainStep against Algorithm 1 of the paper, and its plans against each other."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from networks import COUNTS, LR, MOMENTUM, RHO, WEIGHT_DECAY, batches, distance, imbsam, network
from torch import Tensor, nn

import imbsam_fast
from imbsam_fast import ClassSplit, SplitCrossEntropy, TrainStep, split_loss
from imbsam_fast.ops import dispatch
from imbsam_fast.training.auto_plan import split_is_cheaper
from imbsam_fast.training.batch_norm import has_batch_statistics
from imbsam_fast.training.rows import Rows

pytestmark = pytest.mark.usefixtures("one_thread")


def algorithm_1(model: nn.Module, data: Iterator[tuple[Tensor, Tensor]]) -> None:
    """The paper's Algorithm 1 line by line, with momentum, on the model's own parameters."""
    theta = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in theta]
    tail_classes = [k for k, n in enumerate(COUNTS) if n <= 100]
    for x, y in data:
        in_tail = torch.tensor([int(label) in tail_classes for label in y])
        log_p = torch.log_softmax(model(x), dim=1)
        loss = -log_p[torch.arange(len(y)), y]
        head, tail = loss[~in_tail].sum() / len(y), loss[in_tail].sum() / len(y)
        g_h = torch.autograd.grad(head, theta, retain_graph=True)
        g_t = torch.autograd.grad(tail, theta)
        norm = torch.sqrt(sum((g**2).sum() for g in g_t))
        eps = [RHO * g / (norm + 1e-16) for g in g_t]
        with torch.no_grad():
            for p, e in zip(theta, eps):
                p += e
        statistics = copy.deepcopy(list(model.buffers()))
        log_p = torch.log_softmax(model(x), dim=1)
        loss = -log_p[torch.arange(len(y)), y]
        g_p = torch.autograd.grad(loss[in_tail].sum() / len(y), theta)
        for buffer, kept in zip(model.buffers(), statistics):
            buffer.copy_(kept)
        with torch.no_grad():
            for p, e, v, h, q in zip(theta, eps, velocity, g_h, g_p):
                p -= e
                v.copy_(MOMENTUM * v + (q + h + WEIGHT_DECAY * p))
                p -= LR * v


def trained(norm: str, data: Iterator[tuple[Tensor, Tensor]], dtype=torch.float64, **settings):
    model = network(norm, dtype)
    step = TrainStep(
        model, SplitCrossEntropy(ClassSplit.from_counts(COUNTS)), imbsam(model), **settings
    )
    for images, targets in data:
        step(images, targets)
    return model


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_100_joint_steps_agree_with_algorithm_1(backend):
    expected = network("batch")
    algorithm_1(expected, batches(100))
    with dispatch.use_backend(backend):
        model = trained("batch", batches(100), plan="joint")
    assert distance(model, network("batch")) > 0.1
    assert distance(model, expected) < 1e-10


def test_native_agrees_with_the_reference_in_float32():
    models = []
    for backend in ("native", "reference"):
        with dispatch.use_backend(backend):
            models.append(trained("batch", batches(50, torch.float32), torch.float32))
    assert distance(*models) < 2e-5


@pytest.mark.parametrize("norm", ["group", "none"])
def test_split_agrees_with_joint_where_rows_are_independent(norm):
    joint = trained(norm, batches(50), plan="joint")
    split = trained(norm, batches(50), plan="split")
    assert distance(joint, split) < 1e-12


def test_split_normalises_each_part_alone_under_batch_norm():
    joint = trained("batch", batches(10), plan="joint")
    split = trained("batch", batches(10), plan="split")
    assert distance(joint, split) > 1e-3


@pytest.mark.parametrize(
    "split",
    [
        ClassSplit.all_tail(),
        ClassSplit.none(),
        ClassSplit.focal(COUNTS, gamma=2.0, lam=0.8),
        ClassSplit(torch.zeros(10), torch.tensor([1.0] * 5 + [3.0] * 5)),
    ],
    ids=["sam", "sgd", "focal-sam", "re-weighted-sam"],
)
def test_plans_agree_for_the_whole_family(split):
    results = []
    for plan in ("joint", "split"):
        model = network("group")
        step = TrainStep(model, SplitCrossEntropy(split), imbsam(model), plan=plan)
        seen = [step(x, y) for x, y in batches(10)]
        results.append((model, seen))
    (joint, from_joint), (split_model, from_split) = results
    assert distance(joint, split_model) < 1e-12
    for a, b in zip(from_joint, from_split):
        for x, y in zip(a, b):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_no_tail_class_is_plain_sgd():
    model, expected = network(), network()
    step = TrainStep(model, SplitCrossEntropy(ClassSplit.none()), imbsam(model))
    sgd = torch.optim.SGD(expected.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
    for x, y in batches(20):
        result = step(x, y)
        sgd.zero_grad()
        loss = F.cross_entropy(expected(x), y)
        loss.backward()
        sgd.step()
        torch.testing.assert_close(result.loss, loss.detach())
    assert distance(model, expected) < 1e-12


@pytest.mark.parametrize("plan", ["joint", "split"])
def test_ignored_rows_count_nowhere(plan):
    """A batch with ignored rows equals the batch without them."""
    model, expected = network("group"), network("group")
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    step = TrainStep(model, criterion, imbsam(model), plan=plan)
    without = TrainStep(expected, criterion, imbsam(expected), plan="joint")
    for x, y in batches(5):
        ignored = y.clone()
        ignored[::3] = -100
        result, other = step(x, ignored), without(x[ignored >= 0], y[ignored >= 0])
        torch.testing.assert_close(result.loss, other.loss)
        assert result.logits.shape == (16, 10)
    assert distance(model, expected) < 1e-12


@pytest.mark.parametrize("plan", ["joint", "split"])
def test_result_is_the_unperturbed_forward_in_batch_order(plan):
    model = network("group")
    expected = copy.deepcopy(model)
    step = TrainStep(
        model, SplitCrossEntropy(ClassSplit.from_counts(COUNTS)), imbsam(model), plan=plan
    )
    x, y = next(batches(1))
    result = step(x, y)
    logits = expected(x)
    losses = F.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(result.logits, logits.detach())
    torch.testing.assert_close(result.head, losses[y < 5].sum() / 16)
    torch.testing.assert_close(result.tail, losses[y >= 5].sum() / 16)
    torch.testing.assert_close(result.loss, losses.mean())
    assert not any(t.requires_grad for t in result if isinstance(t, Tensor))


class CountRows(nn.Module):
    """Records how many rows every forward pass takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.model(x)


@pytest.mark.parametrize(
    ("plan", "labels", "rows"),
    [
        ("joint", [0, 1, 8, 9], [4, 4]),
        ("joint", [0, 1, 2, 3], [4]),
        ("joint", [6, 7, 8, 9], [4, 4]),
        ("split", [0, 1, 2, 9], [3, 1, 1]),
        ("split", [0, 1, 2, 3], [4]),
        ("split", [6, 7, 8, 9], [4, 4]),
    ],
)
def test_passes_of_each_plan(plan, labels, rows):
    model = CountRows(network("group"))
    step = TrainStep(
        model, SplitCrossEntropy(ClassSplit.from_counts(COUNTS)), imbsam(model), plan=plan
    )
    step(torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.tensor(labels))
    assert model.rows == rows


def test_auto_takes_split_unless_the_batch_is_normalised():
    assert has_batch_statistics(network("batch"))
    assert not has_batch_statistics(network("group"))
    assert not has_batch_statistics(network("batch").eval())
    untracked = nn.BatchNorm2d(8, track_running_stats=False).eval()
    assert has_batch_statistics(untracked)

    for norm, rows in (("batch", [4, 4]), ("group", [3, 1, 1])):
        model = CountRows(network(norm))
        step = TrainStep(model, SplitCrossEntropy(ClassSplit.from_counts(COUNTS)), imbsam(model))
        step(torch.randn(4, 3, 99, 99, dtype=torch.float64), torch.tensor([0, 1, 2, 9]))
        assert model.rows == rows


def test_auto_takes_joint_where_passes_cost_more_than_rows():
    model = CountRows(network("group"))
    step = TrainStep(model, SplitCrossEntropy(ClassSplit.from_counts(COUNTS)), imbsam(model))
    step(torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 9]))
    assert model.rows == [4, 1]


def test_the_perturbed_pass_of_auto_needs_the_tail_rows_alone():
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    found = []
    for plan in ("auto", "joint"):
        model = network("group")
        step = TrainStep(CountRows(model), criterion, imbsam(model), plan)
        for x, y in batches(10):
            step(x, y)
        found.append(model)
        rows = step.model.rows
        assert len(rows) > 10 and (set(rows) == {16}) == (plan == "joint")
    assert distance(*found) < 1e-12


@pytest.mark.parametrize("needed", ["the same dropout", "a compiled model"])
def test_the_perturbed_pass_of_auto_has_all_rows_where_they_are_needed(needed):
    torch._dynamo.reset()
    model = CountRows(network("group"))
    made = torch.compile(model, backend="eager") if "compiled" in needed else model
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    step = TrainStep(made, criterion, imbsam(model), same_dropout="dropout" in needed)
    step(torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 9]))
    assert model.rows == [4, 4]


@pytest.mark.parametrize(
    ("model", "rows", "tail_rows", "shape", "is_cheaper"),
    [
        ("DevNet", 128, 64, (512,), False),
        ("GroupNorm ResNet", 128, 56, (3, 32, 32), True),
        ("LayerNorm ViT", 128, 56, (3, 32, 32), True),
        ("LayerNorm ViT", 128, 128, (3, 32, 32), True),
    ],
)
def test_auto_takes_what_was_faster_where_both_plans_were_timed(
    model, rows, tail_rows, shape, is_cheaper
):
    from benchmarks.bench_step import NETWORKS
    from imbsam_fast.recipes.anomaly.networks import Scorer

    made = Scorer(shape[0]) if model == "DevNet" else NETWORKS[model][0](100)
    tail = torch.arange(rows) < tail_rows
    parts = Rows(~tail, tail, rows - tail_rows, tail_rows, rows)
    assert split_is_cheaper(made, torch.zeros(rows, *shape), parts, tail_rows) == is_cheaper


@pytest.mark.parametrize("plan", ["joint", "split"])
@pytest.mark.parametrize("split", ["from_counts", "all_tail"])
def test_per_sample_losses_ignore_rows_as_cross_entropy_does(plan, split):
    x, y = next(batches(1))
    y[::3] = -100
    split = ClassSplit.all_tail() if split == "all_tail" else ClassSplit.from_counts(COUNTS)
    per_sample = functools.partial(F.cross_entropy, reduction="none")
    ends = []
    for criterion in (split_loss(per_sample, split), SplitCrossEntropy(split)):
        model = network("group")
        result = TrainStep(model, criterion, imbsam(model), plan)(x, y)
        ends.append((model, result))
    assert distance(ends[0][0], ends[1][0]) < 1e-12
    for a, b in zip(ends[0][1], ends[1][1]):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("lam", "rows"), [(1.0, [16, 16]), (0.5, [16, 16])])
def test_auto_takes_the_cheaper_plan(lam, rows):
    """A row with both weights is in all three passes of the split plan: joint is cheaper."""
    model = CountRows(network("group"))
    criterion = SplitCrossEntropy(ClassSplit.focal(COUNTS, 0.0, lam))
    x, y = next(batches(1))
    TrainStep(model, criterion, imbsam(model), "auto")(x, y)
    assert model.rows == rows


def test_any_per_sample_loss_is_a_criterion():
    def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - F.one_hot(targets, 10)).square().sum(1)

    models = []
    for plan in ("joint", "split"):
        model = network("group")
        criterion = imbsam_fast.split_loss(squared_error, ClassSplit.from_counts(COUNTS))
        step = TrainStep(model, criterion, imbsam(model), plan=plan)
        losses = [float(step(x, y).loss) for x, y in batches(20)]
        assert losses[-1] < losses[0]
        models.append(model)
    assert distance(*models) < 1e-12

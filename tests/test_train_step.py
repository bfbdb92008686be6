"""TrainStep against Algorithm 1 of the paper, and its plans against each other."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import imbsam_fast
from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep, dispatch
from imbsam_fast.train_step import has_batch_statistics

pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS = [500, 300, 200, 150, 120, 100, 50, 20, 10, 5]  # eta = 100: five head, five tail
LR, MOMENTUM, WEIGHT_DECAY, RHO = 0.05, 0.9, 5e-3, 0.05


def network(norm: str = "batch", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    norms = {"batch": nn.BatchNorm2d(8), "group": nn.GroupNorm(2, 8), "none": nn.Identity()}
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        norms[norm],
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    ).to(dtype)


def batches(steps: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    """Random images; every fifth batch has no tail row, every seventh no head row."""
    generator = torch.Generator().manual_seed(1)
    for i in range(steps):
        images = torch.randn(16, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
        low, high = (0, 5) if i % 5 == 4 else (5, 10) if i % 7 == 6 else (0, 10)
        yield images, torch.randint(low, high, (16,), generator=generator)


def imbsam(model: nn.Module, **settings) -> ImbSAM:
    base = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
    return ImbSAM(base, rho=RHO, **settings)


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


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values())
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs)


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
    assert not any(t.requires_grad for t in result)


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


@pytest.mark.parametrize(("policy", "updates"), [("once", 1), ("twice", 2)])
def test_batch_norm_statistics(policy, updates):
    model = network("batch")
    step = TrainStep(
        model, SplitCrossEntropy(ClassSplit.from_counts(COUNTS)), imbsam(model), batch_norm=policy
    )
    x, y = next(batches(1))
    step(x, y)
    assert model[1].num_batches_tracked == updates
    assert model[1].track_running_stats


def test_statistics_are_tracked_again_after_a_failure():
    model = network("batch")
    outer_mean = model[1].running_mean.clone()
    with pytest.raises(KeyError), imbsam_fast.frozen_batch_norm_statistics(model):
        with imbsam_fast.frozen_batch_norm_statistics(model):
            model(torch.randn(4, 3, 6, 6, dtype=torch.float64))
        model(torch.randn(4, 3, 6, 6, dtype=torch.float64))
        raise KeyError
    assert torch.equal(model[1].running_mean, outer_mean)
    model(torch.randn(4, 3, 6, 6, dtype=torch.float64))
    assert not torch.equal(model[1].running_mean, outer_mean)


def test_auto_takes_split_unless_the_batch_is_normalised():
    assert has_batch_statistics(network("batch"))
    assert not has_batch_statistics(network("group"))
    assert not has_batch_statistics(network("batch").eval())
    untracked = nn.BatchNorm2d(8, track_running_stats=False).eval()
    assert has_batch_statistics(untracked)

    for norm, rows in (("batch", [4, 4]), ("group", [3, 1, 1])):
        model = CountRows(network(norm))
        step = TrainStep(model, SplitCrossEntropy(ClassSplit.from_counts(COUNTS)), imbsam(model))
        step(torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 9]))
        assert model.rows == rows


class FailsAtCall(nn.Module):
    def __init__(self, model: nn.Module, call: int, error: type[BaseException]) -> None:
        super().__init__()
        self.model, self.call, self.error, self.calls = model, call, error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.call:
            raise self.error("injected")
        return self.model(x)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(("plan", "call"), [("joint", 2), ("split", 2), ("split", 3)])
def test_a_failed_pass_leaves_the_weights_bit_for_bit(plan, call, error):
    model = FailsAtCall(network("group", torch.float32), call, error)
    optimizer = imbsam(model)
    step = TrainStep(model, SplitCrossEntropy(ClassSplit.from_counts(COUNTS)), optimizer, plan=plan)
    before = copy.deepcopy(model.state_dict())
    x, y = next(batches(1, torch.float32))
    with pytest.raises(error, match="injected"):
        step(x, y)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not optimizer.is_perturbed and not optimizer.state
    assert all(p.grad is None for p in model.parameters())
    result = step(x, y)  # and the next step works
    assert result.loss.isfinite()
    assert not torch.equal(before["model.0.weight"], model.model[0].weight)


def test_stale_gradients_do_not_leak_into_the_step():
    model, expected = network(), network()
    x, y = next(batches(1))
    for m in (model, expected):
        step = TrainStep(m, SplitCrossEntropy(ClassSplit.from_counts(COUNTS)), imbsam(m))
        if m is model:
            m(x).sum().backward()
            m[1].load_state_dict(network()[1].state_dict())
        step(x, y)
    assert distance(model, expected) == 0


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = network("group")
        self.bias = nn.Linear(2, 10).double()

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.features(inputs["image"]) + self.bias(inputs["place"])


def test_inputs_may_be_a_pytree():
    results = []
    for plan in ("joint", "split"):
        torch.manual_seed(0)
        model = TwoInputs()
        step = TrainStep(
            model, SplitCrossEntropy(ClassSplit.from_counts(COUNTS)), imbsam(model), plan=plan
        )
        for x, y in batches(3):
            results.append(step({"image": x, "place": x[:, 0, 0, :2]}, y))
    for a, b in zip(results[:3], results[3:]):
        torch.testing.assert_close(a.logits, b.logits)


def test_the_split_plan_keeps_channels_last():
    seen = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return x

    model = nn.Sequential(Watch(), network("group"))
    step = TrainStep(model, SplitCrossEntropy(ClassSplit.from_counts(COUNTS)), imbsam(model))
    x, y = next(batches(1))
    step(x.to(memory_format=torch.channels_last), y)
    assert seen == [True] * 3


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


def test_unusable_arguments_are_named():
    model = network()
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    optimizer = imbsam(model)
    with pytest.raises(TypeError, match="optimizer is SGD, expected an ImbSAM"):
        TrainStep(model, criterion, optimizer.base)
    with pytest.raises(TypeError, match=r"criterion is CrossEntropyLoss, expected .*\.split"):
        TrainStep(model, nn.CrossEntropyLoss(), optimizer)
    with pytest.raises(ValueError, match="plan is 'both', expected one of auto, joint, split"):
        TrainStep(model, criterion, optimizer, plan="both")
    with pytest.raises(ValueError, match="batch_norm is 'never', expected one of once, twice"):
        TrainStep(model, criterion, optimizer, batch_norm="never")

    step = TrainStep(model, criterion, optimizer)
    x, y = next(batches(1))
    for inputs, targets, message in (
        (x[:3], y, r"inputs holds a tensor of shape \(3, 3, 6, 6\), expected 16 rows"),
        (x, y.double(), r"targets is torch.float64 \(16,\), expected int64 labels \(N,\)"),
        (x, F.one_hot(y, 10), r"targets is torch.int64 \(16, 10\), expected int64 labels"),
        (x[:0], y[:0], "targets is empty"),
        ("images", y, "inputs is str, expected a tensor or a pytree"),
        (x, y.tolist(), "targets is list, expected int64 labels"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            step(inputs, targets)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

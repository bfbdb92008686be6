"""TrainStep with all sorts of models, inputs and outputs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import COUNTS, batches, distance, imbsam, network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import imbsam_fast
from imbsam_fast import ClassSplit, SplitCrossEntropy, TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_instance_norm_statistics_are_frozen_too():
    model = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True)).double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    with imbsam_fast.frozen_batch_norm_statistics(model):
        frozen = model(x)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert torch.equal(model(x), frozen)
    assert not torch.equal(model[0].running_mean, before["0.running_mean"])


def test_a_gradient_that_stood_before_the_step_is_refused_and_stays():
    """Neither dropped nor counted without a word."""
    model = network()
    x, y = next(batches(1))
    optimizer, criterion = imbsam(model), SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    step = TrainStep(model, criterion, optimizer)
    model(x).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    for attempt in (lambda: step(x, y), lambda: optimizer.step(lambda: criterion(model(x), y))):
        with pytest.raises(RuntimeError, match="parameter 0 has a gradient before a"):
            attempt()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(map(torch.equal, (p.grad for p in model.parameters()), gradients))
    optimizer.zero_grad()
    step(x, y)


class Wrapper(torch.optim.Optimizer):
    """Holds the optimizer as those of Accelerate and Lightning do, and is neither's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_an_unknown_wrapper_is_refused():
    """Its own step() would never run; test_wrappers.py has those that are known."""
    model = network()
    optimizer = imbsam(model)
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    with pytest.raises(TypeError, match="optimizer is Wrapper around an ImbSAM"):
        TrainStep(model, criterion, Wrapper(optimizer))
    with pytest.raises(TypeError, match="optimizer is Wrapper, expected an ImbSAM"):
        TrainStep(model, criterion, Wrapper(optimizer.base))


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
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    step = TrainStep(model, criterion, imbsam(model), "split")
    x, y = next(batches(1))
    step(x.to(memory_format=torch.channels_last), y)
    assert seen == [True] * 3


def test_a_step_in_the_middle_of_another_is_refused():
    model = network("group")
    optimizer = imbsam(model)
    x, y = next(batches(1))
    model(x).sum().backward()
    optimizer.first_step()
    step = TrainStep(model, SplitCrossEntropy(ClassSplit.from_counts(COUNTS)), optimizer)
    with pytest.raises(RuntimeError, match="a training step in the middle of a step, where a grad"):
        step(x, y)
    optimizer.restore()
    step(x, y)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_with_batch_norm(reentrant):
    """The model runs again in every backward; the perturbed one still updates no statistics."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = network()

        def forward(self, x):
            return checkpoint(self.model, x.requires_grad_(), use_reentrant=reentrant)

    model, plain = Checkpointed(), network()
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    x, y = next(batches(1))
    TrainStep(plain, criterion, imbsam(plain), "joint")(x, y)
    TrainStep(model, criterion, imbsam(model), "joint")(x, y)
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    assert model.model[1].num_batches_tracked == 3  # the forward, and one for each backward


@pytest.mark.filterwarnings("ignore")
def test_batch_norm_inside_torchscript_is_refused():
    model = torch.jit.trace(network(dtype=torch.float32), torch.randn(2, 3, 6, 6))
    with pytest.raises(TypeError, match="model has a BatchNorm2d inside TorchScript"):
        TrainStep(model, SplitCrossEntropy(ClassSplit.all_tail()), imbsam(model))


class TwoOutputs(nn.Module):
    """The logits, and what may stand beside them."""

    def __init__(self, other):
        super().__init__()
        self.linear = nn.Linear(4, 10)
        self.other = other

    def forward(self, x):
        return {"logits": self.linear(x), "other": self.other(x)}


class OfLogits(SplitCrossEntropy):
    def forward(self, outputs, targets, batch_size=None):
        return super().forward(outputs["logits"], targets, batch_size)


def test_outputs_beside_the_logits():
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.arange(8)
    criterion = OfLogits(ClassSplit.from_counts(COUNTS))

    def run(other, plan):
        model = TwoOutputs(other)
        return model, TrainStep(model, criterion, imbsam(model), plan)

    for other in (lambda x: None, lambda x: 2 * x):
        for plan in ("joint", "split"):
            _, step = run(other, plan)
            expected = other(x)
            found = step(x, y).logits["other"]
            assert found is None if expected is None else torch.equal(found, expected)
    torch.manual_seed(0)
    model, step = run(lambda x: x.square().mean(), "joint")
    step.micro_batch_size = 3
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="zero-dimensional"):
        step(x, y)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    model, step = run(lambda x: x.square().mean(), "split")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"outputs hold tensors of shape \(\) for 5 rows.*joint"):
        step(x, y)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    run(lambda x: x.square().mean(), "joint")[1](x, y)


def test_the_split_plan_takes_sparse_rows_and_refuses_gradients_for_inputs():
    torch.manual_seed(0)
    x, y = torch.randn(8, 4).relu(), torch.arange(8)
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    ends = []
    for inputs in (x, x.to_sparse()):
        torch.manual_seed(0)
        model = nn.Linear(4, 10)
        TrainStep(model, criterion, imbsam(model), "split")(inputs, y)
        ends.append(model)
    assert distance(*ends) < 1e-6
    with pytest.raises(ValueError, match="inputs requires a gradient, expected none"):
        TrainStep(model, criterion, imbsam(model), "split")(x.requires_grad_(), y)


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
        (x[:0], y[:0], "targets is empty"),
        ("images", y, "inputs is str, expected a tensor or a pytree"),
        (x, y.tolist(), "targets is list, expected int64 labels"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            step(inputs, targets)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    # They could be dense labels: only the logits say that they are not.
    with pytest.raises(
        ValueError, match=r"targets is torch.int64 \(16, 10\), expected torch.int64"
    ):
        step(x, F.one_hot(y, 10))

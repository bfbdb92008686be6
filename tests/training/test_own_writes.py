"""Models that change under their own forward: their buffers, and inputs that they overwrite."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import COUNTS, RHO, batches, distance, imbsam, network
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.training.batch_norm import has_batch_statistics

SPLIT = ClassSplit.from_counts(COUNTS)


class OwnStatistics(nn.Module):
    """Normalises by the batch's own variance, and keeps a running one, as EvoNorm B0 does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.ones(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x / self.running.sqrt()[:, None, None]
        variance = x.var((0, 2, 3))
        with torch.no_grad():
            self.running.lerp_(variance, 0.1)
        return x / variance.sqrt()[:, None, None]


class Replaced(nn.Module):
    """A running mean that is a new tensor after every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        return x - self.mean[:, None, None]


class FunctionalBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))
        self.register_buffer("var", torch.ones(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=self.training)


class Observer(nn.Module):
    """An observer of quantisation per channel: its buffers grow at the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.empty(0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        low = x.detach().amin((0, 2, 3))
        if self.low.numel() == 0:
            self.low.resize_(8).copy_(low)
        self.low.copy_(torch.minimum(self.low, low))
        return x.clamp(min=self.low.mean())


def with_layer(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        found = network("none")
        found[1] = make()
        return found

    return model


def with_normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        found = network("none")
        found[-1] = norm(found[-1])
        return found

    return model


def instance_norm() -> nn.Module:
    return nn.InstanceNorm2d(8, track_running_stats=True).double()


MODELS = {
    "own statistics": with_layer(OwnStatistics),
    "replaced buffer": with_layer(Replaced),
    "functional batch norm": with_layer(FunctionalBatchNorm),
    "observer": with_layer(Observer),
    "instance norm": with_layer(instance_norm),
    "spectral norm": with_normed(spectral_norm),
    "spectral norm as a parametrisation": with_normed(parametrizations.spectral_norm),
}


def step_of(model: nn.Module, **settings) -> TrainStep:
    return TrainStep(model, SplitCrossEntropy(SPLIT), imbsam(model), **settings)


def reference_step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One step of SGD without momentum or decay at learning rate 1, by hand, buffers fed once."""
    in_tail = SPLIT.tail_mask(y)
    theta = list(model.parameters())

    def losses() -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(model(x), y, reduction="none")
        return loss[~in_tail].sum() / len(y), loss[in_tail].sum() / len(y)

    head, tail = losses()
    g_h = torch.autograd.grad(head, theta, retain_graph=True)
    g_t = torch.autograd.grad(tail, theta)
    norm = torch.sqrt(sum(g.square().sum() for g in g_t))
    before = [p.detach().clone() for p in theta]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with torch.no_grad():
        for p, g in zip(theta, g_t):
            p += RHO * g / norm
    g_p = torch.autograd.grad(losses()[1], theta)
    with torch.no_grad():
        for p, start, h, g in zip(theta, before, g_h, g_p):
            p.copy_(start - (h + g))
        for name, b in model.named_buffers():
            b.copy_(buffers[name])


# What these make of a batch does not depend on what earlier passes left in their buffers.
OF_THE_BATCH = ("own statistics", "functional batch norm", "observer", "instance norm")


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        *((name, plan) for name in MODELS for plan in ("auto", "joint")),
        *((name, "sampled") for name in OF_THE_BATCH),
    ],
)
def test_buffers_are_fed_once_and_auto_is_joint(name, plan):
    """Also in the first step, which finds out; a sample of all rows is the joint plan too."""
    model, expected = MODELS[name](), MODELS[name]()
    optimizer = ImbSAM(torch.optim.SGD(model.parameters(), 1.0), rho=RHO)
    sample = {"sample": 1.0} if plan == "sampled" else {}
    step = TrainStep(model, SplitCrossEntropy(SPLIT), optimizer, plan, **sample)
    for x, y in list(batches(4)):  # all of them with both parts
        step(x, y)
        reference_step(expected, x, y)
        assert distance(model, expected) < 1e-10


def test_the_pass_that_finds_out_is_as_if_it_had_not_been():
    """Random numbers included: a resumed run finds out anew, and takes the same steps."""
    ends = []
    for plan in ("auto", "joint"):
        model = with_layer(lambda: nn.Sequential(nn.Dropout(), OwnStatistics()))()
        step = step_of(model, plan=plan)
        torch.manual_seed(3)
        for x, y in batches(3):
            step(x, y)
        ends.append((model, torch.rand(1)))
    assert distance(ends[0][0], ends[1][0]) == 0
    assert ends[0][1] == ends[1][1]


def rows_of(model: nn.Module) -> list[int]:
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


@pytest.mark.usefixtures("large_network")
def test_buffers_that_stay_as_they_are_leave_auto_with_the_split_plan():
    model = network("none")
    model.register_buffer("table", torch.arange(100))
    model.register_buffer("written_to", torch.ones(3))

    def writes_the_same(m, _) -> None:
        m.written_to.fill_(1)

    model.register_forward_pre_hook(writes_the_same)
    rows, y = rows_of(model), torch.tensor([0, 1, 2, 9])
    step_of(model)(torch.randn(4, 3, 6, 6, dtype=torch.float64), y)
    assert rows == [3, 1, 1]


@pytest.mark.usefixtures("large_network")
def test_a_layer_that_begins_to_write_later_is_noticed_then():
    model = with_layer(OwnStatistics)().eval()
    rows, y = rows_of(model), torch.tensor([0, 1, 2, 9])
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    step = step_of(model)
    step(x, y)
    model.train()
    expected = copy.deepcopy(model)
    step(x, y)
    step(x, y)
    assert rows == [3, 1, 1, 3, 4, 4, 4, 4]
    joint = step_of(expected, plan="joint")
    joint.optimizer.load_state_dict(step.optimizer.state_dict())
    joint(x, y)
    assert model[1].running.ne(1).all()
    assert not torch.equal(expected[1].running, torch.ones(8))


@pytest.mark.parametrize("batch_norm", ["once", "twice"])
def test_twice_feeds_buffers_in_both_passes(batch_norm):
    counts = {"once": 1, "twice": 2}[batch_norm]
    model = with_layer(Replaced)()
    passes: list[int] = []
    model[1].register_forward_hook(lambda m, *_: passes.append(id(m.mean)))
    step = step_of(model, batch_norm=batch_norm, plan="joint")
    x, y = next(batches(1))
    mean = model[0](x).detach().mean((0, 2, 3))
    step(x, y)
    assert len(passes) == 2
    fed = (model[1].mean / mean).mean()
    expected = 0.1 if counts == 1 else 0.19
    assert abs(float(fed) - expected) < 0.02


def test_an_overflow_reaches_no_buffer_under_twice():
    model = with_layer(OwnStatistics)()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    step = step_of(model, batch_norm="twice", grad_scaler=scaler)
    data = list(batches(2))
    step(*data[0])
    before = copy.deepcopy(model.state_dict())
    model[-1].weight.register_hook(lambda g: g * torch.inf)
    step(*data[1])
    assert torch.equal(model[0].weight, before["0.weight"])  # skipped
    variance = model[0](data[1][0]).detach().var((0, 2, 3))
    torch.testing.assert_close(
        model[1].running, before["1.running"].lerp(variance, 0.1), rtol=1e-12, atol=0
    )


class KeepsPrior(nn.Module):
    """A criterion that estimates the classes' shares as it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.split, self.loss = SPLIT, SplitCrossEntropy(SPLIT)
        self.register_buffer("shares", torch.full((10,), 0.1, dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor, batch_size: int | None = None):
        if self.training:
            self.shares.lerp_(torch.bincount(targets, minlength=10).double() / len(targets), 0.1)
        return self.loss(outputs + self.shares.log(), targets, batch_size)


def test_a_criterion_with_buffers_is_fed_once_too():
    model, criterion = network("none"), KeepsPrior()
    rows = rows_of(model)
    step = TrainStep(model, criterion, imbsam(model))
    x, y = next(batches(1))
    step(x, y)
    assert rows[-2:] == [16, 16]
    expected = torch.full((10,), 0.1, dtype=torch.float64).lerp(
        torch.bincount(y, minlength=10).double() / 16, 0.1
    )
    assert torch.equal(criterion.shares, expected)


def test_quantisation_aware_training_observes_once():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

        fake = FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    model = network("none", torch.float32)
    model[1] = fake
    expected = copy.deepcopy(fake)
    step = step_of(model)
    for x, y in batches(3, torch.float32):
        expected(model[0](x).detach())
        step(x, y)
        assert torch.equal(fake.activation_post_process.min_val,
                           expected.activation_post_process.min_val)  # fmt: skip
        assert torch.equal(fake.scale, expected.scale)


# ---------------------------------------------------------------- inputs


class Writes(nn.Module):
    """Prepares its images in place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x) -> Tensor:
        images = x["images"] if isinstance(x, dict) else x
        return self.model(images.sub_(0.5).div_(0.5))


@pytest.mark.parametrize("plan", ["auto", "joint", "split"])
@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_inputs_written_to_are_refused_by_name(plan, as_dict, micro_batch_size):
    model = Writes(network("group"))
    before = copy.deepcopy(model.state_dict())
    x, y = next(batches(1))
    optimizer = imbsam(model)
    step = TrainStep(
        model, SplitCrossEntropy(SPLIT), optimizer, plan, micro_batch_size=micro_batch_size
    )
    with pytest.raises(RuntimeError, match=r"the model wrote to inputs, a tensor of shape \(\d+,"):
        step({"images": x, "width": 3} if as_dict else x, y)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not optimizer.state and not optimizer.is_perturbed


def test_inputs_that_are_read_once_may_be_written_to():
    """A batch without tail rows has one pass, as plain SGD has."""
    model, expected = Writes(network("group")), network("group")
    x, y = next(batches(1))
    y %= 5
    step_of(expected)((x - 0.5) / 0.5, y)
    step_of(model)(x.clone(), y)
    assert distance(model.model, expected) < 1e-12


def test_targets_written_to_are_refused_by_name():
    class Shifts(KeepsPrior):
        def forward(self, outputs, targets, batch_size=None):
            return self.loss(outputs, targets.clamp_(max=8), batch_size)

    model = network("group")
    x, y = next(batches(1))
    y[0] = 9
    with pytest.raises(RuntimeError, match="the criterion wrote to targets"):
        TrainStep(model, Shifts(), imbsam(model), "joint")(x, y)


def test_instance_norm_without_running_statistics_takes_the_split_plan():
    assert has_batch_statistics(nn.Sequential(instance_norm()))
    assert not has_batch_statistics(nn.Sequential(instance_norm()).eval())
    assert not has_batch_statistics(nn.Sequential(nn.InstanceNorm2d(8)))

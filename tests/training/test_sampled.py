"""The sampled plan and `perturb_every`: exact where they can be, cheap, and the same on resume."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import COUNTS, LR, MOMENTUM, RHO, WEIGHT_DECAY, batches, distance, imbsam, network
from torch import Tensor, nn

from imbsam_fast import ClassSplit, ImbSAM, LeanImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.ops import dispatch
from imbsam_fast.training.rows import Rows
from imbsam_fast.training.sampled import SampledPlan, is_compiled

pytestmark = pytest.mark.usefixtures("one_thread")

SPLIT = ClassSplit.from_counts(COUNTS)
Batches = Iterator[tuple[Tensor, Tensor]]


def train_step(model: nn.Module, optimizer: Any = None, **settings: Any) -> TrainStep:
    return TrainStep(model, SplitCrossEntropy(SPLIT), optimizer or imbsam(model), **settings)


def trained(norm: str, data: Batches, **settings: Any) -> nn.Module:
    model = network(norm)
    step = train_step(model, **settings)
    for images, targets in data:
        step(images, targets)
    return model


def written_out(data: Batches, share: float, every: int = 1) -> nn.Module:
    """The sampled plan line by line under BatchNorm, on the rows that SampledPlan draws."""
    model = network("batch")
    theta = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in theta]
    plan, number = SampledPlan(share, seed=0), 0

    def losses(x: Tensor, y: Tensor, b: int) -> tuple[Tensor, Tensor]:
        loss = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        in_tail = SPLIT.tail_mask(y)
        return loss[~in_tail].sum() / b, loss[in_tail].sum() / b

    def tail_gradient(x: Tensor, y: Tensor, b: int) -> tuple[Tensor, ...]:
        statistics = copy.deepcopy(list(model.buffers()))
        g = torch.autograd.grad(losses(x, y, b)[1], theta)
        for buffer, kept in zip(model.buffers(), statistics):
            buffer.copy_(kept)
        return g

    for x, y in data:
        head, tail = losses(x, y, len(y))
        d = list(torch.autograd.grad(head + tail, theta))
        in_tail = SPLIT.tail_mask(y)
        number += bool(in_tail.any())
        if in_tail.any() and number % every == 0:
            plan.number = number
            rows = Rows(~in_tail, in_tail, int((~in_tail).sum()), int(in_tail.sum()), len(y))
            sample = plan.drawn(rows)
            g_t = tail_gradient(x[sample], y[sample], len(y))
            norm = torch.sqrt(sum((g**2).sum() for g in g_t))
            start = [p.detach().clone() for p in theta]
            with torch.no_grad():
                for p, g in zip(theta, g_t):
                    p += RHO * g / (norm + 1e-16)
            g_p = tail_gradient(x[sample], y[sample], len(y))
            with torch.no_grad():
                for p, s in zip(theta, start):
                    p.copy_(s)
            d = [g + p - t for g, p, t in zip(d, g_p, g_t)]
        with torch.no_grad():
            for p, v, g in zip(theta, velocity, d):
                v.copy_(MOMENTUM * v + (g + WEIGHT_DECAY * p))
                p -= LR * v
    return model


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("share", [0.125, 0.5, 0.75])
def test_sampled_steps_are_those_of_the_equations(share, every, backend):
    expected = written_out(batches(40), share, every)
    with dispatch.use_backend(backend):
        model = trained("batch", batches(40), plan="sampled", sample=share, perturb_every=every)
    assert distance(model, network("batch")) > 0.1
    assert distance(model, expected) < 1e-10


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_a_sample_of_all_rows_is_the_joint_plan(norm):
    joint = trained(norm, batches(40), plan="joint")
    assert distance(trained(norm, batches(40), plan="sampled", sample=1.0), joint) < 1e-11


@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("share", [0.125, 0.5])
def test_without_batch_statistics_sampled_is_exact(norm, share):
    joint = trained(norm, batches(40), plan="joint")
    assert distance(trained(norm, batches(40), plan="sampled", sample=share), joint) < 1e-11


def test_under_batch_norm_a_small_sample_is_another_step():
    joint = trained("batch", batches(40), plan="joint")
    assert distance(trained("batch", batches(40), plan="sampled", sample=0.5), joint) > 1e-4


@pytest.mark.parametrize("share", [0.01, 0.125, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("tail_rows", [1, 7, 15])
def test_the_sample_has_all_tail_rows_and_its_size(share, tail_rows):
    tail = torch.zeros(16, dtype=torch.bool)
    tail[torch.randperm(16)[:tail_rows]] = True
    plan = SampledPlan(share, seed=3)
    drawn = []
    for plan.number in range(1, 20):
        sample = plan.drawn(Rows(~tail, tail, 16 - tail_rows, tail_rows, 16))
        assert (sample | ~tail).all()
        assert sample.sum() == max(tail_rows, round(16 * share), 2)
        drawn.append(tuple(sample.tolist()))
    if tail_rows < len(sample[sample]) < 16:
        assert len(set(drawn)) > 1  # drawn anew in each step
    assert tail.sum() == tail_rows  # and the rows of the batch are as they were


def test_a_compiled_model_sees_few_sizes():
    model = network("batch")
    model.compile()
    plan, sizes = SampledPlan(0.25, seed=0), set()
    for tail_rows in range(1, 17):
        tail = torch.arange(16) < tail_rows
        rows = Rows(~tail, tail, 16 - tail_rows, tail_rows, 16)
        sizes.add(int(plan.drawn(rows, few_shapes=is_compiled(model)).sum()))
    assert sizes == {4, 8, 12, 16}


@pytest.mark.parametrize("dampening", [0.0, 0.2])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_lean_takes_the_same_steps(norm, dampening):
    models = []
    for kind in (LeanImbSAM, ImbSAM):
        model = network(norm)
        base = torch.optim.SGD(
            model.parameters(), LR, MOMENTUM, dampening, weight_decay=WEIGHT_DECAY
        )
        optimizer = kind(base, RHO)
        step = train_step(model, optimizer, plan="sampled", sample=0.5, perturb_every=2)
        for images, targets in batches(30):
            step(images, targets)
        models.append(model)
    assert distance(*models) < 1e-11


# ---------------------------------------------------------------- perturb_every


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("settings", [{"plan": "joint"}, {"plan": "sampled"}])
def test_between_perturbed_steps_there_are_steps_of_sgd(norm, settings):
    """None of the first 30 perturbs; then every step with tail rows counts."""
    model, expected = network(norm), network(norm)
    step = train_step(model, perturb_every=100, **settings)
    sgd = torch.optim.SGD(expected.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
    with_tail = 0
    for images, targets in batches(30):
        result = step(images, targets)
        with_tail += bool(SPLIT.tail_mask(targets).any())
        sgd.zero_grad()
        loss = torch.nn.functional.cross_entropy(expected(images), targets)
        loss.backward()
        sgd.step()
        torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=1e-12)
    assert distance(model, expected) < 1e-12
    assert step.state_dict() == {"counted_steps": with_tail} and 0 < with_tail < 30


@pytest.mark.parametrize("plan", ["auto", "joint", "split", "sampled"])
def test_every_kth_step_with_tail_rows_perturbs(plan, monkeypatch):
    model = network("group")
    step = train_step(model, plan=plan, perturb_every=3)
    perturbed: list[bool] = []
    second_step = step.optimizer.second_step
    monkeypatch.setattr(
        step.optimizer,
        "second_step",
        lambda *args: (perturbed.append(True), second_step(*args)),
    )
    number = 0
    for images, targets in batches(25):
        perturbed.clear()
        step(images, targets)
        number += bool(SPLIT.tail_mask(targets).any())
        tail = bool(SPLIT.tail_mask(targets).any())
        assert bool(perturbed) == (tail and number % 3 == 0)


# ---------------------------------------------------------------- cost and statistics


def test_the_rows_of_each_pass_and_what_the_statistics_see():
    model = network("batch")
    passes: list[tuple[int, bool]] = []
    model[0].register_forward_pre_hook(
        lambda module, args: passes.append((len(args[0]), model[1].track_running_stats))
    )
    backwards: list[int] = []
    model[3].register_full_backward_hook(lambda module, ins, outs: backwards.append(len(ins[0])))
    step = train_step(model, plan="sampled", sample=0.25, perturb_every=2)
    (images, _), targets = next(batches(1)), torch.tensor([9, 9] + [0] * 14)
    for _ in range(2):
        step(images, targets)
    assert passes == [(16, True), (16, True), (4, False), (4, False)]
    assert backwards == [16, 16, 4, 4]
    assert model[1].num_batches_tracked == 2


# ---------------------------------------------------------------- state and failures


def test_a_resumed_training_takes_the_same_steps():
    data = list(batches(30))

    def made() -> tuple[nn.Module, ImbSAM, TrainStep]:
        model = network("batch")
        optimizer = imbsam(model)
        settings = {"plan": "sampled", "sample": 0.5, "sample_seed": 7, "perturb_every": 2}
        return model, optimizer, train_step(model, optimizer, **settings)

    model, optimizer, step = made()
    for batch in data[:17]:
        step(*batch)
    saved = copy.deepcopy([x.state_dict() for x in (model, optimizer, step)])
    for batch in data[17:]:
        step(*batch)
    again = made()
    for x, state in zip(again, saved):
        x.load_state_dict(state)
    for batch in data[17:]:
        again[2](*batch)
    assert distance(model, again[0]) == 0
    forgetful = made()
    for x, state in zip(forgetful[:2], saved):
        x.load_state_dict(state)
    for batch in data[17:]:
        forgetful[2](*batch)
    assert distance(model, forgetful[0]) > 0  # the number of the step matters


@pytest.mark.parametrize("failing", [1, 2, 3], ids=["all rows", "sample", "perturbed"])
def test_a_failed_step_leaves_everything_as_it_was(failing):
    model = network("batch")
    step = train_step(model, plan="sampled", sample=0.5)
    data = list(batches(3))
    step(*data[0])
    before = [p.detach().clone() for p in model.parameters()]
    calls: list[int] = []

    def fail(module: nn.Module, args: Any) -> None:
        calls.append(1)
        if len(calls) == failing:
            raise MemoryError

    handle = model[-1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        step(*data[1])
    handle.remove()
    assert step.state_dict() == {"counted_steps": 1}
    assert model[1].track_running_stats
    for p, b in zip(model.parameters(), before):
        assert torch.equal(p, b) and p.grad is None
    step(*data[1])
    expected = network("batch")
    again = train_step(expected, plan="sampled", sample=0.5)
    for batch in data[:2]:
        again(*batch)
    for p, q in zip(model.parameters(), expected.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("state", [None, {}, {"counted_steps": -1}, {"counted_steps": 1.5}])
def test_what_is_no_state_is_refused(state):
    step = train_step(network())
    with pytest.raises(ValueError, match="state_dict"):
        step.load_state_dict(state)
    assert step.state_dict() == {"counted_steps": 0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample": 0.0}, "sample is 0.0, expected a number > 0 and <= 1"),
        ({"sample": 1.5}, "sample is 1.5, expected"),
        ({"sample": True}, "sample is True, expected"),
        ({"sample_seed": -1}, "sample_seed is -1, expected an integer >= 0"),
        ({"batch_norm": "twice"}, "batch_norm is 'twice', expected 'once' with plan='sampled'"),
        ({"perturb_every": 0}, "perturb_every is 0, expected an integer >= 1"),
        ({"perturb_every": 2.0}, "perturb_every is 2.0, expected an integer >= 1"),
    ],
)
def test_refusals_name_the_argument(settings, message):
    with pytest.raises(ValueError, match=message):
        train_step(network(), plan="sampled", **settings)


@pytest.mark.parametrize("plan", ["auto", "joint", "split"])
def test_a_share_is_refused_where_no_sample_is_drawn(plan):
    train_step(network(), plan=plan, sample=0.25)  # the default
    with pytest.raises(ValueError, match=f"sample is 0.5, expected 0.25 with plan='{plan}'"):
        train_step(network(), plan=plan, sample=0.5)


# ---------------------------------------------------------------- with everything else


def adamw(model: nn.Module) -> ImbSAM:
    return ImbSAM(torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-3), RHO)


def rmsprop(model: nn.Module) -> ImbSAM:
    return ImbSAM(torch.optim.RMSprop(model.parameters(), 1e-3, eps=1e-3), RHO)


def asam(model: nn.Module) -> ImbSAM:
    return imbsam(model, adaptive=True)


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=256.0)


@pytest.mark.parametrize("make", [imbsam, asam, adamw, rmsprop])
@pytest.mark.parametrize(
    "options", [{}, {"max_norm": 0.05}, {"micro_batch_size": 5}, {"grad_scaler": True}]
)
def test_sampled_is_joint_under_every_option_where_rows_are_independent(make, options):
    models = []
    for plan in ("joint", "sampled"):
        model = network("group")
        settings = {**options, **({"grad_scaler": scaler()} if "grad_scaler" in options else {})}
        step = train_step(model, make(model), plan=plan, perturb_every=2, **settings)
        for images, targets in batches(20):
            step(images, targets)
        models.append(model)
    assert distance(*models) < (1e-6 if "max_norm" in options else 1e-9)  # float32 factor


def test_a_step_that_overflows_is_skipped():
    model = network("batch")
    grad_scaler = scaler()
    step = train_step(model, plan="sampled", sample=0.5, grad_scaler=grad_scaler)
    data = list(batches(2))
    step(*data[0])
    before = [p.detach().clone() for p in model.parameters()]
    step(torch.full_like(data[1][0], torch.inf), data[1][1])
    for p, b in zip(model.parameters(), before):
        assert torch.equal(p, b)
    assert grad_scaler.get_scale() == 128


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_under_autocast(norm):
    model, start = network(norm, torch.float32), network(norm, torch.float32)
    step = train_step(model, plan="sampled", autocast=torch.autocast("cpu", torch.bfloat16))
    for images, targets in batches(10, torch.float32):
        assert step(images, targets).loss.isfinite()
    assert distance(model, start) > 0.05


def test_a_gradient_missing_in_one_pass_is_zero():
    """The second layer runs in training passes of 16 rows, or in those of fewer, alone."""

    class Sometimes(nn.Module):
        def __init__(self, whole: bool) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 10, dtype=torch.float64) for _ in range(2))
            self.whole = whole

        def forward(self, x: Tensor) -> Tensor:
            out = self.layers[0](x)
            return out + self.layers[1](x) if (len(x) == 16) == self.whole else out

    x = torch.randn(16, 4, dtype=torch.float64)
    y = torch.arange(16) % 10
    for whole in (True, False):
        torch.manual_seed(0)
        model = Sometimes(whole)
        expected = copy.deepcopy(model)
        train_step(model, imbsam(model), plan="sampled")(x, y)
        theta = list(expected.parameters())
        tail = SPLIT.tail_mask(y)

        def gradient(rows: Tensor, model: nn.Module = expected) -> list[Tensor]:
            losses = torch.nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
            found = torch.autograd.grad(
                losses.sum() / 16, list(model.parameters()), allow_unused=True
            )
            return [
                torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found)
            ]

        g, g_t = gradient(torch.arange(16)), gradient(tail)
        start = [p.detach().clone() for p in theta]
        norm = torch.sqrt(sum((t**2).sum() for t in g_t))
        with torch.no_grad():
            for p, t in zip(theta, g_t):
                p += RHO * t / norm
        g_p = gradient(tail)
        with torch.no_grad():
            for p, s, a, b, c in zip(theta, start, g, g_p, g_t):
                p.copy_(s - LR * (a + b - c + WEIGHT_DECAY * s))
        assert distance(model, expected) < 1e-12


# ---------------------------------------------------------------- memory


def test_peak_memory_is_that_of_sgd_and_two_gradients():
    from benchmarks.bench_memory import LiveBytes

    def peak(make: Any) -> tuple[int, int]:
        torch.manual_seed(0)
        model = nn.Sequential(
            *(
                layer
                for i in range(4)
                for layer in (nn.Conv2d(3 if i == 0 else 16, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
            ),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )
        images, targets = torch.randn(64, 3, 16, 16), torch.arange(64) % 10
        targets[targets >= 5] = torch.arange(30) % 5  # one tail row
        targets[0] = 9
        with LiveBytes(*model.parameters(), images, targets) as count:
            step = make(model)
            for _ in range(2):
                step(images, targets)
            count.peak = 0
            step(images, targets)
        return count.peak, sum(p.nbytes for p in model.parameters())

    def sgd(model: nn.Module) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), LR, MOMENTUM)

        def step(images: Tensor, targets: Tensor) -> None:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), targets).backward()
            optimizer.step()

        return step

    def sampled(model: nn.Module) -> Any:
        return train_step(model, imbsam(model), plan="sampled")

    (plain, n), (ours, _) = peak(sgd), peak(sampled)
    joint, _ = peak(lambda model: train_step(model, imbsam(model), plan="joint"))
    assert ours <= 1.05 * (plain + 2 * n)
    assert ours <= joint

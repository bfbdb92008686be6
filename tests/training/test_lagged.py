"""Lagged ImbSAM against its own equations; what it keeps, restores and forgets."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from networks import COUNTS, LR, MOMENTUM, RHO, WEIGHT_DECAY, batches, distance, imbsam, network
from phases import equal, snapshot
from test_data_parallel import data, join
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, StepResult, TrainStep
from imbsam_fast.training.lagged import TAIL_GRADIENT

pytestmark = pytest.mark.usefixtures("one_thread")

each_plan = pytest.mark.parametrize("plan", ["joint", "split"])

HEAD, MIXED, TAIL = [0, 1, 2, 3], [0, 1, 8, 9], [6, 7, 8, 9]


def lagged_algorithm(model: nn.Module, data: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Lagged ImbSAM line by line, with momentum, by the joint plan."""
    theta = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in theta]
    g = None
    for x, y in data:
        in_tail = torch.tensor([COUNTS[int(label)] <= 100 for label in y])
        g_h = g_p = [torch.zeros_like(p) for p in theta]
        statistics = None
        if g is None or not in_tail.all():
            loss = losses(model, x, y)
            g_h = torch.autograd.grad(loss[~in_tail].sum() / len(y), theta, retain_graph=True)
            if g is None and in_tail.any():  # the first step with tail rows is ImbSAM's
                g = torch.autograd.grad(loss[in_tail].sum() / len(y), theta)
            statistics = copy.deepcopy(list(model.buffers()))
        if in_tail.any():
            norm = torch.sqrt(sum((t**2).sum() for t in g))
            eps = [RHO * t / (norm + 1e-16) for t in g]
            with torch.no_grad():
                for p, e in zip(theta, eps):
                    p += e
            g_p = torch.autograd.grad(losses(model, x, y)[in_tail].sum() / len(y), theta)
            g = g_p
            with torch.no_grad():
                for p, e in zip(theta, eps):
                    p -= e
        for buffer, kept in zip(model.buffers(), statistics or ()):
            buffer.copy_(kept)
        with torch.no_grad():
            for p, v, h, q in zip(theta, velocity, g_h, g_p):
                v.copy_(MOMENTUM * v + (q + h + WEIGHT_DECAY * p))
                p -= LR * v


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return -torch.log_softmax(model(x), dim=1)[torch.arange(len(y)), y]


def lagging(model: nn.Module, optimizer: ImbSAM | None = None, **settings) -> TrainStep:
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    return TrainStep(model, criterion, optimizer or imbsam(model), lagged=True, **settings)


def trained(norm: str = "group", steps: int = 12, dtype=torch.float64, **settings) -> nn.Module:
    model = network(norm, dtype)
    step = lagging(model, **settings)
    for x, y in batches(steps, dtype):
        step(x, y)
    return model


def batch(labels: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(labels), 3, 6, 6, generator=generator, dtype=torch.float64)
    return images, torch.tensor(labels)


def kept(optimizer: ImbSAM) -> list[Tensor]:
    return [state[TAIL_GRADIENT] for state in optimizer.state.values() if TAIL_GRADIENT in state]


def everything(step: TrainStep) -> list[Tensor]:
    """Copies of all weights, buffers and optimizer states."""
    states = step.optimizer.state.values()
    found = [*step.model.state_dict().values(), *(t for s in states for t in s.values())]
    return snapshot([t for t in found if isinstance(t, Tensor)])


# ---------------------------------------------------------------- the same as its equations


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_50_joint_steps_agree_with_the_equations(norm):
    """Among them batches without tail and without head rows; BatchNorm statistics too."""
    expected = network(norm)
    lagged_algorithm(expected, batches(50))
    model = trained(norm, 50, plan="joint")
    assert distance(model, expected) < 1e-10
    ordinary = network(norm)
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    step = TrainStep(ordinary, criterion, imbsam(ordinary), "joint")
    for x, y in batches(50):
        step(x, y)
    assert distance(model, ordinary) > 1e-4


@pytest.mark.usefixtures("large_network")
def test_split_agrees_with_joint_where_rows_are_independent():
    assert distance(trained(plan="split"), trained(plan="joint")) < 1e-12
    assert distance(trained(plan="auto"), trained(plan="split")) == 0


@each_plan
def test_micro_batches_give_the_step_of_the_whole_batch(plan):
    assert distance(trained(plan=plan, micro_batch_size=3), trained(plan=plan)) < 1e-12


@each_plan
def test_scaled_and_clipped_steps_are_the_plain_ones(plan):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    clipped = trained(plan=plan, max_norm=0.05)
    assert distance(clipped, trained(plan=plan)) > 1e-4
    assert distance(trained(plan=plan, max_norm=0.05, grad_scaler=scaler), clipped) < 1e-6
    assert scaler.get_scale() == 1024 * 2**6


def test_a_disabled_grad_scaler_changes_nothing():
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    assert distance(trained(grad_scaler=disabled), trained()) == 0


@each_plan
def test_another_base_keeps_the_tail_gradient_and_not_the_merged_one(plan):
    ends = []
    for base in (torch.optim.SGD, type("OtherSGD", (torch.optim.SGD,), {})):
        model = network("group")
        optimizer = ImbSAM(base(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY))
        step = lagging(model, optimizer, plan=plan)
        for x, y in batches(12):
            step(x, y)
        ends.append(model)
    assert distance(*ends) < 1e-12


def test_bases_that_take_any_state_for_their_own():
    """NAdam: found_inf in the first step, and a parameter whose first gradient comes late."""
    model = network("group")
    late = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = ImbSAM(torch.optim.NAdam([*model.parameters(), late], 0.01))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    step = lagging(model, optimizer, plan="joint", grad_scaler=scaler)
    # The steps of two passes each: skipped, the first, skipped with `late` in it, ordinary.
    step.criterion = Overflowing(step.criterion, at=(2, 6), late=late, late_from=5)
    for _ in range(3):
        step(*batch(MIXED))
    assert "step" in optimizer.state[model[0].weight]
    assert late not in optimizer.state
    step(*batch(MIXED))
    assert float(optimizer.state[late]["step"]) == 1


class Overflowing(nn.Module):
    """A criterion with an infinite tail gradient in the calls `at`."""

    def __init__(self, criterion, at, late=None, late_from=10**9):
        super().__init__()
        self.criterion, self.at, self.calls = criterion, at, 0
        self.split, self.ignore_index = criterion.split, criterion.ignore_index
        self.late, self.late_from = late, late_from

    def forward(self, outputs, targets, batch_size=None):
        self.calls += 1
        loss = self.criterion(outputs, targets, batch_size)
        if self.late is not None and self.calls >= self.late_from:
            loss = loss._replace(tail=loss.tail + self.late)
        return loss._replace(tail=loss.tail * torch.inf) if self.calls in self.at else loss


# ---------------------------------------------------------------- passes and what they show


class CountRows(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.rows = model, []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.model(x)


@pytest.mark.parametrize(
    ("plan", "labels", "rows"),
    [
        ("joint", MIXED, [4, 4]),
        ("joint", HEAD, [4]),
        ("joint", TAIL, [4]),
        ("split", MIXED, [2, 2]),
        ("split", HEAD, [4]),
        ("split", TAIL, [4]),
    ],
)
def test_passes(plan, labels, rows):
    model = CountRows(network("group"))
    step = lagging(model, plan=plan)
    step(*batch(HEAD))
    step(*batch(MIXED))
    assert model.rows == ([4, 4, 4] if plan == "joint" else [4, 2, 2, 2])  # the first ones
    model.rows.clear()
    step(*batch(labels))
    assert model.rows == rows


@pytest.mark.parametrize(("plan", "labels"), [("joint", MIXED), ("joint", TAIL), ("split", MIXED)])
def test_rows_without_an_unperturbed_pass_are_seen_at_the_perturbed_weights(plan, labels):
    model = network("group")
    step = lagging(model, plan=plan)
    step(*batch(MIXED))
    x, y = batch(labels, seed=1)
    plain, perturbed = copy.deepcopy(model), copy.deepcopy(model)
    g = kept(step.optimizer)
    norm = torch.sqrt(sum(t.square().sum() for t in g))
    with torch.no_grad():
        for p, t in zip(perturbed.parameters(), g):
            p += RHO * t / norm
    result: StepResult = step(x, y)
    at_theta = plan == "joint" and labels is MIXED
    at_tail = plain if at_theta else perturbed
    expected = torch.where((y >= 5)[:, None], at_tail(x), plain(x)).detach()
    torch.testing.assert_close(result.logits, expected)
    torch.testing.assert_close(result.tail, losses(at_tail, x, y)[y >= 5].sum().detach() / 4)
    torch.testing.assert_close(result.head, losses(plain, x, y)[y < 5].sum().detach() / 4)


@pytest.mark.parametrize(
    ("plan", "labels", "policy", "updates"),
    [
        ("joint", MIXED, "once", 1),
        ("joint", MIXED, "twice", 2),
        ("joint", TAIL, "once", 1),
        ("joint", HEAD, "once", 1),
        ("split", MIXED, "once", 2),  # once for each part
    ],
)
def test_batch_norm_statistics(plan, labels, policy, updates):
    model = network("batch")
    step = lagging(model, plan=plan, batch_norm=policy)
    step(*batch(MIXED))
    before = int(model[1].num_batches_tracked)
    step(*batch(labels))
    assert int(model[1].num_batches_tracked) - before == updates


def test_autocast():
    autocast = torch.autocast("cpu", torch.bfloat16)
    model = trained(dtype=torch.float32, autocast=autocast)
    assert 0 < distance(model, trained(dtype=torch.float32)) < 0.01


def test_compiled_models():
    ends = []
    for compile_it in (False, True):
        model = network("group")
        compiled = torch.compile(model, backend="aot_eager") if compile_it else model
        step = lagging(compiled, plan="joint")
        for x, y in batches(3):
            step(x, y)
        ends.append(model)
    assert distance(*ends) < 1e-13


# ---------------------------------------------------------------- checkpoints


def test_a_resumed_run_takes_the_same_steps():
    model = network("batch")
    step = lagging(model)
    data = list(batches(12))
    for x, y in data[:5]:  # the fifth has no tail row
        step(x, y)
    file = io.BytesIO()
    torch.save((model.state_dict(), step.optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file)
    resumed = network("batch")
    resumed.load_state_dict(weights)
    again = lagging(resumed)
    again.optimizer.load_state_dict(state)
    for x, y in data[5:]:
        step(x, y)
        again(x, y)
    assert distance(model, resumed) == 0


def test_a_checkpoint_serves_plain_sgd_and_back():
    model = network("group")
    step = lagging(model)
    step(*batch(MIXED))
    sgd = torch.optim.SGD(model.parameters(), LR, MOMENTUM)
    sgd.load_state_dict(step.optimizer.state_dict())
    sgd.step()
    other = lagging(network("group"))
    momentum = {"momentum_buffer": torch.ones(1)}
    plain = torch.optim.SGD(other.model.parameters(), LR, MOMENTUM)
    plain.state[next(other.model.parameters())] = momentum
    other.optimizer.load_state_dict(plain.state_dict())
    assert not other.tail_gradient.is_known()


def test_parameters_that_were_frozen_are_not_perturbed():
    ends = []
    for forget in (False, True):
        model = network("group")
        step = lagging(model)
        step(*batch(MIXED))
        frozen = list(model[0].parameters())
        for p in frozen:
            p.requires_grad_(False)
            if forget:
                del step.optimizer.state[p][TAIL_GRADIENT]
        before = snapshot(frozen)
        step(*batch(MIXED, seed=1))
        assert equal(frozen, before)
        assert all(TAIL_GRADIENT not in step.optimizer.state[p] for p in frozen)
        ends.append(model)
    assert distance(*ends) == 0


# ---------------------------------------------------------------- failures


class FailsAtCall(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.left = model, 10**9

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.model(x)


@each_plan
@pytest.mark.parametrize("call", [1, 2])
def test_a_failed_step_leaves_weights_and_state_bit_for_bit(plan, call):
    model = FailsAtCall(network("group"))
    step = lagging(model, plan=plan)
    step(*batch(MIXED))
    before = everything(step)
    model.left = call
    with pytest.raises(KeyboardInterrupt):
        step(*batch(MIXED, seed=1))
    assert equal(everything(step), before)
    step(*batch(MIXED, seed=1))
    undisturbed = lagging(network("group"), plan=plan)
    undisturbed(*batch(MIXED))
    undisturbed(*batch(MIXED, seed=1))
    assert equal(everything(step), everything(undisturbed))


@each_plan
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
def test_a_gradient_that_is_not_finite_is_forgotten(plan, first):
    ends = []
    for fails in (True, False):
        step = lagging(network("group"), plan=plan)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, backoff_factor=1 - 1e-16)
        step.grad_scaler = scaler
        if not first:
            step(*batch(MIXED))
        before = everything(step)
        if fails:
            passes = 1 if plan == "joint" else 2
            calls = passes + 1 if first else 2
            criterion, step.criterion = step.criterion, Overflowing(step.criterion, at=(calls,))
            step(*batch(MIXED, seed=1))
            assert step.criterion.calls == calls  # the last pass is the one that overflows
            step.criterion = criterion
            assert equal(everything(step)[: len(before)], before)
            assert step.tail_gradient.is_known() is not first
        for seed in (2, 3):
            step(*batch(MIXED, seed=seed))
        assert all(g.isfinite().all() for g in kept(step.optimizer))
        ends.append(step.model)
    assert distance(*ends) == 0


# ---------------------------------------------------------------- ranks


CASES = {
    "joint": {"plan": "joint"},
    "split": {"plan": "split", "max_norm": 0.5},
    "local": {"plan": "split", "perturbation": "local"},
}


def on_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    join(rank, 2, folder)
    try:
        for case, settings in CASES.items():
            model = network("group")
            step = lagging(DistributedDataParallel(model), **settings)
            train(step, rank, 2)
            gradients = kept(step.optimizer)
            torch.save((model.state_dict(), gradients), folder / f"{case} {rank}.pt")
    finally:
        dist.destroy_process_group()


def train(step: TrainStep, rank: int, ranks: int) -> None:
    for i, (x, y) in enumerate(data()):
        y = y % 5 if i == 0 else y  # the first without a tail row anywhere
        rows = slice(rank * len(y) // ranks, (rank + 1) * len(y) // ranks)
        step(x[rows], y[rows])


def test_ranks_step_like_one_process(tmp_path):
    mp.spawn(on_rank, (tmp_path,), nprocs=2)
    for case, settings in CASES.items():
        results = [torch.load(tmp_path / f"{case} {rank}.pt") for rank in range(2)]
        models = [network("group") for _ in results]
        for model, (weights, _) in zip(models, results):
            model.load_state_dict(weights)
        assert distance(*models) == 0
        alone = lagging(network("group"), **settings)
        train(alone, 0, 1)
        (_, first), (_, second) = results
        if case == "local":  # each rank along its own gradient
            assert 0 < distance(models[0], alone.model) < 0.1
            assert not equal(first, second)
        else:
            assert distance(models[0], alone.model) < 1e-7  # the clipping factor is float32
            assert equal(first, second)
            for g, expected in zip(first, kept(alone.optimizer)):
                torch.testing.assert_close(g, expected, rtol=1e-6, atol=1e-9)


def test_a_cuda_graph_of_it_is_refused():
    model = network("group")
    with pytest.raises(
        ValueError, match=r"lagged is True, expected with cuda_graph=True.*lagged=F"
    ):
        lagging(model, plan="joint", cuda_graph=True)

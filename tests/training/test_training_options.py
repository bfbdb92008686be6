"""Gradient scaling, clipping, autocast and micro-batches: one step like the plain one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import COUNTS, batches, imbsam, network
from phases import equal, fill, gradients, parameters, snapshot
from torch import Tensor, nn

from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")

SCALE = 1024.0

Bases = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
BASES: dict[str, Bases] = {
    "SGD": lambda params: torch.optim.SGD(params, 0.05, 0.9, weight_decay=0.01),
    "AdamW": lambda params: torch.optim.AdamW(params, 0.01),
}
each_base = pytest.mark.parametrize("base", BASES)
each_plan = pytest.mark.parametrize("plan", ["joint", "split"])


def scaler(scale: float = SCALE) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)


def phases(optimizer: ImbSAM, params: list, factor: float, faulty: int | None = None, **options):
    """One step from made-up gradients times `factor`, the one of pass `faulty` not finite."""
    for number, call in enumerate(
        (optimizer.first_step, optimizer.second_step, optimizer.third_step)
    ):
        grads = [factor * g for g in gradients(number, params[0].dtype)]
        if number == faulty:
            grads[2].view(-1)[3] = torch.inf
        fill(params, grads)
        call(**options) if number == 2 else call()


def trained(plan: str, base: str = "SGD", steps: int = 6, **options) -> nn.Module:
    model = network("group")
    optimizer = ImbSAM(BASES[base](list(model.parameters())))
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    step = TrainStep(model, criterion, optimizer, plan, **options)
    for x, y in batches(steps):
        step(x, y)
    return model


def assert_close(a: nn.Module, b: nn.Module, atol: float = 1e-12) -> None:
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=atol)


# ---------------------------------------------------------------- gradient scaler


@each_plan
@each_base
def test_scaled_steps_are_the_plain_ones(plan, base):
    grad_scaler = scaler()
    assert_close(trained(plan, base, grad_scaler=grad_scaler), trained(plan, base))
    assert grad_scaler.get_scale() == SCALE * 8  # grown after every second of six steps


def test_a_disabled_scaler_changes_nothing():
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    assert_close(trained("joint", grad_scaler=disabled), trained("joint"), atol=0)


@each_base
@pytest.mark.parametrize("faulty", [0, 1, 2], ids=["g_h", "g_t", "g_p"])
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
def test_a_gradient_that_is_not_finite_skips_the_step(base, faulty, first):
    ends = []
    for fails in (True, False):
        params = parameters()
        optimizer = ImbSAM(BASES[base](params))
        grad_scaler = scaler()
        grad_scaler.scale(torch.zeros(()))  # which makes the scale
        if not first:
            phases(optimizer, params, SCALE, grad_scaler=grad_scaler)
            grad_scaler.update()
        before = snapshot(params)
        if fails:
            phases(optimizer, params, SCALE, faulty, grad_scaler=grad_scaler)
            grad_scaler.update()
            assert equal(params, before)
            assert grad_scaler.get_scale() == SCALE / 2
            assert all(p.grad is None for p in params)
        phases(optimizer, params, grad_scaler.get_scale(), grad_scaler=grad_scaler)
        ends.append(params)
    assert equal(*ends)


def test_a_skipped_first_step_leaves_the_next_one_undampened():
    ends = []
    for fails in (True, False):
        params = parameters()
        optimizer = ImbSAM(torch.optim.SGD(params, 0.1, 0.9, dampening=0.5))
        grad_scaler = scaler(1.0)
        grad_scaler.scale(torch.zeros(()))
        if fails:
            phases(optimizer, params, 1.0, 2, grad_scaler=grad_scaler)
        for _ in range(2):
            phases(optimizer, params, 1.0, grad_scaler=grad_scaler)
        ends.append(params)
    assert equal(*ends)


def test_float16_training_recovers_from_a_scale_that_is_too_large():
    torch.manual_seed(0)
    model = network("group", torch.float32)
    grad_scaler = scaler(2.0**30)
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    autocast = torch.autocast("cpu", torch.float16)
    step = TrainStep(model, criterion, imbsam(model), autocast=autocast, grad_scaler=grad_scaler)
    x, y = next(batches(1, torch.float32))
    before = snapshot(list(model.parameters()))
    step(x, y)
    assert equal(list(model.parameters()), before)
    losses = [float(step(x, y).loss) for _ in range(40)]
    assert grad_scaler.get_scale() < 2.0**30
    assert losses[-1] < losses[0] and not equal(list(model.parameters()), before)


@each_base
@pytest.mark.parametrize("misuse", ["unscale_", "no scale"])
def test_a_grad_scaler_that_is_not_ready_is_refused(base, misuse):
    params = parameters()
    optimizer, grad_scaler = ImbSAM(BASES[base](params)), scaler()
    fill(params, gradients(0))
    if misuse == "unscale_":
        grad_scaler.scale(torch.zeros(()))
        grad_scaler.unscale_(optimizer)
    message = "UNSCALED for this optimizer" if misuse == "unscale_" else "has scaled no loss yet"
    with pytest.raises(RuntimeError, match=f"grad_scaler .*{message}"):
        optimizer.third_step(grad_scaler)
    assert equal(params, parameters()) and not optimizer.state


# ---------------------------------------------------------------- clipping


@each_base
@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_the_combined_gradient_is_clipped_as_torch_does(base, scale, max_norm):
    params, expected = parameters(), parameters()
    reference = BASES[base](expected)
    held, perturbed = gradients(0), gradients(2)
    fill(expected, [h + p for h, p in zip(held, perturbed)])
    torch.nn.utils.clip_grad_norm_(expected, max_norm)
    reference.step()
    grad_scaler = None
    if scale:
        grad_scaler = scaler(scale)
        grad_scaler.scale(torch.zeros(()))
    optimizer = ImbSAM(BASES[base](params))
    phases(optimizer, params, scale or 1.0, grad_scaler=grad_scaler, max_norm=max_norm)
    for p, e in zip(params, expected):
        torch.testing.assert_close(p, e, rtol=0, atol=1e-7)  # the factor is float32
    assert not equal(params, parameters())


def test_a_train_step_clips():
    assert_close(trained("joint", max_norm=0.05), trained("split", max_norm=0.05))
    clipped, plain = trained("joint", max_norm=0.05), trained("joint")
    differences = [(p - q).abs().max() for p, q in zip(clipped.parameters(), plain.parameters())]
    assert max(differences) > 1e-3


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_an_unusable_norm_is_named(max_norm):
    params = parameters()
    optimizer = ImbSAM(BASES["SGD"](params))
    fill(params, gradients(0))
    with pytest.raises(ValueError, match=r"max_norm is .*, expected a number > 0"):
        optimizer.third_step(max_norm=max_norm)
    assert equal(params, parameters())


# ---------------------------------------------------------------- micro-batches


@each_plan
@pytest.mark.parametrize("size", [1, 3, 16, 100])
def test_micro_batches_give_the_step_of_the_whole_batch(plan, size):
    assert_close(trained(plan, steps=8, micro_batch_size=size), trained(plan, steps=8))


@each_plan
def test_results_of_micro_batches_are_whole(plan):
    model = network("group")
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    x, y = next(batches(1))
    results = []
    for size in (None, 5):
        copy = network("group")
        copy.load_state_dict(model.state_dict())
        results.append(TrainStep(copy, criterion, imbsam(copy), plan, micro_batch_size=size)(x, y))
    for whole, pieces in zip(*results):
        torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.seen = network("group"), []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return self.model(x)


@pytest.mark.parametrize(("plan", "rows"), [("joint", [4, 4, 2, 4, 4, 2]), ("split", [4, 2, 4, 4])])
def test_passes_in_pieces(plan, rows):
    model = Rows()
    labels = torch.tensor([0, 9, 1, 9, 2, 9, 3, 9, 4, 4])  # 6 head rows, 4 tail rows
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    step = TrainStep(model, criterion, imbsam(model), plan, micro_batch_size=4)
    step(torch.randn(10, 3, 6, 6, dtype=torch.float64), labels)
    assert model.seen == rows


def test_an_unusable_size_is_named():
    model = network("group")
    criterion = SplitCrossEntropy(ClassSplit.all_tail())
    with pytest.raises(ValueError, match="micro_batch_size is 0, expected an integer >= 1"):
        TrainStep(model, criterion, imbsam(model), micro_batch_size=0)


# ---------------------------------------------------------------- autocast


@each_plan
def test_autocast_inside_the_step_is_autocast_around_it(plan):
    ends = []
    for inside in (True, False):
        model = network("group", torch.float32)
        criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
        autocast = torch.autocast("cpu", torch.bfloat16)
        step = TrainStep(
            model, criterion, imbsam(model), plan, autocast=autocast if inside else None
        )
        for x, y in batches(3, torch.float32):
            with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
                result = step(x, y)
            assert result.logits.dtype == torch.bfloat16
        ends.append(model)
    assert_close(*ends, atol=1e-4)

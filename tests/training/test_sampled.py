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
from imbsam_fast.training.plans import Rows
from imbsam_fast.training.sampled import SampledPlan

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
            sample = plan.drawn(model, rows)
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
        sample = plan.drawn(network("batch"), Rows(~tail, tail, 16 - tail_rows, tail_rows, 16))
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
        sizes.add(int(plan.drawn(model, rows).sum()))
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

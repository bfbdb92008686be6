"""Single calls with a gradient scaler, clipping and master weights: bits of launch by launch."""

from __future__ import annotations

import copy

import pytest
import torch
from phases import equal, gradients
from two_groups import (
    BASES,
    MASTERED,
    OPTIONS,
    everything,
    launch_by_launch,
    needs_single_calls,
    new,
    optioned,
    params_of,
    phase,
    same_bits,
    steps,
)

from imbsam_fast import ImbSAM
from imbsam_fast.ops import native
from imbsam_fast.optim import pending
from imbsam_fast.optim.pending import norm_of

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_single_calls]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *MASTERED], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_scaled_clipped_and_mastered_steps_are_single_calls(
    base, dtype, options, single_calls, monkeypatch
):
    """From the second step on, with the weights, state, norms and scale of the longer way."""
    _, found = optioned(base, dtype, options)
    assert single_calls[2:] == [True] * 10
    launch_by_launch(monkeypatch)
    assert same_bits(found, optioned(base, dtype, options)[1])


@pytest.mark.parametrize("dtype", MASTERED, ids=str)
def test_a_parameter_that_somebody_wrote_is_looked_at(dtype, single_calls, monkeypatch):
    """The master weight follows it: no single call for the one phase that finds it."""

    @torch.no_grad()
    def write(optimizer: ImbSAM, step: int) -> None:
        if step == 4:
            params_of(optimizer)[2].mul_(2)

    _, found = optioned("SGD", dtype, {}, write)
    assert single_calls[2:] == [True] * 6 + [False] + [True] * 3
    launch_by_launch(monkeypatch)
    assert same_bits(found, optioned("SGD", dtype, {}, write)[1])


@pytest.mark.parametrize("dtype", MASTERED, ids=str)
def test_an_abandoned_step_leaves_master_weights_as_they_were(dtype):
    optimizer, _ = optioned("SGD", dtype, {})
    before = everything(optimizer)
    for number in range(2):
        phase(optimizer, number, 9)
    assert not equal(before, everything(optimizer))
    optimizer.restore()
    assert equal(before, everything(optimizer))
    other = copy.deepcopy(optimizer)
    steps(optimizer, 20)
    steps(other, 20)
    assert equal(everything(optimizer), everything(other))


def test_a_failure_between_reading_and_writing_restores(monkeypatch):
    """Where the norm of both gradients is measured."""
    optimizer, _ = optioned("SGD", torch.float32, {})
    before = everything(optimizer)
    for number in range(2):
        phase(optimizer, number, 9)
    monkeypatch.setattr(native, "grad_check_all", lambda *arguments: 1 / 0)
    for p, g in zip(params_of(optimizer), gradients(1, torch.float32)):
        p.grad = g.clone()
    with pytest.raises(ZeroDivisionError):
        optimizer.third_step(max_norm=1.0)
    assert equal(before, everything(optimizer)) and not optimizer.is_perturbed


def test_a_norm_that_nobody_reads_is_not_computed(monkeypatch):
    asked = []
    monkeypatch.setattr(pending, "norm_of", lambda *a: asked.append(a) or norm_of(*a))
    optimizer = new()
    steps(optimizer, 0)
    for number in range(2):
        phase(optimizer, number, 9)
    expected = torch.cat([g.flatten() for g in gradients(7 * 9 + 1, torch.float32)]).double().norm()
    for p, g in zip(params_of(optimizer), gradients(5, torch.float32)):
        p.grad = g.clone()
    norms = optimizer.third_step()
    assert not asked
    steps(optimizer, 10)  # what comes later does not count
    torch.testing.assert_close(norms.tail_grad_norm, expected, rtol=1e-12, atol=0)
    assert norms.tail_grad_norm is norms.tail_grad_norm and len(asked) == 1

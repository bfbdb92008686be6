"""Single calls with a gradient scaler, clipping and master weights: bits of launch by launch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from phases import equal, gradients
from torch import Tensor
from two_groups import (
    BASES,
    everything,
    launch_by_launch,
    needs_single_calls,
    new,
    params_of,
    phase,
    steps,
)

from imbsam_fast import ImbSAM
from imbsam_fast.ops import native
from imbsam_fast.optim import pending
from imbsam_fast.optim.pending import norm_of

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_single_calls]

SCALE = 8.0
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaler": {"scale": SCALE},
    "clipped": {"max_norm": 0.5},
    "measured": {"max_norm": float("inf")},
    "scaler, clipped": {"scale": SCALE, "max_norm": 0.5},
}
MASTERED = [torch.bfloat16, torch.float16]


def optioned(
    base: str, dtype: torch.dtype, options: dict[str, Any], between: Callable = lambda o, step: None
) -> tuple[ImbSAM, list[Tensor]]:
    """Six steps, the fourth with what is not finite: the optimizer, and all that came out.

    Half-precision parameters have master weights, beside one in float32.
    """
    optimizer = new(base, dtype, master_weights=dtype in MASTERED)
    scale, max_norm = options.get("scale"), options.get("max_norm")
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    scaler.scale(torch.zeros(()))
    out: list[Tensor] = []
    for step in range(6):
        between(optimizer, step)
        for number in range(3):
            for p, g in zip(params_of(optimizer), gradients(7 * step + number, torch.float32)):
                p.grad = (g * (scale or 1.0)).to(p.dtype)
            if (scale, step, number) == (SCALE, 3, 2):
                params_of(optimizer)[1].grad[0] = torch.inf
            if number < 2:
                (optimizer.first_step, optimizer.second_step)[number]()
        norms = optimizer.third_step(scaler, max_norm)
        scaler.update()
        out += [x.clone() for x in norms if isinstance(x, Tensor)]
        out += [torch.tensor([scaler.get_scale(), norms.perturbed]), *everything(optimizer)]
    return optimizer, out


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.nan_to_num(12345.0), y.nan_to_num(12345.0)) for x, y in zip(a, b)
    )


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

"""Random configurations of ImbSAM's three calls against torch in float64, in every dtype.

Parameters of all dtypes, shapes and layouts in groups of their own settings, with gradients in
some of the passes only. The 200 are the same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from checks import ROUNDING
from draws import examples, group_settings, momenta
from hypothesis import assume, given
from hypothesis import strategies as st
from samples import doubles
from torch import Tensor, nn

from imbsam_fast import ImbSAM
from imbsam_fast.ops.arguments import DTYPES

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:bfloat16 parameters"),
]


@dataclass
class Slot:
    """One parameter: its shape and layout, and in which passes it gets a gradient of which."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    gradients: tuple[bool, bool, bool]  # in the head, the tail and the perturbed pass
    gradient_layout: str


slots = st.builds(
    Slot,
    shape=st.sampled_from([(7,), (), (0,), (3, 5), (1, 1), (4, 2, 3, 3), (300,)]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "transposed"]),
    gradients=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    gradient_layout=st.sampled_from(["as the parameter", "contiguous", "transposed", "expanded"]),
)


@dataclass
class Phases:
    """Some steps of the three calls with made-up gradients."""

    slots: list[Slot]
    groups: list[dict[str, Any]]
    sgd: dict[str, Any]
    first_step: bool
    second_step: bool
    scale: float | None
    max_norm: float | None
    steps: int
    seed: int


phases = st.builds(
    Phases,
    slots=st.lists(slots, min_size=1, max_size=8),
    groups=st.lists(group_settings, min_size=1, max_size=3),
    sgd=momenta,
    first_step=st.booleans(),
    second_step=st.booleans(),
    scale=st.sampled_from([None, 1024.0]),
    max_norm=st.sampled_from([None, 0.5]),
    steps=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A dense copy in a layout, or a view that repeats the first row."""
    if layout == "expanded" and values.dim():
        return values[:1].expand_as(values)
    if layout != "transposed":
        return values.contiguous()
    backwards = tuple(reversed(range(values.dim())))
    return values.permute(backwards).contiguous().permute(backwards)


def gradients(config: Phases, slots: list[Slot], step: int, phase: int) -> list[Tensor | None]:
    """Those of one pass, in the dtype of their parameter."""
    generator = torch.Generator().manual_seed(100 * config.seed + 3 * step + phase)
    made: list[Tensor | None] = []
    for slot in slots:
        values = torch.randn(slot.shape, generator=generator).to(slot.dtype)
        given = slot.gradients[phase]
        made.append(laid_out(values, slot.gradient_layout) if given else None)
    return made


def fill(params: list[nn.Parameter], grads: list[Tensor | None], scale: float | None) -> None:
    for p, g in zip(params, grads):
        # The optimizer keeps its buffers, and an expanded one stays expanded where it may.
        p.grad = g if g is None or scale is None else g * scale
        if p.grad is not None and p.grad is g and p.grad.is_contiguous():
            p.grad = g.clone()


def plus(h: Tensor | None, p: Tensor | None) -> Tensor | None:
    """The sum in float64; a missing gradient is zero."""
    given = [g.double() for g in (h, p) if g is not None]
    return sum(given) if given else None  # type: ignore[return-value]


def where_perturbed(optimizer: ImbSAM, grads: list[Tensor | None]) -> list[Tensor]:
    """theta + epsilon in float64."""
    theta = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    truths, scaled = [], []
    for (p, group), g in zip(theta, grads):
        (start,) = doubles([p])
        stays = group["rho"] == 0  # and does not count in the norm
        g = torch.zeros_like(start) if g is None or stays else g.double()
        scaled.append(start.abs() * g if group["adaptive"] else g)
        truths.append((start, start.square() * g if group["adaptive"] else g))
    norm = torch.sqrt(sum(t.square().sum() for t in scaled)) + 1e-16
    signs = [-1 if group.get("maximize") else 1 for _, group in theta]
    return [
        start + sign * group["rho"] * direction / norm
        for (start, direction), sign, (_, group) in zip(truths, signs, theta)
    ]


def steps_of_sgd(config: Phases, optimizer: ImbSAM, grads: list[Tensor | None]) -> list[Tensor]:
    """Where torch.optim.SGD in float64 goes from here, and its momentum buffers, all in a list."""
    twins: dict[Tensor, nn.Parameter] = {}
    groups = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            twins[p] = nn.Parameter(*doubles([p]))
        own = {k: v for k, v in group.items() if k in ("lr", "weight_decay")}
        groups.append({"params": [twins[p] for p in group["params"]], **own})
    base = torch.optim.SGD(groups, **config.sgd)
    for (p, twin), g in zip(twins.items(), grads):
        twin.grad = g
        if "momentum_buffer" in optimizer.state.get(p, {}):
            (base.state[twin]["momentum_buffer"],) = doubles(
                [optimizer.state[p]["momentum_buffer"]]
            )
    if config.max_norm is not None and any(g is not None for g in grads):
        torch.nn.utils.clip_grad_norm_(twins.values(), config.max_norm)
    base.step()
    buffers = [base.state[twin].get("momentum_buffer") for twin in twins.values()]
    return [*(t.detach() for t in twins.values()), *(b for b in buffers if b is not None)]


def assert_rounded(found: list[Tensor], truths: list[Tensor], float32_factor: bool) -> None:
    """Each result is the truth but for roundings of its dtype and of the arithmetic's."""
    assert len(found) == len(truths)
    for t, truth in zip(found, truths):
        arithmetic = 1e-6 if t.dtype != torch.float64 or float32_factor else 1e-14
        scale = 1 + truth.abs().max().item() if truth.numel() else 1.0
        atol, rtol = arithmetic * scale, 2 * ROUNDING[t.dtype]
        torch.testing.assert_close(t.detach().double(), truth, rtol=rtol, atol=atol)


@examples(200)
@given(phases)
def test_phases_agree_with_torch_in_float64(config):
    torch.manual_seed(config.seed)
    dealt = [config.slots[i :: len(config.groups)] for i in range(len(config.groups))]
    slots = [slot for of_group in dealt for slot in of_group]
    params = [
        nn.Parameter(laid_out(torch.randn(slot.shape).to(slot.dtype), slot.layout))
        for slot in slots
    ]
    remaining = iter(params)
    groups = [
        {"params": [next(remaining) for _ in of_group], **group}
        for of_group, group in zip(dealt, config.groups)
        if of_group
    ]
    optimizer = ImbSAM(torch.optim.SGD(groups, **config.sgd))
    for step in range(config.steps):
        one_random_step(
            config, optimizer, params, [gradients(config, slots, step, phase) for phase in range(3)]
        )


def one_random_step(
    config: Phases,
    optimizer: ImbSAM,
    params: list[nn.Parameter],
    grads: list[list[Tensor | None]],  # of the head, the tail and the perturbed pass
) -> None:
    g_h, g_t, g_p = grads
    merged = (
        [plus(h, p) for h, p in zip(g_h, g_p)]
        if config.first_step
        else [plus(None, p) for p in g_p]
    )
    assume(any(g is not None for g in merged))
    expected = steps_of_sgd(config, optimizer, merged)
    scaler = torch.amp.GradScaler("cpu", config.scale) if config.scale else None
    if scaler:
        scaler.scale(torch.zeros(()))  # which makes the scale
    if config.first_step:
        fill(params, g_h, config.scale)
        optimizer.first_step()
    if config.second_step and any(g is not None for g in g_t):
        perturbed = where_perturbed(optimizer, g_t)
        fill(params, g_t, config.scale)
        optimizer.second_step()
        assert_rounded(params, perturbed, float32_factor=False)
    fill(params, g_p, config.scale)
    optimizer.third_step(scaler, config.max_norm)
    buffers = [optimizer.state.get(p, {}).get("momentum_buffer") for p in params]
    found = [*params, *(b for b in buffers if b is not None)]
    assert_rounded(found, expected, float32_factor=config.max_norm is not None)

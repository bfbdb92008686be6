"""Optimizers around two groups, their steps, and single calls kept from happening."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from phases import gradients, parameters, snapshot
from torch import Tensor, nn

from imbsam_fast import ImbSAM
from imbsam_fast.ops import dispatch
from imbsam_fast.optim import one_call

needs_single_calls = pytest.mark.skipif(
    dispatch.available()["native"] is not None
    or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="needs the compiled module and a torch whose tensors it can read, 2.10 or newer",
)

BASES: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "plain SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.9, centered=True),
}

SCALE = 8.0
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaler": {"scale": SCALE},
    "clipped": {"max_norm": 0.5},
    "measured": {"max_norm": float("inf")},
    "scaler, clipped": {"scale": SCALE, "max_norm": 0.5},
}
MASTERED = [torch.bfloat16, torch.float16]


def new(
    base: str = "SGD", dtype: torch.dtype = torch.float32, master_weights: bool = False
) -> ImbSAM:
    """Around two groups, of three parameters and of two; one in float32 beside master weights."""
    params = parameters(dtype)
    if master_weights:
        params[1] = nn.Parameter(params[1].detach().float())
    groups = [{"params": params[:3]}, {"params": params[3:]}]
    return ImbSAM(BASES[base](groups), rho=0.1, master_weights=master_weights)


def params_of(optimizer: ImbSAM) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def everything(optimizer: ImbSAM) -> list[Tensor]:
    """The weights and the state, copied."""
    params = params_of(optimizer)
    states = [optimizer.state.get(p, {}) for p in params]
    return snapshot(
        [*params, *(s[name] for s in states for name in sorted(s) if s[name] is not None)]
    )


def phase(optimizer: ImbSAM, number: int, step: int, without: int | None = None) -> None:
    """One call with new gradients, none for parameter `without`."""
    for i, p in enumerate(params_of(optimizer)):
        g = gradients(7 * step + number, p.dtype)[i % 5]
        p.grad = None if i == without or not p.requires_grad else g.clone().reshape(p.shape)
    (optimizer.first_step, optimizer.second_step, optimizer.third_step)[number]()


def steps(optimizer: ImbSAM, first: int, count: int = 2) -> None:
    for step in range(first, first + count):
        for number in range(3):
            phase(optimizer, number, step)


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


def launch_by_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("perturb", "update"):
        monkeypatch.setattr(one_call, name, lambda *arguments: None)

"""Optimizers around two groups, their steps, and single calls kept from happening."""

from __future__ import annotations

from collections.abc import Callable

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


def launch_by_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("perturb", "update"):
        monkeypatch.setattr(one_call, name, lambda *arguments: False)

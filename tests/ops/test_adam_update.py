"""adam_update_ on every backend: against the equations in float64, and torch's Adam and AdamW."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import TOLERANCE, assert_lists_as_accurate, assert_same_bits
from conftest import Backend
from samples import ADAM, DTYPES, SHAPES, doubles, lists, scalar, tensors, with_master
from torch import Tensor

from imbsam_fast import ops
from imbsam_fast.ops import reference

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

SETTINGS: list[dict[str, Any]] = [
    {},
    {"decoupled": False},
    {"amsgrad": True},
    {"decoupled": False, "maximize": True, "weight_decay": 0.1},
    {"weight_decay": 0.0, "eps": 1e-3, "beta1": 0.5, "beta2": 0.9},
]


def settings_id(changes: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in changes.items()) or "default"


each_setting = pytest.mark.parametrize("changes", SETTINGS, ids=settings_id)


def adam_stepped(
    x: SimpleNamespace, step: list[Tensor], lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, decoupled: bool, maximize: bool,
) -> tuple[list[Tensor], ...]:  # fmt: skip
    """theta, m, v and v_max after the step, in float64."""
    found: tuple[list[Tensor], ...] = ([], [], [], [])
    g_h = doubles(x.g_h) or [torch.zeros(())] * len(x.g_p)
    start = doubles(getattr(x, "master", []) or x.saved or x.theta)
    v_max = doubles(x.v_max) or [None] * len(start)
    for n, theta, h, p, m, v, bound in zip(
        step, start, g_h, doubles(x.g_p), doubles(x.m), doubles(x.v), v_max
    ):
        n = int(n) + 1
        d = -(h + p) if maximize else h + p
        d = d if decoupled else d + weight_decay * theta
        m = beta1 * m + (1 - beta1) * d
        v = beta2 * v + (1 - beta2) * d.square()
        largest = v if bound is None else torch.maximum(bound, v)
        update = m / (1 - beta1**n) / ((largest / (1 - beta2**n)).sqrt() + eps)
        stepped = theta - lr * (update + (weight_decay * theta if decoupled else 0))
        for list_, value in zip(found, (stepped, m, v, largest)):
            list_.append(value)
    return found


def run(implementation: Any, x: SimpleNamespace, step: list[Tensor], **settings: Any) -> None:
    lr = scalar(0.01, x.theta[0].device.type)
    implementation.adam_update_(
        x.theta, x.saved, x.g_h, x.g_p, x.m, x.v, x.v_max, step, lr, **{**ADAM, **settings},
        master=getattr(x, "master", ()),
    )  # fmt: skip


def counted(x: SimpleNamespace, first: int = 0) -> list[Tensor]:
    """The steps taken: other ones for each parameter."""
    return [torch.tensor(float(first + 37 * i), device=t.device) for i, t in enumerate(x.theta)]


@each_dtype
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("first", [0, 1000])
def test_adam_update(backend: Backend, case: str, dtype: torch.dtype, first: int) -> None:
    actual, plain, start = (lists(case, dtype, backend.device) for _ in range(3))
    for implementation, x in ((ops, actual), (reference, plain)):
        step = counted(x, first)
        run(implementation, x, step)
        assert [int(n) for n in step] == [first + 37 * i + 1 for i in range(len(step))]
    theta, m, v, v_max = adam_stepped(start, counted(start, first), 0.01, **ADAM)
    for name, truth in (("theta", theta), ("m", m), ("v", v), ("v_max", v_max)):
        assert_lists_as_accurate(getattr(actual, name), getattr(plain, name), truth)
    for name in ("saved", "g_h", "g_p"):
        assert_same_bits(getattr(actual, name), getattr(start, name))


@pytest.mark.parametrize("kept", ["like theta", "master"])
@pytest.mark.parametrize("absent", [(), ("saved",), ("g_h",), ("saved", "g_h")], ids=str)
@each_setting
def test_settings(backend: Backend, kept: str, absent: tuple[str, ...], changes: dict) -> None:
    dtype = torch.float32 if kept == "like theta" else torch.bfloat16
    settings = {**ADAM, **changes}
    amsgrad = settings.pop("amsgrad", False)
    actual, plain, start = (lists("odd", dtype, backend.device) for _ in range(3))
    for x in (actual, plain, start):
        if kept == "master":
            with_master(x)
        for name in (*absent, *(() if amsgrad else ("v_max",))):
            setattr(x, name, [])
    for implementation, x in ((ops, actual), (reference, plain)):
        run(implementation, x, counted(x), **settings)
    theta, m, v, v_max = adam_stepped(start, counted(start), 0.01, **settings)
    assert_lists_as_accurate(actual.m, plain.m, m)
    assert_lists_as_accurate(actual.v, plain.v, v)
    if amsgrad:
        assert_lists_as_accurate(actual.v_max, plain.v_max, v_max)
    if kept == "master":
        assert_lists_as_accurate(actual.master, plain.master, theta)
        assert_same_bits(actual.theta, [w.to(dtype) for w in actual.master])
    else:
        assert_lists_as_accurate(actual.theta, plain.theta, theta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_setting
def test_it_is_torchs_optimizer(backend: Backend, dtype: torch.dtype, changes: dict) -> None:
    settings = {**ADAM, **changes}
    theta, expected = (tensors("odd", dtype, 0, backend.device) for _ in range(2))
    m, v, v_max = ([torch.zeros_like(t) for t in theta] for _ in range(3))
    amsgrad = settings.pop("amsgrad", False)
    step = [torch.zeros((), device=backend.device) for _ in theta]
    optimizer = (torch.optim.AdamW if settings["decoupled"] else torch.optim.Adam)(
        expected, lr=0.01, betas=(settings["beta1"], settings["beta2"]), eps=settings["eps"],
        weight_decay=settings["weight_decay"], amsgrad=amsgrad, maximize=settings["maximize"],
    )  # fmt: skip
    for i in range(5):
        saved = [t.clone() for t in theta]
        g_h, g_p = (tensors("odd", dtype, 10 * i + k, backend.device) for k in (1, 2))
        for t, e, h, p in zip(theta, expected, g_h, g_p):
            t.fill_(7.0)  # the perturbed weights play no part
            e.grad = h + p
        optimizer.step()
        x = SimpleNamespace(theta=theta, saved=saved, g_h=g_h, g_p=g_p, m=m, v=v)
        run(ops, SimpleNamespace(**vars(x), v_max=v_max if amsgrad else []), step, **settings)
    tolerance = 20 * TOLERANCE[dtype]
    lists_of = {"exp_avg": m, "exp_avg_sq": v, "step": step}
    for name, actual in {**lists_of, **({"max_exp_avg_sq": v_max} if amsgrad else {})}.items():
        state = [optimizer.state[e][name].to(a) for e, a in zip(expected, actual)]
        torch.testing.assert_close(actual, state, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(theta, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_long_counts_and_both_dtypes_of_step(backend: Backend, dtype: torch.dtype) -> None:
    actual, plain = (lists("odd", torch.float64, backend.device) for _ in range(2))
    for implementation, x in ((ops, actual), (reference, plain)):
        step = [torch.tensor(1e6 + i, dtype=dtype, device=backend.device) for i in range(6)]
        run(implementation, x, step)
        assert [int(n) for n in step] == [1_000_001 + i for i in range(6)]
    torch.testing.assert_close(actual.theta, plain.theta, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_loss_scale_is_undone(backend: Backend, dtype: torch.dtype) -> None:
    scaled, unscaled = (lists("odd", dtype, backend.device) for _ in range(2))
    for g in (*scaled.g_h, *scaled.g_p):
        g.mul_(1024)  # a power of two scales without rounding
    grad_scale = torch.tensor([1024.0], device=backend.device)
    for x, scale in ((scaled, grad_scale), (unscaled, None)):
        run(ops, x, counted(x), grad_scale=scale)
    for name in ("theta", "m", "v", "v_max"):
        assert_same_bits(getattr(scaled, name), getattr(unscaled, name))


@each_dtype
@pytest.mark.parametrize("kept", ["saved", "", "master"])
def test_found_inf_only_restores(backend: Backend, dtype: torch.dtype, kept: str) -> None:
    if kept == "master" and dtype not in (torch.bfloat16, torch.float16):
        pytest.skip("master weights are for half dtypes")
    x, start = (lists("odd", dtype, backend.device) for _ in range(2))
    if kept == "master":
        with_master(x), with_master(start)
    elif not kept:
        x.saved = []
    x.g_p[0].fill_(float("nan"))
    x.g_h[-2].fill_(float("inf"))
    step = counted(x)
    run(ops, x, step, found_inf=torch.ones(1, device=backend.device))
    restored = {"saved": start.saved, "": start.theta}.get(kept)
    assert_same_bits(x.theta, restored or [w.to(dtype) for w in start.master])
    for name in ("m", "v", "v_max", *(["master"] if kept == "master" else [])):
        assert_same_bits(getattr(x, name), getattr(start, name))
    assert_same_bits(step, counted(x))
    x = lists("odd", dtype, backend.device)
    run(ops, x, step, found_inf=torch.zeros(1, device=backend.device))
    plain = lists("odd", dtype, backend.device)
    run(ops, plain, counted(plain))
    assert_same_bits([*x.theta, *x.m], [*plain.theta, *plain.m])
    assert [int(n) for n in step] == [int(n) + 1 for n in counted(x)]


def test_not_a_number_stays_in_the_bound(backend: Backend) -> None:
    """As in torch.maximum: what was not a number must not become a step again."""
    nan = float("nan")
    for v, v_max in ((nan, 1.0), (1.0, nan)):
        x = lists("one element", torch.float32, backend.device)
        x.v[0].fill_(v), x.v_max[0].fill_(v_max)
        run(ops, x, counted(x))
        assert x.v_max[0].isnan() and x.theta[0].isnan()

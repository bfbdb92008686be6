"""The updates of the fused bases on every backend: the equations in float64, torch's optimizers."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bases import BASES, LR, settings_of
from checks import TOLERANCE, assert_lists_as_accurate, assert_same_bits
from conftest import Backend
from samples import DTYPES, SHAPES, arguments_of, doubles, lists, scalar, tensors, with_master
from torch import Tensor

from imbsam_fast import ops
from imbsam_fast.ops import reference, updates
from imbsam_fast.optim import bases

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_op = pytest.mark.parametrize("op", BASES)
VARIANTS = [(op, variant) for op, base in BASES.items() for variant in ("", *base.variants)]
each_variant = pytest.mark.parametrize(
    ("op", "variant"), VARIANTS, ids=[f"{op} {variant}".strip() for op, variant in VARIANTS]
)


def truth(
    op: str, x: SimpleNamespace, step: list[Tensor], variant: str = ""
) -> dict[str, list[Tensor]]:
    """theta and the state after the step, in float64."""
    base = BASES[op]
    settings, without = settings_of(op, variant)
    maximize = settings.pop("maximize")
    found: dict[str, list[Tensor]] = {name: [] for name in ("theta", *base.state)}
    start = doubles(getattr(x, "master", []) or x.saved or x.theta)
    state = {name: doubles(getattr(x, name)) for name in base.state if name not in without}
    for i, (theta, p) in enumerate(zip(start, doubles(x.g_p))):
        g = doubles(x.g_h)[i] + p if x.g_h else p
        before = [state[name][i] if name in state else None for name in base.state]
        after = base.stepped(theta, -g if maximize else g, *before, int(step[i]) + 1, **settings)
        for list_, value in zip(found.values(), after):
            list_.append(value)
    return {name: list_ for name, list_ in found.items() if name in ("theta", *state)}


def run(
    implementation: Any, op: str, x: SimpleNamespace, step: list[Tensor], variant: str = "",
    **flags: Any,
) -> None:  # fmt: skip
    arguments = arguments_of(op, x, variant)
    if BASES[op].has_step:
        arguments["step"] = step
    getattr(implementation, op)(**arguments, **flags)


def counted(x: SimpleNamespace, first: int = 0) -> list[Tensor]:
    """The steps taken: other ones for each parameter."""
    return [torch.tensor(float(first + 37 * i), device=t.device) for i, t in enumerate(x.theta)]


def test_every_base_is_in_the_samples() -> None:
    assert list(BASES) == list(updates.UPDATES)
    assert set(BASES) == {base.operator for base in bases.BASES}


def test_the_argument_order_is_that_of_the_samples() -> None:
    for op, base in BASES.items():
        names = list(inspect.signature(getattr(reference, op)).parameters)
        step = ["step"] if base.has_step else []
        lists_ = ["theta", "saved", "g_h", "g_p", *base.state, *step]
        assert names == [*lists_, "lr", *base.settings, "grad_scale", "found_inf", "master"]
        assert names == list(inspect.signature(getattr(ops, op)).parameters)


@each_dtype
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("first", [0, 1000])
@each_op
def test_update(backend: Backend, op: str, case: str, dtype: torch.dtype, first: int) -> None:
    actual, plain, start = (lists(case, dtype, backend.device) for _ in range(3))
    for implementation, x in ((ops, actual), (reference, plain)):
        step = counted(x, first)
        run(implementation, op, x, step)
        taken = int(BASES[op].has_step)
        assert [int(n) for n in step] == [first + 37 * i + taken for i in range(len(step))]
    for name, expected in truth(op, start, counted(start, first)).items():
        assert_lists_as_accurate(getattr(actual, name), getattr(plain, name), expected)
    for name in ("saved", "g_h", "g_p"):
        assert_same_bits(getattr(actual, name), getattr(start, name))


@pytest.mark.parametrize("kept", ["like theta", "master"])
@pytest.mark.parametrize("absent", [(), ("saved",), ("g_h",), ("saved", "g_h")], ids=str)
@each_variant
def test_settings(
    backend: Backend, op: str, variant: str, kept: str, absent: tuple[str, ...]
) -> None:
    dtype = torch.float32 if kept == "like theta" else torch.bfloat16
    actual, plain, start = (lists("odd", dtype, backend.device) for _ in range(3))
    for x in (actual, plain, start):
        if kept == "master":
            with_master(x)
        for name in absent:
            setattr(x, name, [])
    for implementation, x in ((ops, actual), (reference, plain)):
        run(implementation, op, x, counted(x), variant)
    expected = truth(op, start, counted(start), variant)
    theta = expected.pop("theta")
    for name, list_ in expected.items():
        assert_lists_as_accurate(getattr(actual, name), getattr(plain, name), list_)
    if kept == "master":
        assert_lists_as_accurate(actual.master, plain.master, theta)
        assert_same_bits(actual.theta, [w.to(dtype) for w in actual.master])
    else:
        assert_lists_as_accurate(actual.theta, plain.theta, theta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_variant
def test_it_is_torchs_optimizer(
    backend: Backend, op: str, variant: str, dtype: torch.dtype
) -> None:
    base = BASES[op]
    settings, without = settings_of(op, variant)
    theta, expected = (tensors("odd", dtype, 0, backend.device) for _ in range(2))
    state = {
        name: [] if name in without else [torch.zeros_like(t) for t in theta] for name in base.state
    }
    step = [torch.zeros((), device=backend.device) for _ in theta]
    has = {name: name not in without for name in base.optional}
    optimizer = base.optimizer(expected, lr=LR, **has, **settings)
    for i in range(5):
        saved = [t.clone() for t in theta]
        g_h, g_p = (tensors("odd", dtype, 10 * i + k, backend.device) for k in (1, 2))
        for t, e, h, p in zip(theta, expected, g_h, g_p):
            t.fill_(7.0)  # the perturbed weights play no part
            e.grad = h + p
        optimizer.step()
        # torch.optim.SGD takes the first gradient undampened.
        now = settings | ({"dampening": 0.0} if i == 0 and "dampening" in settings else {})
        counts = {"step": step} if base.has_step else {}
        lists_ = {"theta": theta, "saved": saved, "g_h": g_h, "g_p": g_p, **state, **counts}
        getattr(ops, op)(**lists_, lr=scalar(LR, backend.device), **now)
    tolerance = 20 * TOLERANCE[dtype]
    (entry,) = {tuple(b.state) for b in bases.BASES if b.operator == op}
    names = dict(zip(entry, state.values())) | ({"step": step} if base.has_step else {})
    for name, actual in names.items():
        theirs = [optimizer.state[e][name].to(a) for e, a in zip(expected, actual)]
        torch.testing.assert_close(actual, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(theta, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", [op for op, base in BASES.items() if base.has_step])
def test_long_counts_and_both_dtypes_of_step(backend: Backend, op: str, dtype: torch.dtype) -> None:
    actual, plain = (lists("odd", torch.float64, backend.device) for _ in range(2))
    for implementation, x in ((ops, actual), (reference, plain)):
        step = [torch.tensor(1e6 + i, dtype=dtype, device=backend.device) for i in range(6)]
        run(implementation, op, x, step)
        assert [int(n) for n in step] == [1_000_001 + i for i in range(6)]
    torch.testing.assert_close(actual.theta, plain.theta, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@each_op
def test_the_loss_scale_is_undone(backend: Backend, op: str, dtype: torch.dtype) -> None:
    scaled, unscaled = (lists("odd", dtype, backend.device) for _ in range(2))
    for g in (*scaled.g_h, *scaled.g_p):
        g.mul_(1024)  # a power of two scales without rounding
    grad_scale = torch.tensor([1024.0], device=backend.device)
    for x, scale in ((scaled, grad_scale), (unscaled, None)):
        run(ops, op, x, counted(x), grad_scale=scale)
    for name in ("theta", *BASES[op].state):
        assert_same_bits(getattr(scaled, name), getattr(unscaled, name))


@each_dtype
@pytest.mark.parametrize("kept", ["saved", "", "master"])
@each_op
def test_found_inf_only_restores(backend: Backend, op: str, dtype: torch.dtype, kept: str) -> None:
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
    run(ops, op, x, step, found_inf=torch.ones(1, device=backend.device))
    restored = {"saved": start.saved, "": start.theta}.get(kept)
    assert_same_bits(x.theta, restored or [w.to(dtype) for w in start.master])
    for name in (*BASES[op].state, *(["master"] if kept == "master" else [])):
        assert_same_bits(getattr(x, name), getattr(start, name))
    assert_same_bits(step, counted(x))
    x = lists("odd", dtype, backend.device)
    run(ops, op, x, step, found_inf=torch.zeros(1, device=backend.device))
    plain = lists("odd", dtype, backend.device)
    run(ops, op, plain, counted(plain))
    for name in ("theta", *BASES[op].state):
        assert_same_bits(getattr(x, name), getattr(plain, name))
    if BASES[op].has_step:
        assert [int(n) for n in step] == [int(n) + 1 for n in counted(x)]


def test_not_a_number_stays_in_the_bound(backend: Backend) -> None:
    """As in torch.maximum: what was not a number must not become a step again."""
    nan = float("nan")
    for v, v_max in ((nan, 1.0), (1.0, nan)):
        x = lists("one element", torch.float32, backend.device)
        x.v[0].fill_(v), x.v_max[0].fill_(v_max)
        run(ops, "adam_update_", x, counted(x))
        assert x.v_max[0].isnan() and x.theta[0].isnan()

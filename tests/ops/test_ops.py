"""The operations of the optimizer phases, on every backend, against the equations in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from bases import BASES
from checks import (
    SUM_TOLERANCE,
    TOLERANCE,
    assert_lists_as_accurate,
    assert_same_bits,
    assert_sums,
)
from conftest import Backend
from samples import DTYPES, RHO, SGD, SHAPES, UPDATES, doubles, lists, tensors
from torch import Tensor

from imbsam_fast import ops
from imbsam_fast.ops import reference

NORM_GUARD = 1e-16

each_case = pytest.mark.parametrize("case", SHAPES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def remove(x: SimpleNamespace, *names: str) -> None:
    for name in names:
        setattr(x, name, [])


def chunk_sums(squares: list[Tensor]) -> Tensor:
    """The sum over every 32768 elements in memory order; channels_last is below one chunk."""
    sums = [part.sum() for s in squares for part in s.reshape(-1).split(32768) if part.numel()]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)


# ---------------------------------------------------------------- squared_norm


@each_dtype
@each_case
def test_squared_norm(backend: Backend, case: str, dtype: torch.dtype) -> None:
    g_t = tensors(case, dtype, 1, backend.device)
    assert_sums(ops.squared_norm(g_t), chunk_sums([g.square() for g in doubles(g_t)]))


@each_dtype
@each_case
def test_squared_norm_adaptive(backend: Backend, case: str, dtype: torch.dtype) -> None:
    theta, g_t = (tensors(case, dtype, seed, backend.device) for seed in (0, 1))
    squares = [(t * g).square() for t, g in zip(doubles(theta), doubles(g_t))]
    assert_sums(ops.squared_norm(g_t, theta), chunk_sums(squares))


# ---------------------------------------------------------------- perturb_


def perturbed(theta: list[Tensor], g_t: list[Tensor], adaptive: bool) -> list[Tensor]:
    """The weights theta + rho T^2 g / ||T g||, with T = |theta| if adaptive else 1."""
    scales = [t.abs() if adaptive else torch.ones_like(t) for t in theta]
    norm = sum((s * g).square().sum() for s, g in zip(scales, g_t)) ** 0.5
    return [t + RHO * s**2 * g / (norm + NORM_GUARD) for t, s, g in zip(theta, scales, g_t)]


@each_dtype
@each_case
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
def test_perturb(backend: Backend, case: str, dtype: torch.dtype, adaptive: bool) -> None:
    actual, plain, start = (lists(case, dtype, backend.device) for _ in range(3))
    truth = perturbed(doubles(start.theta), doubles(start.g_p), adaptive)
    partials = ops.squared_norm(start.g_p, start.theta if adaptive else ())

    ops.perturb_(actual.theta, actual.g_p, partials, RHO, adaptive)
    reference.perturb_(plain.theta, plain.g_p, partials, RHO, adaptive)

    assert_lists_as_accurate(actual.theta, plain.theta, truth)
    assert_same_bits(actual.g_p, start.theta)  # the gradient's buffer saves the weights


@each_dtype
@each_case
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
def test_perturb_takes_the_gradient_from_what_is_held(
    backend: Backend, case: str, dtype: torch.dtype, adaptive: bool
) -> None:
    actual, without, start = (lists(case, dtype, backend.device) for _ in range(3))
    partials = ops.squared_norm(start.g_p, start.theta if adaptive else ())

    ops.perturb_(actual.theta, actual.g_p, partials, RHO, adaptive, held=actual.g_h)
    ops.perturb_(without.theta, without.g_p, partials, RHO, adaptive)

    assert_same_bits(actual.theta, without.theta)
    assert_same_bits(actual.g_p, start.theta)
    assert_same_bits(actual.g_h, [h - g for h, g in zip(start.g_h, start.g_p)])  # one rounding


@each_dtype
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
def test_perturb_by_a_zero_gradient(backend: Backend, dtype: torch.dtype, adaptive: bool) -> None:
    theta, start = (tensors("odd", dtype, 0, backend.device) for _ in range(2))
    g_t = [torch.zeros_like(t) for t in theta]
    partials = ops.squared_norm(g_t, theta if adaptive else ())
    ops.perturb_(theta, g_t, partials, RHO, adaptive)
    assert_same_bits(theta, start)
    assert_same_bits(g_t, start)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
def test_perturb_where_squares_leave_float32(backend: Backend, size: float, adaptive: bool) -> None:
    # theta is 0 or 1 so that the perturbation itself is what is compared.
    g_t = [size * g for g in tensors("odd", torch.float32, 1, backend.device)]
    theta = [torch.full_like(g, float(adaptive)) for g in g_t]
    truth = perturbed(doubles(theta), doubles(g_t), adaptive)
    partials = ops.squared_norm(g_t, theta if adaptive else ())
    assert_sums(partials, chunk_sums([g.square() for g in doubles(g_t)]))

    ops.perturb_(theta, g_t, partials, RHO, adaptive)

    for actual, expected in zip(doubles(theta), truth):
        torch.testing.assert_close(actual, expected, rtol=TOLERANCE[torch.float32], atol=0)


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_perturb_sums_the_partials_it_is_given(backend: Backend, count: int) -> None:
    theta, g_t = ([torch.tensor([x], device=backend.device)] for x in (0.0, 2.0))
    partials = torch.full((count,), 16.0 / count, dtype=torch.float64, device=backend.device)
    ops.perturb_(theta, g_t, partials, rho=1.0)
    assert theta[0].item() == pytest.approx(0.5, rel=1e-7)


# ---------------------------------------------------------------- sgd_update_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=str)
def test_sgd_update_undoes_the_loss_scale(
    backend: Backend, dtype: torch.dtype, lr_dtype: torch.dtype
) -> None:
    scaled, unscaled = (lists("odd", dtype, backend.device) for _ in range(2))
    for g in (*scaled.g_h, *scaled.g_p):
        g.mul_(1024)  # a power of two scales without rounding
    lr = torch.tensor(0.125, dtype=lr_dtype, device=backend.device)
    grad_scale = torch.tensor([1024.0], device=backend.device)
    for x, scale in ((scaled, grad_scale), (unscaled, None)):
        ops.sgd_update_(x.theta, x.saved, x.g_h, x.g_p, x.m, lr, **SGD, grad_scale=scale)
    assert_same_bits(scaled.theta, unscaled.theta)
    assert_same_bits(scaled.m, unscaled.m)


# ---------------------------------------------------------------- merge_


@each_dtype
@each_case
def test_merge(backend: Backend, case: str, dtype: torch.dtype) -> None:
    actual, plain, start = (lists(case, dtype, backend.device) for _ in range(3))
    ops.merge_(actual.theta, actual.saved, actual.g_h, actual.g_p)
    reference.merge_(plain.theta, plain.saved, plain.g_h, plain.g_p)
    truth = [h + p for h, p in zip(doubles(start.g_h), doubles(start.g_p))]
    assert_lists_as_accurate(actual.g_p, plain.g_p, truth)
    assert_same_bits(actual.theta, start.saved)
    assert_same_bits(actual.saved, start.saved)
    assert_same_bits(actual.g_h, start.g_h)


@pytest.mark.parametrize("absent", [("saved",), ("g_h",), ("saved", "g_h")], ids=str)
def test_merge_without(backend: Backend, absent: tuple[str, ...]) -> None:
    x, start = (lists("odd", torch.float32, backend.device) for _ in range(2))
    remove(x, *absent)
    ops.merge_(x.theta, x.saved, x.g_h, x.g_p)
    assert_same_bits(x.theta, start.theta if "saved" in absent else start.saved)
    sums = [h + p for h, p in zip(start.g_h, start.g_p)]
    assert_same_bits(x.g_p, start.g_p if "g_h" in absent else sums)


# ---------------------------------------------------------------- grad_check


@each_dtype
@each_case
@pytest.mark.parametrize("head", [True, False])
def test_grad_check(backend: Backend, case: str, dtype: torch.dtype, head: bool) -> None:
    x = lists(case, dtype, backend.device)
    partials, found_inf = ops.grad_check(x.g_h if head else [], x.g_p)
    total = doubles(x.g_p)
    if head:
        total = [h + p for h, p in zip(doubles(x.g_h), total)]
    # g_h + g_p is rounded to the arithmetic dtype before it is squared.
    tolerance = SUM_TOLERANCE if dtype == torch.float64 else TOLERANCE[torch.float32]
    assert_sums(partials, chunk_sums([t.square() for t in total]), tolerance)
    assert_same_bits([found_inf.cpu()], [torch.zeros(1)])


@each_dtype
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["g_h", "g_p"])
@pytest.mark.parametrize(
    ("case", "tensor", "element"),
    [("one element", 0, 0), ("odd", 4, 0), ("odd", 4, 128), ("beyond a chunk", 0, 40000)],
)
def test_grad_check_finds(
    backend: Backend, dtype: torch.dtype, value: float, name: str, case: str, tensor: int,
    element: int,
) -> None:  # fmt: skip
    x = lists(case, dtype, backend.device)
    getattr(x, name)[tensor][element] = value
    assert ops.grad_check(x.g_h, x.g_p)[1].tolist() == [1.0]
    if name == "g_p":
        assert ops.grad_check([], x.g_p)[1].tolist() == [1.0]


def test_grad_check_finds_what_the_sum_makes(backend: Backend) -> None:
    def found(h: float, p: float) -> bool:
        g_h, g_p = ([torch.tensor([0.0, x], device=backend.device)] for x in (h, p))
        return ops.grad_check(g_h, g_p)[1].item() == 1.0

    assert found(3e38, 3e38)
    assert found(float("inf"), -float("inf"))
    assert not found(3e38, -3e38)
    assert not found(3e38, 0.0)  # whose square leaves float32


# ---------------------------------------------------------------- what autograd is told


@pytest.mark.parametrize(
    ("op", "written"),
    [
        ("perturb_", ("theta", "g_p")),
        *((op, ("theta", *base.state)) for op, base in BASES.items()),
        ("merge_", ("theta", "g_p")),
    ],
)
def test_writes_are_counted_for_autograd(
    backend: Backend, op: str, written: tuple[str, ...]
) -> None:
    x = lists("odd", torch.float32, backend.device)
    factor = torch.ones((), device=backend.device, requires_grad=True)
    products = {name: getattr(x, name)[0] * factor for name in vars(x)}
    UPDATES[op](x)
    for name, product in products.items():
        if name in written:  # the product needs the value that is gone
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.sum().backward()
        else:
            product.sum().backward()


def test_parameters_that_require_gradients(backend: Backend) -> None:
    x: SimpleNamespace = lists("odd", torch.float32, backend.device)
    x.theta = [torch.nn.Parameter(t) for t in x.theta]
    run: Callable[[SimpleNamespace], list[Tensor]] = UPDATES["sgd_update_"]
    assert all(t.grad_fn is None for t in run(x))

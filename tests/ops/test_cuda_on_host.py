"""What the CUDA kernels compute, without a GPU: the PTX that nvcc makes of them, and their sources.

tests/cuda_on_host/ translates the PTX of the oldest GPUs; with IMBSAM_PTX=all also of sm_90 and of
the newest that nvcc knows, and compiles the sources for the CPU as they are. The same tests run
over all of it. They show wrong arithmetic, indices, tiles and barriers, and misaligned access; they
cannot show what only a GPU has: ptxas, the order of memory accesses, the very rounding of exp2,
time.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from bases import BASES
from checks import SUM_TOLERANCE, assert_same_bits, assert_sums
from cuda_on_host import build
from samples import (
    DTYPES,
    KEEPING,
    NAMES,
    SHAPES,
    SUMS,
    UPDATES,
    arguments_of,
    as_state,
    lists,
    with_master,
)
from torch import Tensor
from two_groups import OPTIONS, launch_by_launch, needs_single_calls, optioned, same_bits

from imbsam_fast import ops
from imbsam_fast.ops import dispatch, native, native_cuda, reference

pytestmark = pytest.mark.slow  # compiles the CUDA sources

if (reason := build.reason_unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

SUM_OF_FLOATS_TOLERANCE = 2**-41  # as csrc/cuda/squared_norm.cu proves

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_case = pytest.mark.parametrize("case", SHAPES)


@pytest.fixture(scope="module")
def host() -> build.Host:
    """The module _C with the CUDA kernels on the CPU."""
    return build.Host(build.build_sources())


@pytest.fixture(scope="module", params=build.code())
def kernels(request: pytest.FixtureRequest, host: build.Host) -> Iterator[build.Host]:
    """The kernels as their sources say, or as the PTX of one architecture does."""
    if request.param != "sources":
        host.run_ptx(build.build_all_ptx(host.path, request.param))
    yield host
    host.run_sources()


@pytest.fixture(autouse=True)
def on_host(
    kernels: build.Host, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[build.Host]:
    """Makes CPU tensors take the way of CUDA tensors."""

    def select(device: torch.device) -> ModuleType:
        return native_cuda if dispatch.backend_name("cpu") == "native" else reference

    kernels.seed(zlib.crc32(request.node.name.encode()))
    monkeypatch.setattr(native_cuda, "_C", kernels.module)
    monkeypatch.setattr(native_cuda, "_on", lambda device: (0, 0))
    monkeypatch.setattr(dispatch, "select", select)
    with dispatch.use_backend("native"):
        yield kernels


def on_reference(run: Any, x: SimpleNamespace) -> list[Tensor]:
    with dispatch.use_backend("reference"):
        return run(x)


def on_cpu_kernels(run: Any, x: SimpleNamespace) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "select", lambda device: native)
        return run(x)


# ---------------------------------------------------------------- the optimizer phases


@each_dtype
@each_case
@pytest.mark.parametrize("name", UPDATES)
def test_updates_equal_the_cpu_kernels(name: str, case: str, dtype: torch.dtype) -> None:
    expected = on_cpu_kernels(UPDATES[name], lists(case, dtype))
    assert_same_bits(UPDATES[name](lists(case, dtype)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_case
@pytest.mark.parametrize("name", KEEPING)
def test_updates_with_master_weights_equal_the_cpu_kernels(
    name: str, case: str, dtype: torch.dtype
) -> None:
    expected = on_cpu_kernels(UPDATES[name], with_master(lists(case, dtype)))
    assert_same_bits(UPDATES[name](with_master(lists(case, dtype))), expected)


@each_dtype
@pytest.mark.parametrize("case", [case for case in SHAPES if case != "many"])  # slow here
@pytest.mark.parametrize("name", SUMS)
def test_sums_equal_the_reference_but_for_their_order(
    name: str, case: str, dtype: torch.dtype
) -> None:
    x = lists(case, dtype)
    tolerance = SUM_TOLERANCE if dtype == torch.float64 else SUM_OF_FLOATS_TOLERANCE
    for actual, expected in zip(SUMS[name](x), on_reference(SUMS[name], x)):
        assert_sums(actual.double(), expected.double(), tolerance)


def test_sums_do_not_depend_on_the_alignment() -> None:
    g_t = torch.randn(40_001, generator=torch.Generator().manual_seed(0))
    shifted = torch.empty(len(g_t) + 1)[1:].copy_(g_t)
    assert_same_bits([ops.squared_norm([shifted])], [ops.squared_norm([g_t])])


@pytest.mark.parametrize("name", UPDATES)
def test_more_tensors_than_one_launch_takes(name: str) -> None:
    def many() -> SimpleNamespace:
        sizes = random.Random(0).choices([0, 1, 3, 8, 33], k=1500)
        blocks = (tensor.split(sizes) for tensor in torch.rand(len(NAMES), sum(sizes)))
        return as_state(SimpleNamespace(**dict(zip(NAMES, blocks))))

    torch.manual_seed(0)
    expected = on_cpu_kernels(UPDATES[name], many())
    torch.manual_seed(0)
    assert_same_bits(UPDATES[name](many()), expected)


def test_partial_sums_of_more_tensors_than_one_launch_takes() -> None:
    numbers = torch.arange(1.0, 1200.0)
    assert_same_bits([ops.squared_norm(list(numbers.split(1)))], [numbers.double().square()])


@pytest.mark.parametrize("count", [1, 31, 33, 255, 257, 1023, 1025, 3000])
def test_perturb_sums_all_partials(count: int) -> None:
    """Powers of two, whose sums are exact in every order."""
    partials = torch.full((count,), 2.0**-20, dtype=torch.float64)
    partials[-1] = partials[count // 2] = 2.0**-3

    def run(x: SimpleNamespace) -> list[Tensor]:
        ops.perturb_(x.theta, x.g_t, partials, 0.05)
        return [*x.theta, *x.g_t]

    def make() -> SimpleNamespace:
        theta, g_t = torch.linspace(1, 2, 2 * 40).reshape(2, 40).unbind()
        return SimpleNamespace(theta=[theta.clone()], g_t=[g_t.clone()])

    assert_same_bits(run(make()), on_cpu_kernels(run, make()))


# Exponents of ten: squares of floats that underflow, that just do not, and that overflow.
@pytest.mark.parametrize("exponent", [-44, -30, -19, -15, 0, 15, 18.5, 25, 37])
@pytest.mark.parametrize("name", SUMS)
def test_sums_of_squares_beyond_float(name: str, exponent: float) -> None:
    x = lists("beyond a chunk", torch.float32)
    for list_ in (x.g_h, x.g_p):
        for tensor in list_:
            tensor.mul_(10.0**exponent)
            tensor[:: 3 if exponent else 1].mul_(1e-3)  # large and small ones in a pack
            tensor[16:32] = 0
    for actual, expected in zip(SUMS[name](x), on_reference(SUMS[name], x)):
        assert_sums(actual.double(), expected.double(), SUM_OF_FLOATS_TOLERANCE)


@each_dtype
@pytest.mark.parametrize("name", UPDATES)
def test_nothing_around_the_tensors_is_written(name: str, dtype: torch.dtype) -> None:
    """Whatever their alignment, and whether the last pack is whole."""
    for start in (0, 1, 16):
        for n in (1, 15, 16, 31):
            memory = {list_: torch.full((64,), 7.0, dtype=dtype) for list_ in NAMES}
            x = SimpleNamespace(**{k: [v[start : start + n]] for k, v in memory.items()})
            for k in NAMES:
                getattr(x, k)[0].fill_(1.0)
            as_state(x)
            UPDATES[name](x)
            for v in memory.values():
                assert v[:start].eq(7).all() and v[start + n :].eq(7).all()


def sectors_used(noted: list[tuple[int, int, int, int]]) -> float:
    """The share of the 32-byte sectors that a warp's accesses touch that they use.

    Of those in which all 32 threads access different addresses.
    """
    by_turn: dict[tuple[int, int], list[tuple[int, int]]] = {}
    turns: Counter[tuple[int, int]] = Counter()
    for instruction, thread, address, size in noted:
        turn = turns[instruction, thread]
        turns[instruction, thread] += 1
        by_turn.setdefault((instruction, turn), []).append((address, size))
    used = touched = 0
    for accesses in by_turn.values():
        if len(set(accesses)) == 32:
            used += sum(size for _, size in accesses)
            touched += 32 * len({b // 32 for a, size in accesses for b in range(a, a + size)})
    return used / touched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", UPDATES)
def test_one_misaligned_list_is_accessed_coalesced(
    on_host: build.Host, kernels: build.Host, name: str, dtype: torch.dtype
) -> None:
    """With whole packs a thread, single elements used 1/8 of the sectors of a bfloat16 list."""
    if on_host.is_source:
        pytest.skip("sources do not tell their accesses")
    x = SimpleNamespace(**{k: [torch.rand(8193, dtype=dtype)[1:]] for k in NAMES})
    kernels.noted(True)
    UPDATES[name](x)
    assert sectors_used(kernels.noted(False)) > 0.6


@pytest.fixture
def scalars_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes lr, grad_scale and found_inf what the kernel reads, as on a GPU."""

    def scalar_on_device(
        scalar: Tensor | None, device: torch.device, dtype: torch.dtype, default: float = 0.0
    ) -> tuple[float, Tensor | None]:
        return default, None if scalar is None else scalar.to(dtype)

    monkeypatch.setattr(native_cuda, "_scalar", scalar_on_device)


@each_dtype
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("kept", ["saved", "", "master"])
@pytest.mark.parametrize("op", BASES)
def test_scalars_on_the_device(
    scalars_on_device: None, op: str, dtype: torch.dtype, found_inf: float, kept: str
) -> None:
    def run(x: SimpleNamespace) -> list[Tensor]:
        arguments = arguments_of(op, x)
        flags = {"grad_scale": torch.tensor([8.0]), "found_inf": torch.tensor([found_inf])}
        getattr(ops, op)(**arguments, **flags)
        return [t for list_ in vars(x).values() for t in list_] + arguments.get("step", [])

    def make() -> SimpleNamespace:
        x = lists("odd", dtype)
        if kept == "master":
            return with_master(x)
        return x if kept else SimpleNamespace(**{**vars(x), "saved": []})

    if kept == "master" and dtype not in (torch.bfloat16, torch.float16):
        pytest.skip("master weights are for half dtypes")
    assert_same_bits(run(make()), on_cpu_kernels(run, make()))


@needs_single_calls
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_single_calls_equal_launch_by_launch(
    scalars_on_device: None,
    single_calls: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> None:
    _, found = optioned("SGD", dtype, options)
    assert single_calls[2:] == [True] * 10
    launch_by_launch(monkeypatch)
    assert same_bits(found, optioned("SGD", dtype, options)[1])


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_flag_of_grad_check_is_float32(default: torch.dtype) -> None:
    """Whatever dtype new tensors have: the kernel writes four bytes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        flag = ops.grad_check([], [torch.tensor([torch.inf], dtype=torch.float32)])[1]
    finally:
        torch.set_default_dtype(before)
    assert (flag.dtype, flag.tolist()) == (torch.float32, [1.0])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("element", [0, 32767, 32768, 40_000])
def test_grad_check_finds(value: float, element: int) -> None:
    g_h, g_p = torch.zeros(2, 40_001)
    assert ops.grad_check([g_h], [g_p])[1].tolist() == [0.0]
    g_p[element] = value
    assert ops.grad_check([g_h], [g_p])[1].tolist() == [1.0]
    assert ops.grad_check([], [g_p])[1].tolist() == [1.0]

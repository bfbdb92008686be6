"""What the CUDA kernels compute, without a GPU: their sources, and the PTX that nvcc makes of them.

tests/cuda_on_host/ compiles the sources for the CPU as they are, and translates the PTX of the
oldest GPUs; with IMBSAM_PTX=all also of sm_90 and of the newest that nvcc knows. The same tests run
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
from checks import SUM_TOLERANCE, assert_as_accurate, assert_same_bits, assert_sums
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
    class_weights,
    distributions,
    lists,
    logits_and_targets,
    with_master,
)
from test_soft_targets import OPTIONS as SOFT_OPTIONS
from test_soft_targets import check as check_soft
from test_soft_targets import formula as soft_formula
from test_split_cross_entropy import LAYOUTS, OPTIONS, PARTS, check
from torch import Tensor

from imbsam_fast import ops
from imbsam_fast.ops import dispatch, native, native_cuda, reference
from imbsam_fast.ops.reference import arithmetic_dtype

pytestmark = pytest.mark.slow  # compiles the CUDA sources

if (reason := build.reason_unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

CODE = ["sources", *build.architectures()]

SUM_OF_FLOATS_TOLERANCE = 2**-41  # as csrc/cuda/squared_norm.cu proves

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_case = pytest.mark.parametrize("case", SHAPES)


@pytest.fixture(scope="module")
def host() -> build.Host:
    """The module _C with the CUDA kernels on the CPU."""
    return build.Host(build.build_sources())


@pytest.fixture(scope="module", params=CODE)
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
        scalar: Tensor | None, like: Tensor, default: float = 0.0
    ) -> tuple[float, Tensor | None]:
        return default, None if scalar is None else scalar.to(arithmetic_dtype(like.dtype))

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


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("element", [0, 32767, 32768, 40_000])
def test_grad_check_finds(value: float, element: int) -> None:
    g_h, g_p = torch.zeros(2, 40_001)
    assert ops.grad_check([g_h], [g_p])[1].tolist() == [0.0]
    g_p[element] = value
    assert ops.grad_check([g_h], [g_p])[1].tolist() == [1.0]
    assert ops.grad_check([], [g_p])[1].tolist() == [1.0]


# ---------------------------------------------------------------- the loss


@each_dtype
@pytest.mark.parametrize(
    ("rows", "classes"),
    [(0, 5), (1, 1), (3, 7), (5, 64), (5, 1003), (3, 8142), (1, 33_000), (8195, 3)],
)
def test_cross_entropy(rows: int, classes: int, dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(rows, classes, dtype)
    plain, sharp, _ = class_weights(classes, dtype)
    check(logits, targets, plain, sharp, batch_size=16.0)  # float16 could not hold 1 / 8195


@each_dtype
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "class_weight"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_cross_entropy_options(
    part: str, weighted: bool, options: dict, dtype: torch.dtype
) -> None:
    logits, targets = logits_and_targets(7, 301, dtype)
    targets[::4] = 3
    plain, sharp, class_weight = class_weights(301, dtype)
    check(logits, targets, plain, sharp, class_weight if weighted else None, part=part, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cross_entropy_of_strided_logits(layout: Any, dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(5, 37, dtype)
    check(layout(logits), targets, *class_weights(37, dtype), label_smoothing=0.1)


@each_dtype
@pytest.mark.parametrize("classes", [1, 7, 33, 1003, 5000])
def test_the_maximum_of_a_row_is_exact(classes: int, dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(9, classes, dtype)
    for i, row in enumerate(logits):
        row[i * 997 % classes] = 100 + i  # of another warp in each row
    plain, sharp, _ = class_weights(classes, dtype)
    arguments = logits, targets, plain, sharp, None, 0.0, -100, None
    lse = native_cuda.split_cross_entropy(*arguments)[3]
    assert_same_bits([lse[:, 0]], [logits.amax(dim=1).to(lse.dtype)])


@each_dtype
@pytest.mark.parametrize("classes", [9, 24, 40, 301, 1003])
def test_gradients_aligned_otherwise_than_logits(classes: int, dtype: torch.dtype) -> None:
    """Rows of a padded vocabulary, from every alignment."""
    padded, targets = logits_and_targets(9, classes + 13, dtype)
    logits = padded[:, 3 : 3 + classes]
    check(logits, targets % classes, *class_weights(classes, dtype), label_smoothing=0.1)


@each_dtype
@pytest.mark.parametrize("ascending", [True, False])
def test_the_maximum_of_a_row_rises_and_falls(ascending: bool, dtype: torch.dtype) -> None:
    """The running maximum changes with every pack, or never after the first."""
    logits = torch.linspace(-40, 40, 3 * 5000).reshape(3, 5000).to(dtype)
    logits = logits if ascending else logits.flip(1)
    targets = torch.tensor([0, 2500, 4999])
    plain, sharp, class_weight = class_weights(5000, dtype)
    check(logits, targets, plain, sharp, class_weight, label_smoothing=0.1)


@each_dtype
def test_masked_classes_and_not_a_number(dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(6, 700, dtype)
    plain = sharp = torch.ones(700, dtype=arithmetic_dtype(dtype))
    logits[:, :600] = -float("inf")  # whole packs of some threads
    targets = 600 + targets % 100
    check(logits, targets, plain, sharp)
    logits[1, 5], logits[2, 650] = float("nan"), float("inf")
    logits[3] = -float("inf")
    _, _, b, lse = native_cuda.split_cross_entropy(
        logits, targets, plain, sharp, None, 0.0, -100, None
    )
    gradient = native_cuda.split_cross_entropy_backward(
        torch.ones_like(b), None, logits, targets, lse, b, plain, sharp, None, 0.0, -100
    )
    assert gradient.isnan().any(dim=1).tolist() == [False, True, True, True, False, False]


@each_dtype
def test_rows_without_weight_are_not_read(dtype: torch.dtype) -> None:
    logits, targets = logits_and_targets(8, 33, dtype)
    plain, sharp, _ = class_weights(33, dtype)
    targets[:4] = torch.tensor([-100, 2, 5, 8])  # ignored, or of plain weight 0
    arguments = targets, plain, sharp, None, 0.0, -100
    _, _, b, lse = native_cuda.split_cross_entropy(logits, *arguments, None)
    rest = lse, b, plain, sharp, None, 0.0, -100
    logits[:4] = float("nan")
    gradient = native_cuda.split_cross_entropy_backward(
        torch.ones_like(b), None, logits, targets, *rest
    )
    assert_same_bits([gradient[:4]], [torch.zeros(4, 33, dtype=dtype)])
    assert gradient[4:].isfinite().all()


# ---------------------------------------------------------------- label distributions


@each_dtype
@pytest.mark.parametrize(
    ("rows", "classes"),
    [(0, 5), (1, 1), (3, 7), (5, 64), (5, 1003), (2, 8142), (1, 33_000)],
)
def test_soft_cross_entropy(rows: int, classes: int, dtype: torch.dtype) -> None:
    logits, q = distributions(rows, classes, dtype)
    plain, sharp, _ = class_weights(classes, dtype)
    check_soft(logits, q, plain, sharp, batch_size=16.0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)  # in which losses are added up
def test_soft_losses_of_more_rows_than_a_block_adds_up(dtype: torch.dtype) -> None:
    logits, q = distributions(8195, 3, dtype)
    arguments = logits, q, *class_weights(3, dtype)[:2], None, 0.0, None
    found = native_cuda.split_soft_cross_entropy(*arguments)
    plain = reference.split_soft_cross_entropy(*arguments)
    truth = soft_formula(*(x.double() for x in arguments[:4]))
    for a, p, t in zip(found[:2], plain[:2], truth):
        assert_as_accurate(a, p, t, scale=t.abs())
    assert found[2] == plain[2] == (q != 0).any(1).sum() < 8195


@each_dtype
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "class_weight"])
@pytest.mark.parametrize("options", SOFT_OPTIONS.values(), ids=list(SOFT_OPTIONS))
def test_soft_cross_entropy_options(
    part: str, weighted: bool, options: dict, dtype: torch.dtype
) -> None:
    logits, q = distributions(7, 301, dtype)
    plain, sharp, class_weight = class_weights(301, dtype)
    check_soft(logits, q, plain, sharp, class_weight if weighted else None, part=part, **options)


@each_dtype
@pytest.mark.parametrize("classes", [9, 24, 301])
def test_distributions_aligned_otherwise_than_logits(classes: int, dtype: torch.dtype) -> None:
    logits, q = distributions(9, classes + 13, dtype)
    weights = class_weights(classes, dtype)
    check_soft(logits[:, 3 : 3 + classes], q[:, 1 : 1 + classes], *weights, label_smoothing=0.1)
    wide, other = distributions(9, classes, dtype)
    check_soft(wide, q[:, 3 : 3 + classes], *weights)
    check_soft(logits[:, 1 : 1 + classes], other, *weights)


@pytest.mark.parametrize("which", ["logits", "q"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_soft_cross_entropy_of_strided_rows(layout: Any, which: str) -> None:
    logits, q = distributions(5, 37, torch.float32)
    if which == "logits":
        logits = layout(logits)
    else:
        q = layout(q)
    check_soft(logits, q, *class_weights(37, torch.float32), label_smoothing=0.1)


@each_dtype
def test_classes_that_are_masked_where_q_is_0(dtype: torch.dtype) -> None:
    logits, q = distributions(6, 700, dtype)
    q[:, :600] = 0
    logits[:, :600] = -float("inf")  # whole packs of some threads
    plain, sharp, _ = class_weights(700, dtype)
    check_soft(logits, q, plain, sharp)
    plain[650:] = sharp[650:] = 0  # a class without weight counts nothing either
    logits[:, 660:] = -float("inf")
    found = native_cuda.split_soft_cross_entropy(logits, q, plain, sharp, None, 0.0, None)
    assert all(value.isfinite().all() for value in found)


@each_dtype
def test_soft_rows_without_weight_are_not_read(dtype: torch.dtype) -> None:
    logits, q = distributions(8, 33, dtype)
    plain, sharp, _ = class_weights(33, dtype)
    q[:4] = 0
    q[1, 2] = q[2, 5] = q[3, 8] = 1  # of plain weight 0
    _, _, b, rows = native_cuda.split_soft_cross_entropy(logits, q, plain, sharp, None, 0.0, None)
    logits[:4] = q[:4] = float("nan")
    gradient = native_cuda.split_soft_cross_entropy_backward(
        torch.ones_like(b), None, logits, q, rows, b, plain, sharp, None, 0.0
    )
    assert_same_bits([gradient[:4]], [torch.zeros(4, 33, dtype=dtype)])
    assert gradient[4:].isfinite().all()

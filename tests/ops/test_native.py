"""The compiled module: the same bits on every instruction set and number of threads, refusals."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import SimpleNamespace

import pytest
import torch
from bases import BASES
from checks import assert_equal_but_for_roots, assert_same_bits
from conftest import Backend
from samples import (
    DTYPES,
    KEEPING,
    NAMES,
    SHAPES,
    SUMS,
    UPDATES,
    as_state,
    cross_entropy_outputs,
    lists,
    tensors,
    with_master,
)
from torch import Tensor

from imbsam_fast import ops
from imbsam_fast.ops import native
from imbsam_fast.ops.dispatch import use_backend
from imbsam_fast.ops.reference import CHUNK

pytestmark = pytest.mark.skipif(
    native.reason_unavailable("cpu") is not None, reason=str(native.reason_unavailable("cpu"))
)

each_case = pytest.mark.parametrize("case", SHAPES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def each_name(operations: Collection[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", operations)


# ---------------------------------------------------------------- bit equality


def on(isa: str, run: Callable[[], list[Tensor]]) -> list[Tensor]:
    with use_backend("native"), native.use_isa(isa):
        return run()


@each_dtype
@each_case
@each_name(UPDATES)
def test_updates_equal_the_reference(name: str, case: str, dtype: torch.dtype) -> None:
    assert_updates_equal(name, lambda: lists(case, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_case
@each_name(KEEPING)
def test_updates_with_master_weights_equal_the_reference(
    name: str, case: str, dtype: torch.dtype
) -> None:
    assert_updates_equal(name, lambda: with_master(lists(case, dtype)))


def assert_updates_equal(name: str, make: Callable[[], SimpleNamespace]) -> None:
    with use_backend("reference"):
        expected = UPDATES[name](make())
    results = [on(isa, lambda: UPDATES[name](make())) for isa in native.isas()]
    op = name.partition(" ")[0]
    if op in BASES and BASES[op].has_roots:
        assert_equal_but_for_roots(results[0], expected)
        expected = results[0]
    for result in results:
        assert_same_bits(result, expected)


@each_dtype
@each_case
@each_name(SUMS)
def test_sums_are_the_same_on_every_isa(name: str, case: str, dtype: torch.dtype) -> None:
    x = lists(case, dtype)
    baseline, *others = (on(isa, lambda: SUMS[name](x)) for isa in native.isas())
    for other in others:
        assert_same_bits(other, baseline)


@each_dtype
@pytest.mark.parametrize("classes", [1, 2, 10, 100, 1003])
def test_cross_entropy_is_the_same_on_every_isa(classes: int, dtype: torch.dtype) -> None:
    baseline, *others = (
        on(isa, lambda: cross_entropy_outputs(64, classes, dtype)) for isa in native.isas()
    )
    for other in others:
        assert_same_bits(other, baseline)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@each_name({**UPDATES, **SUMS})
def test_lists_do_not_depend_on_the_threads(
    set_threads: Callable[[int], None], name: str, dtype: torch.dtype
) -> None:
    # 13 tensors of unequal sizes: every number of threads cuts elsewhere.
    sizes = [n * 3001 for n in range(13)]

    def run(threads: int) -> list[Tensor]:
        set_threads(threads)
        x = SimpleNamespace(**{name: repeated(sizes, dtype, i) for i, name in enumerate(NAMES)})
        return {**UPDATES, **SUMS}[name](as_state(x))

    with use_backend("native"):
        alone = run(1)
        for threads in (2, 3, 7):
            assert_same_bits(run(threads), alone)


def repeated(sizes: list[int], dtype: torch.dtype, seed: int, offset: int = 0) -> list[Tensor]:
    """Tensors of these sizes, cheaply: one block of normal values over and over."""
    block = tensors("misaligned", dtype, seed)[0]
    return [block.repeat(n // len(block) + 2)[offset : offset + n] for n in sizes]


@pytest.mark.parametrize("element", [0, 33_333, 99_999])
def test_every_thread_reports_what_is_not_finite(
    set_threads: Callable[[int], None], element: int
) -> None:
    set_threads(3)
    g_p = torch.zeros(100_000)
    with use_backend("native"):
        assert ops.grad_check([], [g_p])[1].item() == 0
        g_p[element] = float("nan")
        assert ops.grad_check([], [g_p])[1].item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cross_entropy_does_not_depend_on_the_threads(
    set_threads: Callable[[int], None], dtype: torch.dtype
) -> None:
    def run(threads: int) -> list[Tensor]:
        set_threads(threads)
        return cross_entropy_outputs(131, 1003, dtype)

    with use_backend("native"):
        alone = run(1)
        for threads in (2, 3, 7):
            assert_same_bits(run(threads), alone)


# ---------------------------------------------------------------- half dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_a_half_dtype(cpu_kernels: Backend, dtype: torch.dtype) -> None:
    """Subnormal, infinite and not-a-number included: read, added, rounded and copied."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    shuffled = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    for other in (torch.full_like(every, -0.0), shuffled, every.flip(0), every):
        theta, g_p = torch.zeros_like(every), other.clone()
        ops.merge_([theta], [every], [every.clone()], [g_p])
        assert_same_bits([theta], [every])
        expected = (every.float() + other.float()).to(dtype)
        number = ~expected.isnan()
        assert_same_bits([g_p[number]], [expected[number]])
        assert g_p[~number].isnan().all() and number.sum() > 60_000


# ---------------------------------------------------------------- data beyond the caches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", BASES)
def test_streaming_writes_what_plain_stores_write(op: str, dtype: torch.dtype) -> None:
    """One call on more data than the cache holds equals one call per tensor, which streams not."""
    state = BASES[op].state
    # merge_ has the fewest lists: 4.
    elements = native._C.last_level_cache_bytes() // (4 * dtype.itemsize) + 1000
    sizes = [elements // 3 + 1, elements // 3 + 6, elements // 3 + 11]
    # Every list starts at another distance from the alignment that streaming needs.
    x = as_state(
        SimpleNamespace(
            **{
                name: repeated(sizes, dtype, i, offset=1 + 3 * i)
                for i, name in enumerate(("theta", "saved", "g_h", "g_p", *state))
            }
        )
    )
    before = {name: [t.clone() for t in getattr(x, name)] for name in state}
    stepped: list[Tensor] = []

    with use_backend("native"):
        for i in range(len(sizes)):
            # Beside two empty tensors, for the count of steps that it has among the others.
            one = SimpleNamespace(
                **{
                    name: [t if j == i else t[:0] for j, t in enumerate(list_)]
                    for name, list_ in vars(x).items()
                }
            )
            UPDATES[op](one)
            stepped += [getattr(one, name)[i].clone() for name in ("theta", *state)]
        for isa in native.isas():
            torch._foreach_zero_(x.theta)
            for name, list_ in before.items():
                torch._foreach_copy_(getattr(x, name), list_)
            with native.use_isa(isa):
                UPDATES[op](x)
            found = [getattr(x, name)[i] for i in range(len(sizes)) for name in ("theta", *state)]
            assert all(map(torch.equal, found, stepped))
            with native.use_isa(isa):
                ops.merge_(x.theta, x.saved, [], x.g_p)  # only restores
            assert all(map(torch.equal, x.theta, x.saved))


@pytest.mark.parametrize("numel", [0, 3, 100, 2 * CHUNK + 5])
@pytest.mark.parametrize("kind, stream", [("copy", False), ("copy", True), ("triad", False),
                                          ("triad", True), ("read", False)])  # fmt: skip
def test_bandwidth(cpu_kernels: Backend, kind: str, stream: bool, numel: int) -> None:
    # Small integers, whose sums are exact; each array at another distance from alignment.
    generator = torch.Generator().manual_seed(0)
    memory = [torch.randint(-9, 9, (numel + 8,), generator=generator).float() for _ in range(3)]
    a, b, c = (x[i : i + numel] for i, x in enumerate(memory, 1))
    before = memory[0].clone()
    sum_ = native._C.bandwidth(kind, stream, *(x.data_ptr() for x in (a, b, c)), numel, 2)
    assert sum_ == (b.sum().item() if kind == "read" else 0)
    before[1 : 1 + numel] = {"read": a, "copy": b, "triad": b + 3 * c}[kind]
    assert_same_bits([memory[0]], [before])


@pytest.mark.parametrize(
    "kind, stream, a, b, c, numel, expected",
    [
        ("write", False, 4, 4, 4, 1, "kind is 'write', expected read, copy or triad"),
        ("read", True, 4, 4, 4, 1, "stream is true, expected false for read"),
        ("copy", True, 4, 4, 0, -1, "numel is -1, expected >= 0"),
        ("read", False, 0, 0, 0, 1, "b is a null pointer"),
        ("copy", False, 0, 4, 0, 1, "a is a null pointer"),
        ("triad", False, 4, 4, 0, 1, "c is a null pointer"),
        ("triad", True, 6, 4, 4, 1, "a is 6, expected a multiple of 4"),
    ],
)
def test_bandwidth_refuses(kind, stream, a, b, c, numel, expected) -> None:
    with pytest.raises(ValueError, match=f"^bandwidth: {expected}$"):
        native._C.bandwidth(kind, stream, a, b, c, numel, 1)


# ---------------------------------------------------------------- what _C reads of a tensor


def reads_tensors() -> bool:
    return hasattr(torch.Tensor, "__dlpack_c_exchange_api__")  # torch >= 2.10


class Subclass(torch.Tensor):
    pass


DENSE = {
    "contiguous": torch.ones(2, 3, 4, 5),
    "channels_last": torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "parameter": torch.nn.Parameter(torch.ones(3)),
    "scalar": torch.ones(()),
    "empty": torch.ones(0, 3),
    "one row": torch.ones(4, 3)[:1],
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
}
NOT_FOR_C = {
    "with gaps": torch.ones(4, 6)[:, ::2],
    "expanded": torch.ones(1).expand(3),
    "int64": torch.ones(3, dtype=torch.int64),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "sparse": torch.ones(3).to_sparse(),
    "meta": torch.ones(3, device="meta"),
    "subclass": torch.ones(3).as_subclass(Subclass),
    "no tensor": "x",
    "nothing": None,
}


@pytest.mark.parametrize("name", DENSE)
def test_lists_that_match_are_seen_at_once(name: str) -> None:
    t = DENSE[name]
    other = torch.empty_like(t)
    assert (native.read_lists([[t], [], [other]]) is not None) == reads_tensors()
    assert native.pairs_match([t, t, None], [other, None, t]) == reads_tensors()
    assert native.read_lists([[t], [other, other]]) is None
    assert not native.pairs_match([t], [other, other])


@pytest.mark.parametrize("name", NOT_FOR_C)
def test_what_takes_a_closer_look(name: str) -> None:
    assert native.read_lists([[NOT_FOR_C[name]]]) is None
    assert native.read_lists([[torch.ones(3)], [NOT_FOR_C[name]]]) is None
    assert native.read_lists([[torch.ones(3), NOT_FOR_C[name]]]) is None


def test_one_kind_of_tensor_in_all_lists() -> None:
    assert native.read_lists([[torch.ones(3), torch.ones(3).double()]]) is None
    assert native.read_lists([[torch.ones(2, 3)], [torch.ones(3, 2).t()]]) is None
    assert not native.pairs_match([torch.ones(3)], [torch.ones(3).double()])
    assert native.read_lists([]) is None
    assert native.read_lists([[]]) is None


def test_addresses_of_subclasses() -> None:
    g = torch.ones(5).as_subclass(Subclass)
    assert native.squared_norm([g]).item() == 5

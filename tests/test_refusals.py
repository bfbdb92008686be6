"""Bad arguments: an error that names the argument, before anything is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import BASES
from checks import assert_same_bits
from conftest import Backend
from samples import DTYPES, RHO, STATE, steps
from torch import Tensor

from imbsam_fast import ops
from imbsam_fast.ops import native

Arguments = dict[str, Any]

needs_module = pytest.mark.skipif(
    native.reason_unavailable("cpu") is not None, reason="the compiled module did not load"
)

# The lists of every operation, in the order in which they are checked.
LISTS = {
    "squared_norm": ("g_t", "theta"),
    "perturb_": ("theta", "g_t", "held"),
    **{op: ("theta", "g_p", "saved", "g_h", *base.state) for op, base in BASES.items()},
    "merge_": ("theta", "g_p", "saved", "g_h"),
    "grad_check": ("g_p", "g_h"),
}


@pytest.fixture(autouse=True, params=["in _C", "in Python"])
def where_lists_are_read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch before 2.10 cannot tell _C what it needs to know."""
    if request.param == "in Python":
        monkeypatch.setattr(native, "read_lists", lambda lists: None)


def valid(op: str) -> Arguments:
    """Arguments that the operation accepts: three tensors of shape (2, 3), (4, 5), (6,)."""
    generator = torch.Generator().manual_seed(0)
    arguments: Arguments = {
        name: [torch.randn(shape, generator=generator) for shape in ((2, 3), (4, 5), (6,))]
        for name in LISTS[op]
    }
    if op == "perturb_":
        arguments |= {"partials": torch.ones(3, dtype=torch.float64), "rho": RHO}
    if op in BASES:
        arguments |= {"lr": torch.tensor(0.1), **BASES[op].settings}
        arguments |= {"step": steps(3)} if BASES[op].has_step else {}
    return arguments


def on(device: str, arguments: Arguments) -> Arguments:
    """The same arguments on another device."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(x) for x in value]
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: moved(value) for name, value in arguments.items()}


def assert_refused(
    op: str, arguments: Arguments, error: type[Exception] | tuple[type[Exception], ...], match: str
) -> None:
    """The error starts with the operation's name, and every tensor keeps its bits."""
    tensors = []
    for value in arguments.values():
        tensors += value if isinstance(value, list) else [value] if torch.is_tensor(value) else []
    tensors = [t for t in tensors if t.layout == torch.strided and t.device.type != "meta"]
    before = [t.clone() for t in tensors]
    with pytest.raises(error, match=rf"^{op}: {match}"):
        getattr(ops, op)(**arguments)
    for t, b in zip(tensors, before):
        assert_same_bits([t], [b])


def test_the_arguments_are_valid_to_begin_with(backend_once: Backend) -> None:
    for op in LISTS:
        getattr(ops, op)(**on(backend_once.device, valid(op)))


# ---------------------------------------------------------------- lists

each_list = pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, names in LISTS.items() for name in names]
)
each_op = pytest.mark.parametrize("op", LISTS)


# What may be wrong with one tensor of a list.
DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": Tensor.double,
    "bfloat16": Tensor.bfloat16,
    "int32": Tensor.int,
    "complex": lambda t: t.to(torch.complex64),
    "flat": Tensor.flatten,
    "other shape": lambda t: t[:, :-1].contiguous(),
    "transposed": lambda t: t.t().contiguous().t(),
    "with gaps": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda t: t[:1].expand_as(t),
    "sparse": Tensor.to_sparse,
    "another device": lambda t: t.to("meta"),
}


@each_list
@pytest.mark.parametrize("damage", DAMAGES)
def test_one_tensor_unlike_the_others(op: str, name: str, damage: str) -> None:
    arguments = valid(op)
    arguments[name][1] = DAMAGES[damage](arguments[name][1])
    first = LISTS[op][0]
    # A damaged first list is noticed there, or where the next list does not match it.
    named = rf"{name}\[1\] is " if name != first else rf"({first}\[1\] is |.* as {first}\[1\]$)"
    assert_refused(op, arguments, (ValueError, TypeError), named)


@each_op
@pytest.mark.parametrize("damage", ["with gaps", "expanded", "overlapping", "sparse"])
def test_memory_that_is_not_one_block(op: str, damage: str) -> None:
    arguments = valid(op)
    damages = {**DAMAGES, "overlapping": lambda t: t.flatten().as_strided(t.shape, (1, 1))}
    for name in LISTS[op]:
        arguments[name][1] = damages[damage](arguments[name][1])
    expected = "expected a strided tensor" if damage == "sparse" else "expected a dense layout"
    assert_refused(op, arguments, (ValueError, TypeError), rf"{LISTS[op][0]}\[1\] is .*{expected}")


@each_list
def test_a_sparse_tensor_of_one_element(op: str, name: str) -> None:
    """Whose strides say nothing."""
    arguments = valid(op)
    for other in LISTS[op]:
        arguments[other] = [torch.ones(1)]
    arguments[name] = [torch.ones(1).to_sparse()]
    assert_refused(op, arguments, (ValueError, TypeError), rf"{name}\[0\] is ")


@each_op
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_no_floating_point(op: str, dtype: torch.dtype) -> None:
    arguments = valid(op)
    for name in LISTS[op]:
        arguments[name] = [t.to(dtype) for t in arguments[name]]
    named = rf"{LISTS[op][0]}\[0\] is {dtype}, expected one of {re.escape(str(DTYPES[0]))}"
    assert_refused(op, arguments, TypeError, named)


@each_list
@pytest.mark.parametrize("change", ["too few", "too many"])
def test_lists_of_unequal_length(op: str, name: str, change: str) -> None:
    arguments = valid(op)
    full = arguments[name]
    arguments[name] = full[:-1] if change == "too few" else [*full, torch.ones(2)]
    first, second = LISTS[op][:2]
    wrong = name if name != first else second
    assert_refused(
        op,
        arguments,
        ValueError,
        rf"{wrong} has {len(arguments[wrong])} tensors, expected \d as {first}",
    )


@each_op
def test_empty_lists(op: str) -> None:
    arguments = valid(op)
    first = LISTS[op][0]
    assert_refused(op, {**arguments, first: []}, ValueError, f"{first} is empty, expected")
    empty = {name: [] for name in LISTS[op]}
    assert_refused(op, {**arguments, **empty}, ValueError, f"{first} is empty, expected")


@pytest.mark.parametrize(
    ("op", "name"),
    [("perturb_", "g_t"), ("merge_", "g_p")]
    + [(op, "g_p") for op in BASES]
    + [(op, "step") for op, base in BASES.items() if base.has_step]
    + [(op, n) for op, base in BASES.items() for n in base.state if n not in base.optional],
)
def test_a_required_list_is_empty(op: str, name: str) -> None:
    assert_refused(op, {**valid(op), name: []}, ValueError, f"{name} ")


# ---------------------------------------------------------------- the other arguments

NO_STEPS: list[list[Tensor]] = [
    [torch.ones(()), torch.ones(2), torch.ones(())],
    [torch.ones((), dtype=torch.int64)] * 3,
    [torch.ones(()), torch.ones(()).double(), torch.ones(())],
    [torch.ones((), device="meta")] * 3,
    steps(2),
]
OTHERS: list[tuple[str, str, Any]] = [
    ("perturb_", "rho", -float("inf")),
    ("perturb_", "rho", float("nan")),
    ("perturb_", "rho", float("inf")),
    ("perturb_", "partials", torch.ones(3)),
    ("perturb_", "partials", torch.ones((), dtype=torch.float64)),
    ("perturb_", "partials", torch.ones(3, 1, dtype=torch.float64)),
    ("perturb_", "partials", torch.ones(3, dtype=torch.float64, device="meta")),
    *((op, "lr", torch.ones(2)) for op in BASES),
    *((op, "lr", torch.ones(0)) for op in BASES),
    *((op, "grad_scale", torch.ones(2)) for op in BASES),
    *((op, "found_inf", torch.zeros(0)) for op in BASES),
    *((op, "step", step) for op, base in BASES.items() if base.has_step for step in NO_STEPS),
]


@pytest.mark.parametrize(("op", "name", "value"), OTHERS, ids=str)
def test_other_arguments(op: str, name: str, value: Any) -> None:
    assert_refused(op, {**valid(op), name: value}, ValueError, rf"{name}(\[\d\])? ")


@pytest.mark.parametrize("op", [op for op, base in BASES.items() if "momentum" in base.settings])
def test_momentum_buffers_exactly_with_momentum(op: str) -> None:
    arguments = valid(op)
    changed = {"momentum": 0.0 if arguments["momentum"] else 0.9}
    for changes in ({"m": []}, changed) if arguments["momentum"] else (changed, {"m": []}):
        assert_refused(op, {**arguments, **changes}, ValueError, r"m has \d tensors with")


def half(op: str) -> Arguments:
    """Valid arguments with master weights."""
    arguments = valid(op)
    for name in LISTS[op]:
        if name not in STATE:
            arguments[name] = [t.bfloat16() for t in arguments[name]]
    arguments["master"] = [t.float() for t in arguments["theta"]]
    return arguments | ({} if op == "perturb_" else {"saved": []})


MASTER_CHANGES: dict[str, tuple[Callable[[Arguments], Arguments], str]] = {
    "float32 weights": (
        lambda a: {
            n: [t.float() for t in a[n]] for n in ("theta", "g_p", "g_h", "g_t", "held") if n in a
        },
        r"theta\[0\] is torch.float32, expected with master weights torch.bfloat16 or",
    ),
    "half master": (
        lambda a: {"master": [t.half() for t in a["master"]]},
        r"master\[0\] is torch.float16 .*, expected torch.float32 and otherwise .* as theta\[0\]",
    ),
    "transposed": (
        lambda a: {"master": [t.t().contiguous().t() for t in a["master"]]},
        r"master\[0\] is .* strides \(1, 2\)",
    ),
    "too few": (lambda a: {"master": a["master"][:2]}, "master has 2 tensors, expected 3 as theta"),
    "sparse": (
        lambda a: {"master": [t.to_sparse() for t in a["master"]]},
        r"master\[0\] is torch.sparse_coo, expected a strided",
    ),
}


@pytest.mark.parametrize("change", MASTER_CHANGES)
@pytest.mark.parametrize("op", ["perturb_", *BASES])
def test_master_weights(backend_once: Backend, op: str, change: str) -> None:
    changed, message = MASTER_CHANGES[change]
    arguments = on(backend_once.device, half(op))
    assert_refused(op, {**arguments, **changed(arguments)}, (ValueError, TypeError), message)
    getattr(ops, op)(**arguments)


@pytest.mark.parametrize("op", [*BASES])
def test_state_unlike_the_master_weights(op: str) -> None:
    arguments = half(op)
    saved = [t.clone() for t in arguments["theta"]]
    named = "saved has 3 tensors, expected none beside master"
    assert_refused(op, {**arguments, "saved": saved}, ValueError, named)
    name = BASES[op].state[0]
    arguments[name][1] = arguments[name][1].bfloat16()
    named = rf"{name}\[1\] is torch.bfloat16 .*, expected torch.float32"
    assert_refused(op, arguments, ValueError, named)


# ---------------------------------------------------------------- memory shared between tensors

WRITING = ("perturb_", *BASES, "merge_")


@needs_module
@pytest.mark.parametrize("op", WRITING)
def test_one_tensor_twice(op: str) -> None:
    first, second = LISTS[op][:2]
    arguments = valid(op)
    arguments[second][1] = arguments[first][1]
    named = rf"{first}\[1\] and {second}\[1\] overlap in memory"
    reverse = rf"{second}\[1\] and {first}\[1\] overlap in memory"
    assert_refused(op, arguments, ValueError, f"({named}|{reverse})")


@needs_module
@pytest.mark.parametrize("op", WRITING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_share_one_element(op: str, dtype: torch.dtype) -> None:
    arguments = valid(op)
    for name in LISTS[op]:
        arguments[name] = [t.to(dtype) for t in arguments[name]]
    memory = torch.ones(11, dtype=dtype)
    arguments["theta"][2], arguments[LISTS[op][-1]][2] = memory[:6], memory[5:]
    assert_refused(op, arguments, ValueError, rf"theta\[2\] and {LISTS[op][-1]}\[2\] overlap")
    memory = torch.ones(12, dtype=dtype)  # side by side is no overlap
    arguments["theta"][2], arguments[LISTS[op][-1]][2] = memory[:6], memory[6:]
    getattr(ops, op)(**arguments)


def test_reading_the_same_gradient_twice_is_no_harm(backend_once: Backend) -> None:
    arguments = on(backend_once.device, valid("grad_check"))
    partials, _ = ops.grad_check(arguments["g_p"], arguments["g_p"])
    expected = sum(4 * t.double().square().sum() for t in arguments["g_p"])
    torch.testing.assert_close(partials.sum(), expected)


# ---------------------------------------------------------------- raw pointers

FLOAT32, HERE = 0, 1  # a dtype code and an address that is not null
NUMEL = [4, 2]
OK = [0, 0]  # replaced by real pointers

# Operation, arguments after the dtype and numel; "x" stands for a list of good pointers, "&x"
# for one of them, "#x" for how many elements are there and a tuple for a list of lists.
POINTER_CALLS: dict[str, tuple[Any, ...]] = {
    "squared_norm": ("g_t", "theta", "&partials", 1),
    "perturb_": ("theta", "g_t", [], "held", "&partials", "#partials", 0.1, False, 1),
    "merge_": ("theta", "saved", "g_h", "g_p", 1),
    "grad_check": ("g_h", "g_p", "&partials", 1),
    **{
        op: (
            "theta", "saved", "g_h", "g_p", base.state, [], "step" if base.has_step else [], 0, 0.1,
            [float(v) for name, v in base.settings.items() if name != "maximize"], False, 1.0,
            False, 1,
        )
        for op, base in BASES.items()
    },
}  # fmt: skip


class PointerCall:
    """A call of the compiled module with memory of its own behind every pointer."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.names = [
            name
            for a in POINTER_CALLS[op]
            for name in (a if isinstance(a, tuple) else (a,))
            if isinstance(name, str) and name[0] != "#"
        ]
        self.memory = {n: [torch.full((k,), 3.0) for k in NUMEL] for n in self.names}
        self.memory["&partials"] = [torch.full((2,), 3.0, dtype=torch.float64)]

    def __call__(self, changes: dict[str, Any]) -> None:
        arguments: list[Any] = [changes.get("dtype", FLOAT32), changes.get("numel", NUMEL)]
        for argument in POINTER_CALLS[self.op]:
            if isinstance(argument, tuple):
                arguments.append([self.pointers(name, changes) for name in argument])
                continue
            if not isinstance(argument, str):
                arguments.append(argument)
                continue
            if argument.startswith("#"):
                arguments.append(changes.get(argument, 2))
                continue
            pointers = self.pointers(argument, changes)
            arguments.append(pointers[0] if argument.startswith("&") else pointers)
        if self.op in BASES:
            native._C.update_(self.op, *arguments)
        else:
            getattr(native._C, self.op)(*arguments)

    def pointers(self, name: str, changes: dict[str, Any]) -> list[int]:
        """Good ones, or what is passed instead."""
        if name in changes:
            return [changes[name]] if name.startswith("&") else changes[name]
        return [t.data_ptr() for t in self.memory[name]]

    def untouched(self) -> bool:
        return all(t.eq(3).all() for list_ in self.memory.values() for t in list_)


@needs_module
@pytest.mark.parametrize("op", POINTER_CALLS)
def test_raw_pointers(op: str) -> None:
    call = PointerCall(op)
    lists = [name for name in call.names if not name.startswith("&") and name != "step"]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"dtype": 4}, "dtype is 4, expected 0 to 3"),
        ({"dtype": -1}, "dtype is -1, expected 0 to 3"),
        ({"numel": [4, -2]}, r"numel\[1\] is -2, expected >= 0"),
    ]
    for name in lists:
        good = [t.data_ptr() for t in call.memory[name]]
        refused += [
            ({name: [good[0], 0]}, rf"{name}\[1\] is a null pointer, expected 2 elements"),
            ({name: good[:1]}, f"{name} has 1 tensors, expected 2"),
            ({name: [*good, good[0]]}, f"{name} has 3 tensors, expected 2"),
        ]
    if "&partials" in call.names:
        refused.append(({"&partials": 0}, "partials is a null pointer"))
    if "step" in call.names:
        refused.append(({"step": [0, 0]}, r"step\[0\] is a null pointer"))
        if op != "rmsprop_update_":  # which counts steps for torch alone, where there are counts
            refused.append(({"step": []}, "step has 0 tensors, expected 2"))
    for changes, message in refused:
        with pytest.raises(ValueError, match=f"^{op}: {message}"):
            call(changes)
        assert call.untouched(), changes
    call({})
    assert not call.untouched()


@needs_module
@pytest.mark.parametrize("op", POINTER_CALLS)
@pytest.mark.parametrize("count", [0, 3])
def test_nothing_to_do_needs_no_memory(op: str, count: int) -> None:
    call = PointerCall(op)
    nothing: dict[str, Any] = {name: [0] * count for name in call.names}
    step = steps(count)
    nothing["step"] = [s.data_ptr() for s in step]
    call({**nothing, "numel": [0] * count, "&partials": 0, "#partials": 0})
    assert call.untouched()


@needs_module
@pytest.mark.parametrize("threads", [-5, 0, 1000])
def test_any_number_of_threads(threads: int) -> None:
    partials, x = torch.zeros(4, dtype=torch.float64), torch.ones(100_000)
    native._C.squared_norm(FLOAT32, [len(x)], [x.data_ptr()], [], partials.data_ptr(), threads)
    assert partials.tolist() == [32768, 32768, 32768, 100_000 - 3 * 32768]


@needs_module
def test_unknown_isa() -> None:
    before = native.isa_in_use()
    with pytest.raises(ValueError, match="isa is 'avx1024', which this build or machine"):
        native._C.use_isa("avx1024")
    assert native.isa_in_use() == before

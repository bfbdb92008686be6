"""The backends under test, and fixtures that leave no trace behind."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import interpreter_error, use_the_interpreter

from imbsam_fast.ops import dispatch, native

# For benchmarks/, which is not installed; last, so that the installed imbsam_fast is tested.
sys.path.append(str(Path(__file__).parent.parent))
INTERPRETER_ERROR = None
if os.environ.get("IMBSAM_TRITON") == "ptx":  # set by test_triton_ptx.py
    from cuda_on_host import triton_driver

    triton_driver.use()
elif not torch.cuda.is_available():
    use_the_interpreter()
    if dispatch.available("cpu")["triton"] is None:
        INTERPRETER_ERROR = interpreter_error()


# A shell's background jobs ignore it, and Python then leaves it so.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what is not tested here for a reason that lies outside this package."""
    if not backends("triton"):
        reason = INTERPRETER_ERROR or dispatch.available("cpu")["triton"]
        terminalreporter.write_line(f"the Triton kernels are not tested: {reason}")


@dataclass(frozen=True)
class Backend:
    """One way to carry out an operation: a backend, a device, for the CPU an instruction set."""

    name: str
    device: str
    isa: str | None = None

    def __str__(self) -> str:
        return "-".join(part for part in (self.name, self.device, self.isa) if part)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        with (
            dispatch.use_backend(self.name),
            native.use_isa(self.isa) if self.isa else nullcontext(),
        ):
            yield


def backends(name: str | None = None) -> list[Backend]:
    """What this build and machine can run, or only the backend `name`."""
    found = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for backend, reason in dispatch.available(device).items():
            if reason is not None or name not in (None, backend):
                continue
            if (backend, device) == ("triton", "cpu") and INTERPRETER_ERROR:
                continue
            compiled_cpu = backend == "native" and device == "cpu"
            isas = native.isas() if compiled_cpu else [None]
            found += [Backend(backend, device, isa) for isa in isas]
    return found


INTERPRETED = Backend("triton", "cpu")

# `pytest -m quick` runs the first case of so many tests of every file, and tests that are marked
# themselves, for modules that no other test there runs.
QUICK_TESTS = 3
# They start ranks, or train.
SLOW_FIXTURES = {"outcome", "outcomes", "trained"}
# Files whose imports alone, of torch's own tests and of hypothesis, take seconds, or that compile.
NOT_QUICK = {"test_torch_contract.py", "test_random_phases.py", "test_random_configurations.py",
             "test_compile.py"}  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    left_out = config.option.markexpr == "quick" and collection_path.name in NOT_QUICK
    return True if left_out else None


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = {item for item in items if _is_slow(getattr(item, "callspec", None))}
    left_out |= _repeated_skips(items)
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
    _mark_quick(items)
    _mark_each(items)
    _mark_pairs(items)


def _is_slow(callspec: Any) -> bool:
    """The interpreter takes about a second for 300 tensors or 64 rows: in float32 only.

    For more than a chunk it takes a fifth of that: also in a dtype that arithmetic does not run in.
    """
    values = callspec.params if callspec else {}
    if not any(isinstance(v, Backend) and v == INTERPRETED for v in values.values()):
        return False
    case, dtype = values.get("case"), values.get("dtype")
    if case == "many" or values.get("rows") == 64:
        return dtype != torch.float32
    return case == "beyond a chunk" and dtype in (torch.float64, torch.float16)


def _skipped_for(item: pytest.Item) -> str | None:
    """The reason of a `skipif` whose condition holds."""
    marks = item.iter_markers("skipif")
    return next((mark.kwargs["reason"] for mark in marks if mark.args[0]), None)


def _repeated_skips(items: list[pytest.Item]) -> set[pytest.Item]:
    """Tests that are skipped for a reason that another one gives; that one tells their number."""
    alike: dict[str, list[pytest.Item]] = {}
    for item in items:
        if (reason := _skipped_for(item)) is not None:
            alike.setdefault(reason, []).append(item)
    for reason, (first, *others) in alike.items():
        if others:
            told = pytest.mark.skipif(True, reason=f"{reason} ({len(others) + 1} tests)")
            first.add_marker(told, append=False)
    return {item for _, *others in alike.values() for item in others}


def _mark_quick(items: list[pytest.Item]) -> None:
    """`quick`: the first case of QUICK_TESTS tests of every file that run and are not slow."""
    chosen: dict[Path, set[str]] = {}
    for item in items:
        names = chosen.setdefault(item.path, set())
        name = getattr(item, "originalname", item.name)
        left = item.get_closest_marker("slow") or _skipped_for(item) is not None
        left = left or not SLOW_FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))
        drawn = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)  # many examples
        if not left and not drawn and name not in names and len(names) < QUICK_TESTS:
            names.add(name)
            item.add_marker("quick")


def _values(item: pytest.Item) -> list[tuple[int, str]]:
    """Of its parameters, by their places and names."""
    return list(enumerate(item.callspec._idlist)) if hasattr(item, "callspec") else []


def _mark_each(items: list[pytest.Item]) -> None:
    """`each`: so many cases of a test that every value of each parameter is in one of them.

    Of a test that is slow the first case alone.
    """
    seen: dict[str, set[tuple[int, str]]] = {}
    for item in items:
        test = item.nodeid.partition("[")[0]
        values = set(_values(item))
        if test not in seen or not (item.get_closest_marker("slow") or values <= seen[test]):
            item.add_marker("each")
            seen.setdefault(test, set()).update(values)


def _mark_pairs(items: list[pytest.Item]) -> None:
    """`pairs`: so many cases of a test that any two values of its parameters meet in one of them.

    Chosen greedily: next the case with the most pairs that are not in an earlier one.
    """
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for of_test in cases.values():
        pairs = [set(combinations(_values(item), 2)) for item in of_test]
        if not any(pairs):  # fewer than two parameters: no value comes twice
            for item in of_test:
                item.add_marker("pairs")
            continue
        met: set[Any] = set()
        left = [(-len(of_case), number) for number, of_case in enumerate(pairs)]
        while left:
            _, number = heappop(left)
            new = -len(pairs[number] - met)
            if left and new > left[0][0]:
                if new:
                    heappush(left, (new, number))
            elif new:
                of_test[number].add_marker("pairs")
                met |= pairs[number]


@pytest.fixture(params=backends(), ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend in turn, in use during the test."""
    with request.param.in_use():
        yield request.param


@pytest.fixture(params=[b for b in backends() if b.isa in (None, native.isas()[-1])], ids=str)
def backend_once(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend in turn, for what does not depend on the instruction set."""
    with request.param.in_use():
        yield request.param


@pytest.fixture(params=[b for b in backends("native") if b.device == "cpu"], ids=str)
def cpu_kernels(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The compiled CPU kernels of every instruction set in turn, in use during the test."""
    with request.param.in_use():
        yield request.param


@pytest.fixture(params=backends("triton"), ids=str)
def triton_kernels(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The Triton kernels, on the GPU or in the interpreter, in use during the test."""
    with request.param.in_use():
        yield request.param


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small data and models run faster, and steadier on a busy machine, on one thread."""
    torch.set_num_threads(1)


@pytest.fixture
def by_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phases through the operators, a launch at a time, as of tensors that are not plain."""
    from two_groups import launch_by_launch  # later than use_the_interpreter: it imports triton

    launch_by_launch(monkeypatch)


@pytest.fixture
def single_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each phase so far was a single call of the compiled module."""
    from imbsam_fast.optim import one_call

    answers: list[bool] = []

    def noted(call: Callable[..., Any]) -> Callable[..., Any]:
        def on_call(*arguments: Any) -> Any:
            answer = call(*arguments)
            answers.append(bool(answer))
            return answer

        return on_call

    for name in ("perturb", "update"):
        monkeypatch.setattr(one_call, name, noted(getattr(one_call, name)))
    return answers


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def large_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """plan="auto" chooses as for a network whose passes cost nothing besides their rows."""
    monkeypatch.setattr("imbsam_fast.training.auto_plan.WORK_OF_A_MODULE", 0)

"""The backends under test, and fixtures that leave no trace behind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import interpreter_error, use_the_interpreter

from imbsam_fast.ops import dispatch, native

# For benchmarks/, which is not installed; last, so that the installed imbsam_fast is tested.
sys.path.append(str(Path(__file__).parent.parent))
INTERPRETER_ERROR = None
if not torch.cuda.is_available():
    use_the_interpreter()
    if dispatch.available("cpu")["triton"] is None:
        INTERPRETER_ERROR = interpreter_error()


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The interpreter takes about a second for 300 tensors or 64 rows: in float32 only."""
    slow = [item for item in items if _is_slow(getattr(item, "callspec", None))]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


def _is_slow(callspec: Any) -> bool:
    values = callspec.params if callspec else {}
    large = values.get("case") == "many" or values.get("rows") == 64
    interpreted = values.get("backend") == Backend("triton", "cpu")
    return interpreted and large and values.get("dtype") != torch.float32


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
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

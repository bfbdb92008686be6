"""Which backend is chosen, and that a forced one works or says why it does not."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from imbsam_fast import kernels, ops
from imbsam_fast.ops import dispatch, native, reference
from imbsam_fast.ops.dispatch import use_backend

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMBSAM_BACKEND", raising=False)


@pytest.fixture
def no_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_load_error", "libgomp.so.1 is missing", raising=False)


def backend_that_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that squared_norm really reaches, in the order of calls from here on."""
    reached: list[str] = []

    def spy(module: ModuleType, name: str) -> None:
        run = module.squared_norm

        def recorded(*args: Any) -> torch.Tensor:
            reached.append(name)
            return run(*args)

        monkeypatch.setattr(module, "squared_norm", recorded)

    spy(native, "native")
    spy(reference, "reference")
    return reached


def test_available() -> None:
    on_cpu = dispatch.available()
    assert list(on_cpu) == list(dispatch.BACKENDS) == ["native", "triton", "reference"]
    assert on_cpu["native"] is None and on_cpu["reference"] is None
    elsewhere = dispatch.available("mps")
    assert elsewhere["reference"] is None
    assert elsewhere["native"] == "this build has no kernels for mps devices"


def test_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.forced_backend() is None
    assert dispatch.backend_name("cpu") == "native"
    assert dispatch.backend_name("mps") == "reference"
    reached = backend_that_runs(monkeypatch)
    ops.squared_norm([torch.ones(3)])
    assert reached == ["native"]


def test_automatic_choice_without_the_compiled_module(no_compiled_module: None) -> None:
    assert dispatch.backend_name("cpu") != "native"
    assert ops.squared_norm([torch.ones(3)]).sum().item() == 3


@pytest.fixture
def gpu_without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "_reason_no_cuda", lambda: "no nvcc at build time")
    monkeypatch.setattr(kernels, "reason_unavailable", lambda device_type: "triton is 3.2")
    dispatch._warn_of_reference.cache_clear()
    yield
    dispatch._warn_of_reference.cache_clear()


def test_a_slow_fallback_on_a_gpu_is_said_once(gpu_without_kernels: None) -> None:
    with pytest.warns(UserWarning, match="in pure torch on this GPU") as warned:
        for _ in range(3):
            assert dispatch.select(torch.device("cuda")) is reference
    (warning,) = warned
    for part in ("no nvcc at build time. The", "triton is 3.2. Install", "IMBSAM_CUDA=ON", "2.8"):
        assert part in str(warning.message)


@pytest.mark.parametrize("device", ["cpu", "meta", "mps"])
def test_there_is_no_warning_elsewhere(gpu_without_kernels: None, device: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.backend_name(device)


def test_who_asks_for_the_reference_is_not_warned(gpu_without_kernels: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with use_backend("reference"):
            assert dispatch.select(torch.device("cuda")) is reference


def test_forced_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = backend_that_runs(monkeypatch)
    for name in ("reference", "native", ""):  # empty: not forced
        monkeypatch.setenv("IMBSAM_BACKEND", name)
        assert dispatch.forced_backend() == (name or None)
        ops.squared_norm([torch.ones(3)])
    assert reached == ["reference", "native", "native"]


def test_forced_by_use_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMBSAM_BACKEND", "native")
    reached = backend_that_runs(monkeypatch)
    with use_backend("reference"):
        ops.squared_norm([torch.ones(3)])
    ops.squared_norm([torch.ones(3)])
    assert reached == ["reference", "native"]


@pytest.mark.parametrize("name", ["Native", "cuda", "reference "])
def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    expected = "expected one of native, triton, reference"
    with pytest.raises(ValueError, match=f"^backend is '{name}', {expected}"), use_backend(name):
        pass
    monkeypatch.setenv("IMBSAM_BACKEND", name)
    with pytest.raises(ValueError, match=f"^IMBSAM_BACKEND is '{name}', {expected}"):
        ops.squared_norm([torch.ones(3)])


def test_a_forced_backend_that_cannot_work_says_why(no_compiled_module: None) -> None:
    message = (
        "backend 'native' was asked for but cannot be used: "
        "the compiled module imbsam_fast.ops._C did not load: libgomp.so.1 is missing"
    )
    with use_backend("native"), pytest.raises(RuntimeError) as caught:
        ops.squared_norm([torch.ones(3)])
    assert str(caught.value) == message


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_forced_on_a_device_without_kernels(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("IMBSAM_BACKEND", backend)
    reason = dispatch.available("mps")[backend]
    assert reason
    with pytest.raises(RuntimeError) as caught:
        dispatch.select(torch.device("mps"))
    assert str(caught.value).endswith(f"'{backend}' was asked for but cannot be used: {reason}")


def test_use_backend_nests() -> None:
    with use_backend("reference"):
        with use_backend("native"):
            assert dispatch.select(CPU) is native
        assert dispatch.select(CPU) is reference
        with pytest.raises(ValueError, match="backend is 'none'"), use_backend("none"):
            pass
        assert dispatch.select(CPU) is reference
    assert dispatch.forced_backend() is None


def test_use_backend_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert dispatch.forced_backend() is None


def test_use_backend_holds_in_every_thread() -> None:
    seen: list[str | None] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"]

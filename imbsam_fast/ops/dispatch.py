"""Which backend carries out an operation on a device.

A backend is a module with the functions of `reference.py`. An automatic choice takes the
first backend that works on the device. A forced one (environment variable IMBSAM_BACKEND or
`use_backend`) must work: its own error is raised where it does not.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from .. import kernels  # type: ignore[attr-defined]  # ../../kernels
from . import native, native_cuda, reference

# In order of preference.
BACKENDS = ("native", "triton", "reference")

_forced: str | None = None


def _reason_unavailable(backend: str, device_type: str) -> str | None:
    """None where `backend` works on `device_type`, else the reason why it does not."""
    if backend == "reference":
        return None
    if backend == "native":
        return native.reason_unavailable(device_type)
    return kernels.reason_unavailable(device_type)


def available(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Every backend, with None where it works on `device` and else the reason why not."""
    device_type = torch.device(device).type
    return {backend: _reason_unavailable(backend, device_type) for backend in BACKENDS}


def forced_backend() -> str | None:
    """The backend asked for by `use_backend` or IMBSAM_BACKEND, None for automatic."""
    forced = _forced or os.environ.get("IMBSAM_BACKEND") or None
    if forced not in (None, *BACKENDS):
        raise ValueError(f"IMBSAM_BACKEND is {forced!r}, expected one of {', '.join(BACKENDS)}")
    return forced


def backend_name(device_type: str) -> str:
    """The backend that carries out operations on `device_type` ("cpu", "cuda", ...)."""
    forced = forced_backend()
    if forced is None:
        return _automatic(device_type)
    reason = _reason_unavailable(forced, device_type)
    if reason is not None:
        raise RuntimeError(f"backend {forced!r} was asked for but cannot be used: {reason}")
    return forced


def _automatic(device_type: str) -> str:
    native_reason = _reason_unavailable("native", device_type)
    if native_reason is None:
        return "native"
    if device_type == "cpu":  # there Triton only interprets: for tests, by force
        return "reference"
    triton_reason = _reason_unavailable("triton", device_type)
    if triton_reason is None:
        return "triton"
    if device_type == "cuda" and not torch.compiler.is_compiling():
        _warn_of_reference(native_reason, triton_reason)
    return "reference"


@functools.cache
def _warn_of_reference(native_reason: str, triton_reason: str) -> None:
    """Once, since whatever runs there is right and slow."""
    warnings.warn(
        "imbsam_fast runs in pure torch on this GPU, with many small kernels in place of few. "
        f"The compiled kernels: {native_reason}. The Triton kernels: {triton_reason}. Install "
        "imbsam-fast from source where nvcc 12.1 or newer is on PATH (IMBSAM_CUDA=ON makes a build "
        "without it fail), or a torch that brings Triton 3.4 or newer (2.8 does); "
        "IMBSAM_BACKEND=reference says that it is meant so",
        stacklevel=2,
    )


def select(device: torch.device) -> ModuleType:
    """The backend module for tensors on `device`."""
    backend = backend_name(device.type)
    if backend == "native":
        return native_cuda if device.type == "cuda" else native
    return kernels.load() if backend == "triton" else reference


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force `backend` inside the `with` block, in every thread."""
    global _forced
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    previous, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = previous

"""Which backend carries out an operation on a device.

A backend is a module with the functions of `reference.py`. An automatic choice takes the
first backend that works on the device. A forced one (environment variable IMBSAM_BACKEND or
`use_backend`) must work: its own error is raised where it does not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from . import kernels, native, reference  # type: ignore[attr-defined]  # ../kernels

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
        # On the CPU Triton only interprets: for tests, by force.
        choices = [b for b in BACKENDS if not (b == "triton" and device_type == "cpu")]
        return next(b for b in choices if _reason_unavailable(b, device_type) is None)
    reason = _reason_unavailable(forced, device_type)
    if reason is not None:
        raise RuntimeError(f"backend {forced!r} was asked for but cannot be used: {reason}")
    return forced


def select(device: torch.device) -> ModuleType:
    """The backend module for tensors on `device`."""
    name = backend_name(device.type)
    if name == "triton":
        return kernels.load()
    return native if name == "native" else reference


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

"""What a result depends on besides the code: versions, machine, devices, backends, date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .ops import dispatch, library, native

# The operations of reference.py, which every backend carries out.
OPERATIONS = tuple(library.OPERATORS)


def environment() -> dict[str, Any]:
    """Everything as plain values, ready for JSON.

    Keys: date (UTC, ISO 8601), git_commit (None outside a checkout, ending in "-dirty" where
    tracked files were changed), versions, machine, native, devices, and backends, which maps
    each device type present to what `backend_report` returns.
    """
    devices = _devices()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "versions": _versions(),
        "machine": _machine(),
        "native": _native(),
        "devices": devices,
        "backends": {
            kind: backend_report(kind) for kind in dict.fromkeys(d["type"] for d in devices)
        },
    }


def backend_report(device_type: str) -> dict[str, Any]:
    """Which backend carries out operations on `device_type`, and why others cannot.

    Keys: available (backend -> None, or the reason why it cannot be used), forced (the backend
    asked for, or None), operations (operation -> the backend that it would use, or None where
    the forced one cannot be used), error (why not, or None).
    """
    forced = used = error = None
    try:
        forced = dispatch.forced_backend()
        used = dispatch.backend_name(device_type)
    except (ValueError, RuntimeError) as failure:
        error = str(failure)
    return {
        "available": dispatch.available(device_type),
        "forced": forced,
        "operations": dict.fromkeys(OPERATIONS, used),
        "error": error,
    }


def _versions() -> dict[str, str | None]:
    return {
        "imbsam-fast": version("imbsam-fast"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "torch_threads": torch.get_num_threads(),
    }


def _native() -> dict[str, Any]:
    """The compiled module: whether it loaded, and how it runs on this CPU."""
    reason = native.reason_unavailable("cpu")
    if native._C is None:
        return {"loaded": False, "reason": reason}
    return {
        "loaded": True,
        "openmp": native._C.has_openmp(),
        "isas": native.isas(),
        "isa_in_use": native.isa_in_use(),
    }


def _devices() -> list[dict[str, Any]]:
    """The CPU and every device of torch's accelerator, by type, index and name."""
    devices: list[dict[str, Any]] = [{"type": "cpu", "index": None, "name": _cpu_model()}]
    if not torch.accelerator.is_available():
        return devices
    accelerator = torch.accelerator.current_accelerator()
    kind = accelerator.type if accelerator is not None else "cpu"
    for index in range(torch.accelerator.device_count()):
        device = {"type": kind, "index": index, "name": kind}
        if kind == "cuda":
            properties = torch.cuda.get_device_properties(index)
            device["name"] = properties.name
            device["memory_gib"] = round(properties.total_memory / 2**30, 1)
            device["capability"] = f"{properties.major}.{properties.minor}"
        devices.append(device)
    return devices


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        return _output_of(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()
    return platform.processor() or platform.machine()


def _usable_cores() -> int | None:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _git_commit() -> str | None:
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists():  # installed, perhaps inside a checkout of something else
        return None
    return _output_of(["git", "-C", str(checkout), "describe", "--always", "--dirty",
                       "--abbrev=40", "--exclude=*"])  # fmt: skip


def _output_of(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None

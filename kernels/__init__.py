"""Triton kernels, shipped in the wheel as imbsam_fast.kernels.

Importing this package does not import triton; `load` does. Raises ImportError under
any other name: an unrelated package called `kernels` exists.
"""

import functools
import importlib
import os
from importlib.util import find_spec
from types import ModuleType

import torch

if __name__ != "imbsam_fast.kernels":
    raise ImportError(f"imported as {__name__!r}; import it as 'imbsam_fast.kernels'")

_NOT_INTERPRETED = (
    "on the CPU the Triton kernels only run in Triton's interpreter, a tool for tests: "
    "set TRITON_INTERPRET=1 before triton is imported"
)
_INTERPRETED = "TRITON_INTERPRET is set, which makes the Triton kernels run on the CPU"

# The oldest triton that passes float64 arguments of a kernel as such (that of torch 2.8), which
# is the oldest that the kernels were compiled and interpreted with.
_OLDEST_TRITON = (3, 4)

# The oldest NVIDIA GPUs for which the kernels were compiled.
_OLDEST_CAPABILITY = (8, 0)


def load() -> ModuleType:
    """The backend: a module with the functions of `reference.py`. Imports triton."""
    return importlib.import_module(".operations", __name__)


def reason_unavailable(device_type: str) -> str | None:
    """None where the kernels run on `device_type`, else why they do not."""
    if not _installed():
        return "triton is not installed (torch's Linux builds for GPUs bring it)"
    if device_type not in ("cpu", "cuda"):
        return f"the Triton kernels are not for {device_type} devices"
    if device_type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        return _NOT_INTERPRETED  # known without importing triton
    if (error := _import_error()) is not None:
        return error
    if load().INTERPRETED:
        return None if device_type == "cpu" else _INTERPRETED
    return _NOT_INTERPRETED if device_type == "cpu" else _no_gpu()


@functools.cache
def _installed() -> bool:
    return find_spec("triton") is not None


@functools.cache
def _import_error() -> str | None:
    try:
        version = importlib.import_module("triton").__version__
        if tuple(map(int, version.split(".")[:2])) < _OLDEST_TRITON:
            return f"triton is {version}, expected {'.'.join(map(str, _OLDEST_TRITON))} or newer"
        load()
    except ImportError as error:
        return f"the Triton kernels could not be imported: {error}"
    return None


def _no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip or capability >= _OLDEST_CAPABILITY:
        return None
    return "the Triton kernels need compute capability {}.{}, this GPU has {}.{}".format(
        *_OLDEST_CAPABILITY, *capability
    )

"""The compiled module with CUDA kernels whose launches do nothing, for machines without a GPU.

    python -m benchmarks.launch_nothing

builds it, in about two minutes, from csrc/ and the runtime's stand-in of the tests. It takes g++
and the headers of nvcc and pybind11.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from imbsam_fast.ops import dispatch, native_cuda

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "launch_nothing"
LIBRARY = BUILD / "_C.so"

RUNTIME = """\
#define cudaLaunchKernel launch_on_host
#include "{stand_in}"
#undef cudaLaunchKernel
template <class... A>
cudaError_t cudaLaunchKernel(void (*)(A...), dim3, dim3, void**, size_t, cudaStream_t) {{
  return cudaSuccess;
}}
"""


def build() -> None:
    nvcc, compiler = shutil.which("nvcc"), shutil.which("g++")
    if nvcc is None or compiler is None:
        raise SystemExit("nvcc or g++ was not found: the headers of the one and the other itself")
    import pybind11

    BUILD.mkdir(parents=True, exist_ok=True)
    stand_in = ROOT / "tests" / "cuda_on_host" / "cuda_runtime.h"
    (BUILD / "cuda_runtime.h").write_text(RUNTIME.format(stand_in=stand_in))
    # nvcc may be a link or a script: it says itself where it lives.
    dry_run = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    (top,) = [line.split("=", 1)[1] for line in dry_run.splitlines() if line.startswith("#$ TOP=")]
    includes = [BUILD, Path(top.strip()) / "include", sysconfig.get_paths()["include"]]
    flags = ["-std=c++17", "-fPIC", "-O2", "-w", "-fvisibility=hidden"]
    flags += ["-DIMBSAM_CUDA", '-DIMBSAM_CUDA_ARCHITECTURES=""', "-DIMBSAM_ISA=baseline"]
    flags += [f"-I{path}" for path in (*includes, pybind11.get_include())]
    if platform.machine() == "x86_64":
        flags += ["-include", "immintrin.h"]  # for streaming stores, which every one of them has
    csrc = ROOT / "csrc"
    sources = [*sorted((csrc / "cuda").glob("*.cu")), stand_in.parent / "fibers.cpp"]
    sources += [*sorted(csrc.glob("*.cpp")), *sorted((csrc / "cpu").glob("*.cpp"))]
    objects = [str(BUILD / f"{source.name}.o") for source in sources]
    for source, out in zip(sources, objects):
        print(source.name)
        subprocess.run([compiler, *flags, "-x", "c++", "-c", str(source), "-o", out], check=True)
    subprocess.run([compiler, "-shared", "-o", str(LIBRARY), *objects], check=True)


def load() -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("_C", str(LIBRARY))
    spec = importlib.util.spec_from_file_location("_C", LIBRARY, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.connect(torch.Tensor, torch.nn.Parameter)
    return module


class OnNothing:
    """An optimizer on CPU tensors whose calls take the way of CUDA tensors, to no kernel."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.module = optimizer, load()

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.optimizer, name)

        def on_nothing() -> None:
            # By hand, since mock.patch takes longer than a step.
            before = native_cuda._C, native_cuda._on, dispatch.select
            native_cuda._C, native_cuda._on = self.module, lambda device: (0, 0)
            dispatch.select = lambda device: native_cuda
            try:
                call()
            finally:
                native_cuda._C, native_cuda._on, dispatch.select = before

        return on_nothing


if __name__ == "__main__":
    build()

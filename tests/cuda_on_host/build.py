"""Builds the module _C for the CPU with csrc/cuda/ in it, and the PTX of nvcc beside it."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from cuda_on_host import ptx, translate

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILD = HERE.parents[1] / "build/cuda_on_host"
UNDEFINED = [
    "-fsanitize=alignment,bounds,integer-divide-by-zero,shift,signed-integer-overflow",
    "-fsanitize-undefined-trap-on-error",
]
# Compiled without fused multiply-add: as cmake/cuda.cmake says.
BIT_EXACT = re.search(
    r"set\(bit_exact ([^)]*)\)", (HERE.parents[1] / "cmake/cuda.cmake").read_text()
)[1].split()


def reason_unavailable() -> str | None:
    """What is missing for a build here."""
    if shutil.which("nvcc") is None or shutil.which("g++") is None:
        return "needs nvcc, for its headers, and g++"
    if importlib.util.find_spec("pybind11") is None:
        return "needs pybind11"
    return None


@functools.cache
def includes() -> list[Path]:
    """Where the headers are."""
    import pybind11

    # nvcc may be a link or a script: it says itself where it lives.
    command = ["nvcc", "--dryrun", "x.cu"]
    dry_run = subprocess.run(command, capture_output=True, text=True).stderr
    (top,) = [line.split("=", 1)[1] for line in dry_run.splitlines() if line.startswith("#$ TOP=")]
    python = Path(sysconfig.get_paths()["include"])
    return [HERE, Path(top.strip()) / "include", python, Path(pybind11.get_include())]


# `make ptx`: everything that can run here is tested, which takes minutes.
IS_WHOLE = os.environ.get("IMBSAM_PTX") == "all"


@functools.cache
def code() -> list[str]:
    """What is tested: the PTX of a release, which is that of the oldest GPUs.

    In a whole test also the sources, and the PTX of sm_90 and of the newest that nvcc knows.
    """
    if not IS_WHOLE:
        return ["compute_75"]
    known = subprocess.run(
        ["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout.split()
    newest = max(known, key=lambda name: int(name.partition("_")[2]))
    return list(dict.fromkeys(["sources", "compute_75", "compute_90", newest]))


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def made(name: str, inputs: Iterable[Path], *command: str | Path) -> Path:
    """What the command writes, under build/, made once for these inputs by whoever comes first."""
    inputs = sorted(inputs)
    digest = hashlib.sha256(" ".join(map(str, command)).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    out = BUILD / f"{digest.hexdigest()[:16]}-{name}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with out.with_name(out.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            unfinished = out.with_name("unfinished-" + out.name)
            run(*command, "-o", unfinished)
            unfinished.rename(out)
    return out


def headers() -> list[Path]:
    return [p for top in (CSRC, HERE) for p in top.rglob("*.*h") if p.suffix in (".h", ".cuh")]


def build_sources() -> Path:
    """The module _C with the CUDA kernels, and the CPU kernels for the baseline alone."""
    flags = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-w"]
    flags += ["-DIMBSAM_CUDA", '-DIMBSAM_CUDA_ARCHITECTURES=""', "-DIMBSAM_ISA=baseline"]
    flags += [*(f"-I{path}" for path in includes())]
    # Where the sources are run, a misaligned access or an overflow stops the process.
    checked = ["-O1", *(UNDEFINED if IS_WHOLE else [])]
    sources = dict.fromkeys(sorted((CSRC / "cuda").glob("*.cu")), checked)
    sources |= {HERE / "fibers.cpp": ["-O1"], CSRC / "bindings.cpp": ["-O0"]}
    intrinsics = ["-include", "immintrin.h"] if platform.machine() == "x86_64" else []
    for name in ("drivers", "losses", "kernels"):
        sources[CSRC / f"cpu/{name}.cpp"] = ["-O0", *intrinsics]

    def compile_(path: Path) -> Path:
        command = ["g++", *flags, *sources[path], "-x", "c++", "-c", path]
        own = HERE in path.parents or path.suffix == ".cu"  # what includes cuda_runtime.h
        others = [h for h in headers() if CSRC in h.parents and (own or h.suffix == ".h")]
        needed = [*others, HERE / "cuda_runtime.h"] if own else others
        return made(f"{path.stem}.o", [path, *needed], *command)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_, sources))
    return made("_C.so", objects, "g++", "-shared", *objects)


@dataclass(frozen=True)
class PtxLibrary:
    """The kernels of one .cu file, from its PTX."""

    path: Path
    kernels: list[translate.Kernel]


def cuda_sources() -> list[Path]:
    """The .cu files with kernels."""
    return [p for p in sorted((CSRC / "cuda").glob("*.cu")) if '.cuh"' in p.read_text()]


def ptx_of(source: Path, architecture: str) -> Path:
    """What nvcc makes of a source; lines of the source are named in it."""
    fused = ["-fmad=false"] if f"csrc/cuda/{source.name}" in BIT_EXACT else []
    command = ["nvcc", "-std=c++17", "-ptx", "-lineinfo", *fused, f"-arch={architecture}", source]
    needed = [header for header in headers() if CSRC in header.parents]
    return made(f"{source.stem}-{architecture}.ptx", [source, *needed], *command)


def build_ptx(host: Path, text: Path, wanted: str = "", mutable: bool = False) -> PtxLibrary:
    """The kernels of a PTX file that match `wanted`, for the module `host`."""
    kernels = translate.kernels(text.read_text(), wanted, mutable)
    written = translate.translated(kernels)
    code = BUILD / f"{hashlib.sha256(written.encode()).hexdigest()[:16]}-{text.stem[17:]}.cpp"
    code.write_text(written)
    flags = ["-std=c++17", "-fPIC", "-shared", "-O0", "-ffp-contract=off", "-w"]
    flags += ["-fno-strict-aliasing", *(f"-I{path}" for path in includes())]
    return PtxLibrary(
        made(f"{code.stem[17:]}.so", [code, *headers()], "g++", *flags, code, host), kernels
    )


def build_all_ptx(host: Path, architecture: str) -> list[PtxLibrary]:
    with ThreadPoolExecutor(2) as pool:
        return list(
            pool.map(lambda source: build_ptx(host, ptx_of(source, architecture)), cuda_sources())
        )


class Host:
    """The module of `build_sources`, loaded, and what runs when it launches a kernel."""

    def __init__(self, path: Path) -> None:
        loader = importlib.machinery.ExtensionFileLoader("_C", str(path))
        spec = importlib.util.spec_from_file_location("_C", path, loader=loader)
        assert spec is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        loader.exec_module(self.module)
        self.module.connect(torch.Tensor, torch.nn.Parameter)
        self.path, self.library = path, ctypes.CDLL(str(path))
        self.kernels: dict[str, int] = {}  # key -> address
        self.is_source = True  # what runs
        self._shared_by_blocks(path)

    def _shared_by_blocks(self, path: Path) -> None:
        """Finds the kernels and what they declare __shared__, which is static here."""
        symbols = [line.split() for line in run("nm", "-S", path).splitlines()]
        named = {s[-1]: int(s[0], 16) for s in symbols if len(s) >= 3}
        anchor = ctypes.addressof(ctypes.c_char.in_dll(self.library, "on_host_anchor"))
        base = anchor - named["on_host_anchor"]
        for *numbers, kind, name in (s for s in symbols if len(s) == 4):
            address = ctypes.c_void_p(base + int(numbers[0], 16))
            key = ptx.key(name)
            if kind in "tTwW" and key and name.startswith("_ZN6imbsam4cuda"):
                self.kernels[key] = address.value
            is_static = kind in "bBuV" and name.startswith("_ZZN6imbsam4cuda")
            if is_static and f"_ZGV{name[2:]}" not in named:  # without a constructor
                self.library.on_host_shares(address, ctypes.c_size_t(int(numbers[1], 16)))

    def seed(self, seed: int) -> None:
        """Where the random order of warps begins."""
        self.library.on_host_seed(ctypes.c_uint32(seed))

    def run_sources(self) -> None:
        self.is_source = True
        for address in self.kernels.values():
            self.library.on_host_replace(ctypes.c_void_p(address), None)

    def run_ptx(self, libraries: Iterable[PtxLibrary]) -> list[ctypes.CDLL]:
        """From now on these kernels run in place of their sources."""
        loaded = []
        self.is_source = False
        for library in libraries:
            dll = ctypes.CDLL(str(library.path))
            shared = ctypes.byref(ctypes.c_char.in_dll(dll, "shared"))
            size = max((kernel.shared_bytes for kernel in library.kernels), default=0)
            self.library.on_host_shares(shared, ctypes.c_size_t(size))
            table = ctypes.addressof(ctypes.c_char.in_dll(dll, "ptx_kernels"))
            for i, kernel in enumerate(library.kernels):
                entry = ctypes.c_void_p(table + i * 24)
                self.library.on_host_replace(ctypes.c_void_p(self.kernels[kernel.key]), entry)
            loaded.append(dll)
        return loaded

    def noted(self, on: bool) -> list[tuple[int, int, int, int]]:
        """(instruction, thread, address, size) of the first warp's accesses since `noted(True)`."""
        count = ctypes.c_size_t()
        self.library.on_host_note.restype = ctypes.POINTER(ctypes.c_uint64)
        words = self.library.on_host_note(int(on), ctypes.byref(count))
        return [tuple(words[4 * i : 4 * i + 4]) for i in range(count.value)]

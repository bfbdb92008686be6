"""Runs on the CPU the PTX that Triton makes of kernels, in place of its driver of a GPU.

To be used before anything imports kernels, in a process without TRITON_INTERPRET: Triton then
specialises, compiles for sm_90 and caches as on a GPU; what would be loaded there is translated,
and launched on the fibers of fibers.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from types import SimpleNamespace
from typing import Any

from cuda_on_host import build

SHARED_BYTES = 48 << 10  # of ptx.h
FORMATS = {"i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}


@functools.cache
def host() -> ctypes.CDLL:
    return ctypes.CDLL(str(fibers()))


@functools.cache
def fibers() -> build.Path:
    flags = ["-std=c++17", "-fPIC", "-shared", "-O1", "-w"]
    flags += [f"-I{path}" for path in build.includes()]
    source = build.HERE / "fibers.cpp"
    needed = [source, build.HERE / "cuda_runtime.h"]
    return build.made("fibers.so", needed, "g++", *flags, source)


class Launcher:
    """Triton's way to one compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        from triton.runtime.cache import get_cache_manager

        name = source.name[:150]
        group = get_cache_manager(metadata.hash).get_group(f"{name}.json")
        self.types = list(source.signature.values())
        self.threads = 32 * metadata.num_warps
        assert metadata.global_scratch_size == metadata.profile_scratch_size == 0
        text = build.BUILD / f"{metadata.hash[:16].lower()}-{name}.ptx"
        build.BUILD.mkdir(parents=True, exist_ok=True)
        text.write_text(build.Path(group[f"{name}.ptx"]).read_text())
        library = build.build_ptx(fibers(), text)
        self.loaded = ctypes.CDLL(str(library.path))
        (self.kernel,) = library.kernels
        if metadata.shared:  # which is declared without its size
            shared = ctypes.byref(ctypes.c_char.in_dll(self.loaded, "shared"))
            host().on_host_shares(shared, ctypes.c_size_t(metadata.shared))

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, launched: Any,
        enter: Any, leave: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        assert z == 1
        parameters = self._parameters(arguments)
        assert len(parameters) == self.kernel.parameter_bytes
        table = ctypes.addressof(ctypes.c_char.in_dll(self.loaded, "ptx_kernels"))
        host().on_host_launch(ctypes.c_void_p(table), x, y, self.threads, parameters)

    def _parameters(self, arguments: tuple[Any, ...]) -> bytes:
        """Each at a multiple of its size, then the addresses of scratch memory that is not used."""
        packed = b""
        for type_, value in zip(self.types, arguments, strict=True):
            if type_ == "constexpr":
                continue
            format_ = "Q" if type_[0] == "*" else FORMATS[type_]
            value = value.data_ptr() if type_[0] == "*" else value
            packed += bytes(-len(packed) % struct.calcsize(format_)) + struct.pack(format_, value)
        return packed + bytes(-len(packed) % 8 + 16)


class Driver:
    """Of one device, as far as launches ask."""

    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=lambda name, kernel, shared, device: (name, 0, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES},
    )

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def use() -> None:
    """Make Triton launch on the CPU, and the backend say that it can."""
    import triton

    from imbsam_fast import kernels

    assert not kernels.load().INTERPRETED
    triton.runtime.driver.set_active(Driver())
    others = "Triton's kernels run on the CPU here"
    kernels.reason_unavailable = lambda device: None if device == "cpu" else others

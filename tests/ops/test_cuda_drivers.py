"""What the CUDA part says under drivers and on devices that are not here: a reason, never an error.

tests/fake_driver/libcuda.c stands in for libcuda.so.1, below the CUDA runtime of the nvcc that is
here: one of CUDA 13 refuses drivers below 13. As the runtime goes no further with a driver that is
not NVIDIA's, runtime.cpp stands in for it where there are devices; and what a release built with
12.8 says of them is told by reason_not_served.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_on_host import build

from imbsam_fast.ops import dispatch, native, native_cuda

if (missing := build.reason_unavailable()) is not None:
    pytest.skip(missing, allow_module_level=True)

pytestmark = pytest.mark.slow  # compiles

HERE = Path(__file__).parents[1] / "fake_driver"
INCLUDE = build.includes()[1]
LIBRARY = next(
    (p for name in ("lib", "lib64") for p in INCLUDE.parent.glob(f"**/{name}/libcudart_static.a")),
    None,
)
if LIBRARY is None:
    pytest.skip("needs libcudart_static.a beside nvcc", allow_module_level=True)

TOOLKIT = int(
    re.search(r"#define CUDART_VERSION\s+(\d+)", (INCLUDE / "cuda_runtime_api.h").read_text())[1]
)
# That of cmake/cuda.cmake and docs/building.md.
RELEASE = "75-real,80-real,90-real,100-real,120-real,75-virtual"


@pytest.fixture(scope="module")
def driver() -> Path:
    """The directory of a libcuda.so.1."""
    source = HERE / "libcuda.c"
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", source]
    library = build.made("libcuda.so.1", [source], *command)
    directory = build.BUILD / f"driver-{library.name[:16]}"
    directory.mkdir(exist_ok=True)
    link = directory / "libcuda.so.1"
    if not link.exists():
        link.symlink_to(library)
    return directory


def program(architectures: str, runtime: str | Path = HERE / "runtime.cpp") -> Path:
    """runtime.cu of a build for these architectures, and a main that prints what it says."""
    sources = [build.CSRC / "cuda/runtime.cu", HERE / "reason.cpp"]
    libraries = ["-x", "none", runtime, "-ldl", "-lpthread", "-lrt"]
    if runtime != LIBRARY:
        sources, libraries = [*sources, Path(runtime)], []
    command: list[str | Path] = ["g++", "-std=c++17", f"-I{INCLUDE}", f"-I{build.CSRC}"]
    command += [f'-DIMBSAM_CUDA_ARCHITECTURES="{architectures}"', "-x", "c++", *sources]
    return build.made("reason", [*sources, *build.headers()], *command, *libraries)


def said(program: Path, libraries: Path = HERE, **settings: str | int) -> str:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    environment |= {f"FAKE_{name.upper()}": str(value) for name, value in settings.items()}
    done = subprocess.run([program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def name_of(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@pytest.mark.parametrize("version", [11080, 12000])
def test_a_driver_that_is_too_old(driver: Path, version: int) -> None:
    reason = said(program(RELEASE, LIBRARY), driver, version=version, init=0)
    assert reason == f"the NVIDIA driver is for CUDA {name_of(version)}, expected 12.1 or newer"


@pytest.mark.parametrize("version", [12010, 12040, 12080])
def test_a_driver_that_is_too_old_for_the_runtime(driver: Path, version: int) -> None:
    if TOOLKIT < 13000:
        pytest.skip("a runtime of CUDA 12 takes every driver from 12.1 on")
    reason = said(program(RELEASE, LIBRARY), driver, version=version, init=0)
    both = f"(built with CUDA {name_of(TOOLKIT)}, driver for CUDA {name_of(version)})"
    assert reason == f"CUDA driver version is insufficient for CUDA runtime version {both}"


@pytest.mark.parametrize(
    ("init", "expected"),
    [(100, "no CUDA-capable device is detected"), (999, "unknown error"), (0, "")],
)
def test_a_driver_without_a_device(driver: Path, init: int, expected: str) -> None:
    """Or one that the runtime does not know."""
    reason = said(program(RELEASE, LIBRARY), driver, version=TOOLKIT, init=init)
    version = name_of(TOOLKIT)
    assert reason.startswith(expected)
    assert reason.endswith(f" (built with CUDA {version}, driver for CUDA {version})")


def test_no_driver(tmp_path: Path) -> None:
    assert said(program(RELEASE, LIBRARY), tmp_path) == "no NVIDIA driver was found"


def test_a_device_that_cannot_be_asked() -> None:
    reason = said(program(RELEASE), version=TOOLKIT, devices="90", error=999)
    assert reason == "cuda: CUDA error: an error"


@pytest.mark.parametrize(
    ("architectures", "devices", "expected"),
    [
        (RELEASE, "90,70", "device 1 has compute capability 7.0, this build is for 75-real,"),
        ("90-real", "100", "device 0 has compute capability 10.0, this build is for 90-real "),
        ("90a", "100", "device 0 has compute capability 10.0, this build is for 90a "),
        ("80-real", "87", "device 0 has compute capability 8.7, this build is for 80-real "),
    ],
)
def test_a_device_that_the_build_has_no_code_for(
    architectures: str, devices: str, expected: str
) -> None:
    reason = said(program(architectures), version=TOOLKIT, devices=devices)
    assert reason.startswith(expected)
    assert reason.endswith(" (hide the device with CUDA_VISIBLE_DEVICES)")


@pytest.mark.parametrize("devices", ["75", "86,89", "87", "100,103", "110", "120,121", "150"])
def test_devices_of_a_release(devices: str) -> None:
    """Also those that it has no machine code for: systems on a chip, and what is yet to come."""
    assert said(program(RELEASE), version=TOOLKIT, devices=devices) == ""


def test_every_reason_makes_the_backend_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Built:
        has_cuda = True

        @staticmethod
        def cuda_reason_unavailable() -> str:
            return "any of these"

    monkeypatch.setattr(native, "_C", Built)
    monkeypatch.setattr(native.torch.version, "cuda", "12.8")
    assert dispatch.available("cuda")["native"] == "any of these"
    assert dispatch.select(torch.device("cuda")) is not native_cuda


PTX_OF_128 = "it needs the PTX of this build, which takes a driver for CUDA 12.8 or newer, this"


@pytest.mark.parametrize(
    ("architectures", "device", "version", "expected"),
    [
        (RELEASE, 90, 12010, ""),
        (RELEASE, 86, 12040, ""),
        (RELEASE, 120, 12080, ""),
        (RELEASE, 103, 13000, ""),
        (RELEASE, 87, 12080, ""),  # a Tegra, by PTX
        (RELEASE, 87, 12040, PTX_OF_128),
        (RELEASE, 150, 12080, ""),
        (RELEASE, 150, 12040, PTX_OF_128),
        (RELEASE, 70, 12080, "this build is for 75-real,"),
        ("90", 100, 12080, ""),
        ("90a-real", 90, 12080, ""),
        ("90a-virtual", 100, 12080, "this build is for 90a-virtual"),
        ("87-real", 87, 12040, ""),
        ("86-real", 80, 12040, "this build is for 86-real"),
        ("86-real", 89, 12040, ""),
        ("native", 90, 12040, ""),  # nothing to compare with
    ],
)
def test_what_a_release_of_12_8_says(
    architectures: str, device: int, version: int, expected: str
) -> None:
    command = [program(RELEASE), architectures, "12080", str(device), str(version)]
    reason = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert reason.startswith(expected) if expected else reason == ""


# ---------------------------------------------------------------- what a release is built with

# In CUDA 12.1 and before. Anything else needs a look into its release notes first.
IN_CUDA_12_1 = """
__CUDACC__ __bfloat162float __device__ __fadd_rn __float2bfloat16_rn __float2half_rn __fmaf_rn
__fmul_rn __forceinline__ __fsub_rn __funnelshift_r __global__ __grid_constant__ __half
__half2float __host__ __launch_bounds__ __nv_bfloat16 __restrict__ __shared__ __shfl_down_sync
__syncthreads __syncthreads_or cudaDevAttrComputeCapabilityMajor
cudaDevAttrComputeCapabilityMinor cudaDevAttrMultiProcessorCount cudaDeviceGetAttribute
cudaDriverGetVersion cudaError_t cudaGetDevice cudaGetDeviceCount cudaGetErrorString
cudaGetLastError cudaLaunchKernel cudaOccupancyMaxActiveBlocksPerMultiprocessor cudaSetDevice
cudaStream_t cudaSuccess
"""
HEADERS = {"cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h"}


def test_the_sources_need_nothing_newer_than_cuda_12_1() -> None:
    sources = [p for p in (build.CSRC / "cuda").iterdir() if p.suffix in (".cu", ".cuh", ".h")]
    assert len(sources) > 8
    for path in sources:
        text = re.sub(r"//[^\n]*", "", path.read_text())
        used = set(re.findall(r"\b(?:cuda[A-Z]\w+|__\w+)\b", text))
        assert used <= set(IN_CUDA_12_1.split()), (path.name, used)
        included = set(re.findall(r"#include <(cu\w+\.h)>", text))
        assert included <= HEADERS, path.name


def test_the_default_architectures_are_those_of_a_release() -> None:
    makefile = (build.CSRC.parent / "Makefile").read_text()
    assert RELEASE.replace(",", ";") in makefile
    assert RELEASE.replace(",", ";") in (build.CSRC.parent / "docs/building.md").read_text()

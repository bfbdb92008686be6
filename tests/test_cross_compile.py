"""The CPU sources compile for machines that are not here; they are not linked, and do not run."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("ziglang")
pybind11 = pytest.importorskip("pybind11")
CSRC = Path(__file__).parent.parent / "csrc"
ELF_AARCH64 = 0xB7
MACH_ARM64 = 0x0100000C
TARGETS = {
    "aarch64-linux-gnu.2.28": ELF_AARCH64,
    "aarch64-macos.11.0": MACH_ARM64,
}
SOURCES = {
    "cpu/kernels.cpp": ["-DIMBSAM_ISA=baseline"],
    "cpu/drivers.cpp": [],
    "bindings.cpp": ["-fvisibility=hidden"],
}


def machine(content: bytes) -> int:
    """The number of the processor in the head of an ELF or Mach-O object."""
    if content[:4] == b"\x7fELF":
        return struct.unpack_from("<H", content, 18)[0]
    assert content[:4] == b"\xcf\xfa\xed\xfe"
    return struct.unpack_from("<I", content, 4)[0]


@pytest.mark.slow  # a compiler's seconds
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", TARGETS)
def test_sources_compile_for(target, source, tmp_path):
    # Only Python's headers, not the rest of the system's, which are of this machine.
    headers = tmp_path / "include"
    shutil.copytree(sysconfig.get_path("include"), headers)
    made = tmp_path / "object.o"
    command = [
        *(sys.executable, "-m", "ziglang", "c++", "-target", target, "-std=c++17", "-O0", "-fPIC"),
        *("-ffp-contract=off", "-isystem", str(headers)),
        *("-isystem", pybind11.get_include(), *SOURCES[source]),
        *("-c", str(CSRC / source), "-o", str(made)),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert machine(made.read_bytes()) == TARGETS[target]

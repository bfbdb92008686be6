"""What nvcc made of the CUDA kernels, read from the compiled module without a GPU.

No kernel may spill registers to local memory, and the elements must move in 128-bit loads and
stores. `python -m tests.test_cuda_binary` prints the registers of every kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from imbsam_fast.ops import native
from imbsam_fast.ops.updates import UPDATES

DTYPES = ("float", "double", "__nv_bfloat16", "__half")
# Kernel -> whether it writes the elements that it reads.
OVER_ELEMENTS = {
    "squared_norm_kernel": False,
    "grad_check_kernel": False,
    "perturb_kernel": True,
    **{f"{op}kernel": True for op in UPDATES},  # update_kernel of csrc/cuda/update.cuh for each
    "merge_kernel": True,
    "row_losses_kernel": False,
    "row_gradients_kernel": True,
    "soft_row_losses_kernel": False,
}
BY_ELEMENT = ("soft_gradients_kernel",)  # rows without weight are written by packs
SMOOTHING = ("row_losses_kernel", "soft_row_losses_kernel")  # with a variant for it
OTHERS = ("sum_losses_kernel", "sum_blocks_kernel", "sum_soft_losses_kernel")
# Kernels with a variant for master weights, which the half dtypes have.
KEEPING = ("perturb_kernel", *(f"{op}kernel" for op in UPDATES))
# All that a wheel may carry.
ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_110", "sm_120")


@dataclass
class Kernel:
    """One kernel of one architecture."""

    name: str  # with its template arguments
    registers: int = 0
    stack: int = 0  # bytes a thread
    instructions: Counter = field(default_factory=Counter)  # opcode with its modifiers -> how many

    @property
    def base(self) -> str:
        return self.name.partition("<")[0]

    def count(self, opcode: str) -> int:
        """Instructions such as LDG.E.128.CONSTANT, whatever modifiers stand between."""
        wanted = set(opcode.split("."))
        return sum(n for name, n in self.instructions.items() if wanted <= set(name.split(".")))


@functools.cache
def cuobjdump() -> str | None:
    """The disassembler of the CUDA toolkit, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin:
        brought = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
        found = str(brought) if brought.exists() else None
    return found


def _run(*arguments: str) -> str:
    command = [str(cuobjdump()), *arguments, native._C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _readable(mangled: str) -> str:
    """perturb_kernel<float> for _ZN6imbsam4cuda..14perturb_kernelIfEEv..."""
    base = re.search(
        rf"\d({'|'.join(('update_kernel', *OVER_ELEMENTS, *BY_ELEMENT, *OTHERS))})I", mangled
    )
    assert base, mangled
    name = base[1]
    flags = r"(?:Lb([01]))?(?:ELb([01]))?"
    arguments = re.search(rf"{name}I(f|d|6__half|13__nv_bfloat16){flags}E", mangled)
    assert arguments, mangled
    if name == "update_kernel":  # imbsam::Base is the number of the base
        which = re.search(r"Lb[01]ELNS_4BaseE(\d+)E", mangled)
        assert which, mangled
        name = f"{UPDATES[int(which[1])]}kernel"
    element = {"f": "float", "d": "double"}.get(arguments[1], arguments[1].lstrip("0123456789"))
    flag = ", master" if name in KEEPING else ", smooth"
    held = ", held" if arguments[3] == "1" else ""
    return f"{name}<{element}{flag if arguments[2] == '1' else ''}{held}>"


@functools.cache
def architectures() -> str:
    """What cuobjdump says of them."""
    return _run("--list-elf")


@functools.cache
def kernels(architecture: str) -> dict[str, Kernel]:
    """The kernels compiled for an architecture; none where it was not asked for."""
    if f".{architecture}." not in architectures():
        return {}
    found: dict[str, Kernel] = {}
    name = ""
    for line in _run("-arch", architecture, "--dump-resource-usage").splitlines():
        if "Function " in line:
            name = _readable(line.split("Function ")[1].rstrip(":"))
        elif "REG:" in line:
            registers, stack = (int(re.search(k + r":(\d+)", line)[1]) for k in ("REG", "STACK"))
            found[name] = Kernel(name, registers, stack)
    for line in _run("-arch", architecture, "--dump-sass").splitlines():
        if "Function : " in line:
            name = _readable(line.split("Function : ")[1])
        elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            found[name].instructions[code[1]] += 1
    return found


reason = native.reason_unavailable("cpu")
if reason is None and not native._C.has_cuda:
    reason = native.reason_unavailable("cuda")
if reason is None and cuobjdump() is None:
    reason = "no cuobjdump was found (the CUDA toolkit and Triton have one)"
pytestmark = [
    pytest.mark.skipif(reason is not None, reason=str(reason)),
    pytest.mark.slow,  # the first test of an architecture reads its machine code for all
]


# They need more than the 64 registers that sm_75 leaves a thread: bytes that ptxas spills.
SPILLED = {
    ("adam_update_kernel<double>", "sm_75"): 16,
    ("sgd_update_kernel<__nv_bfloat16>", "sm_75"): 8,
}


@pytest.fixture(params=ARCHITECTURES)
def compiled(request: pytest.FixtureRequest) -> dict[str, Kernel]:
    found = kernels(request.param)
    if not found:
        pytest.skip(f"this build has no kernels for {request.param}")
    return found


def test_every_kernel_in_every_dtype(compiled: dict[str, Kernel]) -> None:
    expected = {f"{name}<{dtype}>" for name in OVER_ELEMENTS for dtype in DTYPES}
    expected |= {f"{name}<{dtype}, smooth>" for name in SMOOTHING for dtype in DTYPES}
    expected |= {f"{name}<{dtype}>" for name in BY_ELEMENT for dtype in DTYPES}
    expected |= {f"{name}<{dtype}, master>" for name in KEEPING for dtype in DTYPES[2:]}
    expected |= {f"{name}<{dtype}>" for name in OTHERS for dtype in DTYPES[:2]}
    expected |= {f"perturb_kernel<{dtype}, held>" for dtype in DTYPES}
    expected |= {f"perturb_kernel<{dtype}, master, held>" for dtype in DTYPES[2:]}
    assert set(compiled) == expected


def test_no_local_memory(compiled: dict[str, Kernel], request: pytest.FixtureRequest) -> None:
    for kernel in compiled.values():
        spilled = SPILLED.get((kernel.name, request.node.callspec.params["compiled"]), 0)
        assert kernel.stack == spilled, kernel.name
        if not spilled:
            assert not any(kernel.count(opcode) for opcode in ("LDL", "STL")), kernel.name


def test_elements_move_in_128_bits(compiled: dict[str, Kernel]) -> None:
    for kernel in compiled.values():
        if kernel.base in OVER_ELEMENTS:
            assert kernel.count("LDG.128") > 0, kernel.name
            assert (kernel.count("STG.128") > 0) == OVER_ELEMENTS[kernel.base], kernel.name


def test_sums_keep_four_loads_under_way(compiled: dict[str, Kernel]) -> None:
    for kernel in compiled.values():
        if kernel.base in ("squared_norm_kernel", "grad_check_kernel", *SMOOTHING):
            assert kernel.count("LDG.128") >= 4, kernel.name


def test_two_blocks_of_a_sum_fit_a_multiprocessor(compiled: dict[str, Kernel]) -> None:
    """65,536 registers for two blocks of 512 threads."""
    for kernel in compiled.values():
        if kernel.base in ("squared_norm_kernel", "grad_check_kernel"):
            assert kernel.registers <= 64, kernel.name


# Additions, products and conversions in float64 (DADD, DMUL, DFMA, F2F): as long as every element
# took one of the last two, and now that a pack takes one addition. What is left besides is for
# packs whose squares float cannot hold.
IN_FLOAT64 = {
    "squared_norm_kernel<float>": (161, 100),
    "squared_norm_kernel<__nv_bfloat16>": (309, 150),
    "grad_check_kernel<float>": (65, 50),
    "grad_check_kernel<__nv_bfloat16>": (117, 70),
}


@pytest.mark.parametrize("name", IN_FLOAT64)
def test_sums_take_few_operations_in_float64(compiled: dict[str, Kernel], name: str) -> None:
    before, now = IN_FLOAT64[name]
    count = sum(compiled[name].count(opcode) for opcode in ("DADD", "DMUL", "DFMA", "F2F"))
    assert count <= now < before


@pytest.mark.parametrize("dtype", DTYPES[2:])
def test_exponentials_of_half_dtypes(compiled: dict[str, Kernel], dtype: str) -> None:
    """A subtraction, a product and one of the hardware's powers each; before, with a reduction of
    the argument, 4 or 5 multiply-adds more (221 in the kernel), which float32 has still.
    """
    kernel = compiled[f"row_losses_kernel<{dtype}>"]
    assert kernel.count("FFMA") <= 1
    assert kernel.count("MUFU.EX2") >= 56  # of rounds of 4 packs and of 3
    assert compiled["row_losses_kernel<float>"].count("FFMA") > 64


def test_bias_corrections_are_made_by_one_thread_a_block(compiled: dict[str, Kernel]) -> None:
    """And waited for, as they were not when every thread made them for each tile."""
    for kernel in compiled.values():
        if kernel.base == "adam_update_kernel":
            assert kernel.count("BAR") == 2, kernel.name


@pytest.mark.parametrize("name", ["perturb_kernel", "sgd_update_kernel"])
def test_updates_keep_multiplication_and_addition_apart(
    compiled: dict[str, Kernel], name: str
) -> None:
    """For the bits of the CPU kernels. What is fused is in the one division of a launch: as much
    for 4 lanes a pack as for 8. (adam_update_ divides and takes roots in every lane, which nvcc
    makes of fused instructions.)
    """
    fused = {compiled[f"{name}<{dtype}>"].count("FFMA") for dtype in ("float", "__half")}
    assert len(fused) == 1
    assert compiled["row_gradients_kernel<float>"].count("FFMA") > max(fused)


def main() -> None:
    if reason is not None:
        raise SystemExit(reason)
    for architecture in ARCHITECTURES:
        print(f"{architecture}: registers, 128-bit loads, 128-bit stores")
        for name, kernel in sorted(kernels(architecture).items()):
            loads, stores = kernel.count("LDG.128"), kernel.count("STG.128")
            print(f"  {name:44} {kernel.registers:4} {loads:4} {stores:4}")


if __name__ == "__main__":
    main()

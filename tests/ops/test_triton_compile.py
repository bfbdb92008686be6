"""Every Triton kernel compiles ahead of time to wide accesses and without spills; no GPU needed."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bases import BASES

import imbsam_fast

pytestmark = pytest.mark.slow  # compiles

# Before 3.8 it allocates registers otherwise, and needs AMD's linker.
pytest.importorskip("triton", minversion="3.8")


@functools.cache
def compiled(target: str, cache: Path) -> list[dict[str, Any]]:
    """What triton_compile.py found for the target."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(imbsam_fast.__file__).parents[1])
    environment["TRITON_CACHE_DIR"] = str(cache)
    script = Path(__file__).parents[1] / "triton_compile.py"
    done = subprocess.run(
        [sys.executable, str(script), target], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=["sm_80", "sm_90", "gfx942"])
def kernels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    return compiled(request.param, tmp_path_factory.getbasetemp() / "triton")


# Lists that a kernel reads and writes in 16-byte accesses.
READ_AND_WRITTEN = {
    "squared_norm": (2, 0),
    "perturb_": (2, 2),
    "perturb_ held": (3, 3),
    "merge_": (3, 2),
    "grad_check": (2, 0),
    "row_losses": (2, 0),  # the logits, for label smoothing once more
    "backward": (1, 1),
}
# With master weights, the lists in the dtype of the data and those in float32, of twice its size.
READ_AND_WRITTEN |= {"perturb_ master": (1 + 2, 1)}
for op, base in BASES.items():  # saved, g_h, g_p and the state; theta and the state
    n = len(base.state)
    READ_AND_WRITTEN |= {op: (3 + n, 1 + n), f"{op} master": (2 + 2 * (1 + n), 1 + 2 * (1 + n))}
PHASES = ("squared_norm", "perturb_", *BASES, "merge_", "grad_check")


def named(kernels: list[dict[str, Any]]) -> list[str]:
    return [f"{k['op']} of {k['block']}, {k['dtype']}" for k in kernels]


def test_every_kernel(kernels: list[dict[str, Any]]) -> None:
    others = {"totals", "scale", "soft_row_losses", "soft_backward", "soft_totals"}
    assert {k["op"] for k in kernels} == READ_AND_WRITTEN.keys() | others
    assert {k["dtype"] for k in kernels} >= {"fp32", "bf16"}


# tests/cuda_on_host/ runs the PTX of all kernels on the CPU (test_triton_ptx.py), but for these.
NOT_TRANSLATED = {
    "sm_80": {
        ("merge_", "bf16"): "merge_kernel: fma.rn.bf16x2",
        ("perturb_ held", "bf16"): "perturb_kernel: fma.rn.bf16",
    },
    "sm_90": {
        ("backward", "fp64"): "backward_kernel: shfl.sync.idx.b32",
        ("soft_backward", "fp64"): "soft_backward_kernel: shfl.sync.idx.b32",
    },
}


@pytest.mark.parametrize("target", NOT_TRANSLATED)
def test_all_that_can_run_without_a_gpu(
    target: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kernels = compiled(target, tmp_path_factory.getbasetemp() / "triton")
    unknown = {(k["op"], k["dtype"]): k["not_translated"] for k in kernels if k["not_translated"]}
    assert unknown == NOT_TRANSLATED[target]


def test_no_spills(kernels: list[dict[str, Any]]) -> None:
    assert named([k for k in kernels if k["spilled"]]) == []


def test_128_bit_accesses(kernels: list[dict[str, Any]]) -> None:
    """To every list, but for rows of at most 256 classes, which are mostly edge."""
    wide = [k for k in kernels if k["op"] in READ_AND_WRITTEN and k["block"] > 256]
    assert len(wide) >= 16
    for kernel in wide:
        accesses = kernel["bytes_per_thread"] // 16
        reads, writes = READ_AND_WRITTEN[kernel["op"]]
        assert accesses >= 1
        assert kernel["wide_loads"] >= reads * accesses, kernel
        assert kernel["wide_stores"] >= writes * accesses, kernel


def test_nothing_is_fused(kernels: list[dict[str, Any]]) -> None:
    """In the phases; exponentials and logarithms are made of multiply-adds."""
    assert named([k for k in kernels if k["op"].split()[0] in PHASES and k["fused"]]) == []

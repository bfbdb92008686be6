"""What the PTX computes that Triton makes of its kernels, without a GPU.

The tests of the Triton kernels run once more, in a process where Triton compiles for sm_90 as on a
GPU and tests/cuda_on_host/ runs what it made: one of each kernel, with IMBSAM_PTX=all every one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import backends
from cuda_on_host import build

pytestmark = pytest.mark.slow  # compiles

# Before 3.8 it makes other instructions of the kernels.
pytest.importorskip("triton", minversion="3.8")
if (missing := build.reason_unavailable()) is not None:
    pytest.skip(missing, allow_module_level=True)

HERE = Path(__file__).parent
UPDATE = "test_triton.py::test_updates_equal_the_cpu_kernels[triton-cpu-{}-odd-torch.{}]"
SAMPLE = [
    *(
        UPDATE.format(name, dtype)
        for name, dtype in {
            "perturb_": "bfloat16",
            "perturb_ held": "float32",
            "sgd_update_": "float32",
            "adam_update_": "bfloat16",
            "rmsprop_update_": "float32",
            "merge_": "bfloat16",
        }.items()
    ),
    "test_ops.py::test_squared_norm[triton-cpu-odd-torch.float32]",
    "test_ops.py::test_grad_check[triton-cpu-True-odd-torch.bfloat16]",
    "test_split_cross_entropy.py::test_sizes[triton-cpu-5-1003-torch.float32]",
    "test_soft_targets.py::test_sizes[triton-cpu-5-103-torch.float32]",
]
WHOLE = ("triton", "ops", "split_cross_entropy", "soft_targets")


def run(*arguments: str) -> int:
    """pytest over the PTX; how many tests passed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PYTEST"))}
    environment |= {"IMBSAM_TRITON": "ptx", "TRITON_CACHE_DIR": str(build.BUILD / "triton")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "--override-ini", "addopts=", *arguments], cwd=HERE, capture_output=True,
        text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    return int(passed)


@pytest.mark.skipif(not backends("triton"), reason="the Triton kernels do not run here")
def test_one_of_each_kernel() -> None:
    assert run(*SAMPLE) == len(SAMPLE)


@pytest.mark.skipif(os.environ.get("IMBSAM_PTX") != "all", reason="minutes: make ptx")
@pytest.mark.parametrize("of", WHOLE)
def test_every_one(of: str) -> None:
    # test_triton_compile.py names what the losses' gradients in float64 need.
    wanted = "triton and cpu" + (" and not float64" if of in WHOLE[2:] else "")
    assert run(f"test_{of}.py", "-k", wanted) > 20

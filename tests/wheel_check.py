"""Whether an installed wheel works: its compiled module, one OpenMP in the process, some tests.

    python tests/wheel_check.py [PYTEST-ARGUMENT ...]

Run as a file, so that the package is the installed one and not that of a checkout. Without
arguments it runs the quick tests of what does not depend on optional packages.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import imbsam_fast
from imbsam_fast.ops import native

TESTS = Path(__file__).parent.resolve()
QUICK = ["test_split.py", "test_losses.py", "ops", "optim", "training"]


def faults() -> list[str]:
    """What is wrong with the installation, in words."""
    found = []
    if TESTS.parent in Path(imbsam_fast.__file__).resolve().parents and not {
        "site-packages",
        "dist-packages",
    }.intersection(Path(imbsam_fast.__file__).parts):
        found.append(f"{imbsam_fast.__file__} is the checkout, not what is installed")
    if reason := native.reason_unavailable("cpu"):
        found.append(f"the compiled module does not load: {reason}")
    maps = Path("/proc/self/maps")
    if maps.exists():
        openmp = set(re.findall(r"\S*/lib(?:gomp|omp|iomp)\S*", maps.read_text()))
        if len(openmp) > 1:
            found.append(f"{len(openmp)} copies of OpenMP in one process: {sorted(openmp)}")
    return found


def main(arguments: list[str]) -> int:
    where = Path(imbsam_fast.__file__).parent
    print(f"imbsam-fast {imbsam_fast.__version__} in {where}, torch {torch.__version__}")
    if found := faults():
        print("\n".join(found))
        return 1
    return int(pytest.main(arguments or ["-m", "quick", *(str(TESTS / name) for name in QUICK)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

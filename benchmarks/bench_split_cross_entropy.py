"""The head and the tail loss with their gradients, against two formulations in plain PyTorch.

python -m benchmarks.bench_split_cross_entropy [--rounds N] [--json FILE] [--quick]
"""

from __future__ import annotations

import sys

from imbsam_fast import bench, bench_cases
from imbsam_fast.bench_measure import Operation

SIZES = ((64, 100), (128, 1000), (512, 8142))  # rows, classes


def operations(quick: bool) -> list[Operation]:
    if quick:
        return bench_cases.copy_operations(1_000_000) + bench_cases.loss_operations(8, 32, 4096)
    found = bench_cases.copy_operations()
    for rows, classes in SIZES:
        found += bench_cases.loss_operations(rows, classes)
    return found


if __name__ == "__main__":
    sys.exit(bench.run_script(__file__, operations, bench_cases.loss_summary))

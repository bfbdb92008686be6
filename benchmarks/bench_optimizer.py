"""The optimizer phases and the whole step, from a CIFAR network to ResNet-50 with 8,142 classes.

python -m benchmarks.bench_optimizer [--rounds N] [--json FILE] [--quick]
"""

from __future__ import annotations

import sys

from imbsam_fast import bench, bench_cases
from imbsam_fast.bench_measure import Operation


def operations(quick: bool) -> list[Operation]:
    sizes = [(bench_cases.resnet32_shapes(), 10)]  # parameter shapes, calls a round
    if not quick:
        sizes += [(bench_cases.resnet50_shapes(1000), 1), (bench_cases.resnet50_shapes(8142), 1)]
    found = bench_cases.copy_operations(1_000_000 if quick else 160_000_000)
    for shapes, calls in sizes:
        found += bench_cases.phase_operations(shapes, calls)
        found.append(bench_cases.step_operation(shapes, calls))
    return found


if __name__ == "__main__":
    sys.exit(bench.run_script(__file__, operations, bench_cases.step_summary))

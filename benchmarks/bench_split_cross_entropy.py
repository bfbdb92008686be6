"""The head and the tail loss with their gradients, against formulations in PyTorch.

python -m benchmarks.bench_split_cross_entropy [--rounds N] [--json FILE] [--quick]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from benchmarks.peers import COMPILED_ROW_WEIGHTS, compiled_row_weights
from imbsam_fast.bench.cases import limit_operations, loss_operations, loss_summary
from imbsam_fast.bench.measure import Group
from imbsam_fast.bench.optimizers import ROTATED_BYTES
from imbsam_fast.bench.script import run_script

SIZES = ((64, 100), (128, 1000), (512, 8142))  # rows, classes


def groups(quick: bool) -> Iterator[Group]:
    """One group a size, with the machine's limits."""
    limit_bytes, rotated = (1_000_000, 4096) if quick else (160_000_000, ROTATED_BYTES)
    more = {COMPILED_ROW_WEIGHTS: compiled_row_weights}
    for rows, classes in ((8, 32),) if quick else SIZES:
        torch._dynamo.reset()
        yield limit_operations(limit_bytes) + loss_operations(rows, classes, rotated, more)


if __name__ == "__main__":
    sys.exit(run_script(__file__, groups, loss_summary))

"""The optimizer's phases and whole steps of everybody, at the memory's speed and below it.

python -m benchmarks.bench_optimizer [--rounds N] [--json FILE] [--quick]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from benchmarks import peers
from imbsam_fast.bench.cases import limit_operations
from imbsam_fast.bench.measure import Group, Operation
from imbsam_fast.bench.optimizers import (
    IMBSAM,
    ROTATED_BYTES,
    StepData,
    ours,
    phase_operations,
    rotated_sets,
    step_summary,
)
from imbsam_fast.bench.script import run_script
from imbsam_fast.bench.shapes import (
    Shape,
    describe,
    resnet32_shapes,
    resnet50_shapes,
    vit_b16_shapes,
)
from imbsam_fast.ops.dispatch import backend_name

SHAPES: dict[str, list[Shape]] = {
    "CIFAR ResNet-32": resnet32_shapes(),
    "ResNet-50, 8142 classes": resnet50_shapes(),
    "ViT-B/16": vit_b16_shapes(),
    "matrices of 2000 x 2000": [(2000, 2000)] * 100,
    "vectors of 1000": [(1000,)] * 10_000,
}
QUICK_SHAPES: dict[str, list[Shape]] = {"quick": [(8, 3, 3, 3), (8,), (5, 8), (5,)]}


def groups(quick: bool) -> Iterator[Group]:
    """Two groups a shape, phases and steps, each with the machine's limits.

    At the largest shape the steps share lists of 8 GB in all and need up to three times that.
    """
    limit_bytes, rotated = (1_000_000, 1) if quick else (160_000_000, ROTATED_BYTES)
    for name, shapes in (QUICK_SHAPES if quick else SHAPES).items():
        size, sets = f"{name}: {describe(shapes)}", rotated_sets(shapes, rotated)
        yield limit_operations(limit_bytes) + phase_operations(
            shapes, size, sets, {ours(): backend_name("cpu")}
        )
        yield limit_operations(limit_bytes) + step_operations(shapes, size, sets)


def step_operations(shapes: list[Shape], size: str, sets: int) -> list[Operation]:
    """A step of ImbSAM, of SAM, of SGD and of ImbSAM around AdamW, on shared data."""
    torch._dynamo.reset()  # what was compiled for other shapes counts against torch's limit
    data = StepData(shapes, sets)
    return [
        data.step_operation(IMBSAM, peers.imbsam_contenders(len(shapes)), size),
        data.step_operation(peers.SAM, peers.sam_contenders(), size),
        data.step_operation(peers.SGD, peers.sgd_contenders(), size),
        data.step_operation(peers.ADAMW, peers.adamw_contenders(), size),
    ]


if __name__ == "__main__":
    sys.exit(run_script(__file__, groups, step_summary))

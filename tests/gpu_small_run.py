"""Every operation once on the GPU, small, for compute-sanitizer; `make gpu` runs it.

    compute-sanitizer --tool memcheck python -m tests.gpu_small_run

With PYTORCH_NO_CUDA_MEMORY_CACHING=1, memcheck sees where each tensor ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from imbsam_fast import dispatch

sys.path.insert(0, str(Path(__file__).parent))

from checks import TOLERANCE
from samples import DTYPES, SHAPES, SUMS, UPDATES, class_weights, lists, logits_and_targets

CASES = [case for case in SHAPES if case != "many"]


def close(name: str, actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, e in zip(actual, expected):
        tolerance = 10 * TOLERANCE[a.dtype]
        torch.testing.assert_close(
            a, e, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
        )


def optimizer_phases(dtype: torch.dtype, case: str) -> None:
    for name, run in {**UPDATES, **SUMS}.items():
        results = []
        for backend in ("native", "reference"):
            with dispatch.use_backend(backend):
                results.append(run(lists(case, dtype, "cuda")))
        close(f"{name}, {case}, {dtype}", *results)


def cross_entropy(dtype: torch.dtype, rows: int, classes: int, smoothing: float) -> None:
    operators = torch.ops.imbsam_fast
    logits, targets = logits_and_targets(rows, classes, dtype, "cuda")
    weights = class_weights(classes, dtype, "cuda")
    targets[::5] = -100
    results = []
    for backend in ("native", "reference"):
        with dispatch.use_backend(backend):
            head, tail, b, lse = operators.split_cross_entropy(
                logits, targets, *weights, smoothing, -100, None
            )
            gradient = operators.split_cross_entropy_backward(
                torch.ones_like(head), torch.ones_like(tail), logits, targets, lse, b,
                *weights, smoothing, -100,
            )  # fmt: skip
            results.append([head, tail, b, lse, gradient])
    close(f"split_cross_entropy, {rows} x {classes}, {dtype}", *results)


def main() -> None:
    reason = dispatch.available("cuda")["native"]
    if reason is not None:
        raise SystemExit(f"the CUDA kernels cannot run here: {reason}")
    for dtype in DTYPES:
        for case in CASES:
            optimizer_phases(dtype, case)
        for rows, classes in ((1, 1), (3, 37), (5, 1003), (2, 8142)):
            for smoothing in (0.0, 0.1):
                cross_entropy(dtype, rows, classes, smoothing)
    torch.cuda.synchronize()
    print("every operation ran on the GPU and agrees with the reference")


if __name__ == "__main__":
    main()

"""Every operation once on the GPU, small, for compute-sanitizer; `make gpu` runs it.

    compute-sanitizer --tool memcheck python -m tests.gpu_small_run
    python -m tests.gpu_small_run --dry-run      # the same with the CPU's kernels

With PYTORCH_NO_CUDA_MEMORY_CACHING=1, memcheck sees where each tensor ends.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from imbsam_fast.ops import dispatch

sys.path.insert(0, str(Path(__file__).parent))

from checks import TOLERANCE
from samples import (
    DTYPES,
    SHAPES,
    SUMS,
    UPDATES,
    class_weights,
    distributions,
    lists,
    logits_and_targets,
)

CASES = [case for case in SHAPES if case != "many"]


def close(name: str, actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, e in zip(actual, expected):
        tolerance = 10 * TOLERANCE[a.dtype]
        torch.testing.assert_close(
            a, e, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
        )


def optimizer_phases(dtype: torch.dtype, case: str, device: str) -> None:
    for name, run in {**UPDATES, **SUMS}.items():
        results = []
        for backend in ("native", "reference"):
            with dispatch.use_backend(backend):
                results.append(run(lists(case, dtype, device)))
        close(f"{name}, {case}, {dtype}", *results)


def cross_entropy(
    dtype: torch.dtype, rows: int, classes: int, smoothing: float, device: str
) -> None:
    operators = torch.ops.imbsam_fast
    logits, targets = logits_and_targets(rows, classes, dtype, device)
    weights = class_weights(classes, dtype, device)
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


def soft_cross_entropy(
    dtype: torch.dtype, rows: int, classes: int, smoothing: float, device: str
) -> None:
    operators = torch.ops.imbsam_fast
    logits, q = distributions(rows, classes, dtype, device)
    weights = class_weights(classes, dtype, device)
    results = []
    for backend in ("native", "reference"):
        with dispatch.use_backend(backend):
            head, tail, b, numbers = operators.split_soft_cross_entropy(
                logits, q, *weights, smoothing, None
            )
            gradient = operators.split_soft_cross_entropy_backward(
                torch.ones_like(head), torch.ones_like(tail), logits, q, numbers, b, *weights,
                smoothing,
            )  # fmt: skip
            results.append([head, tail, b, numbers, gradient])
    close(f"split_soft_cross_entropy, {rows} x {classes}, {dtype}", *results)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_small_run", allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true", help="with the CPU's kernels")
    parser.add_argument("--dtype", choices=[str(dtype)[6:] for dtype in DTYPES], help="only this")
    args = parser.parse_args()
    device = "cpu" if args.dry_run else "cuda"
    reason = dispatch.available(device)["native"]
    if reason is not None:
        raise SystemExit(f"the compiled kernels cannot run on {device}: {reason}")
    for dtype in [getattr(torch, args.dtype)] if args.dtype else DTYPES:
        for case in CASES:
            optimizer_phases(dtype, case, device)
        for rows, classes in ((1, 1), (3, 37), (5, 1003), (2, 8142)):
            for smoothing in (0.0, 0.1):
                cross_entropy(dtype, rows, classes, smoothing, device)
                soft_cross_entropy(dtype, rows, classes, smoothing, device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"every operation ran on {device} and agrees with the reference")


if __name__ == "__main__":
    main()

"""What a step costs the main thread, whatever its kernels cost: tiny tensors, processor time.

    python -m benchmarks.bench_host [--rounds N] [--json FILE] [--quick]

On the CPU kernels of 64 elements do next to nothing. The way of CUDA tensors takes part where
`python -m benchmarks.launch_nothing` has built kernels whose launches do nothing. The clock is the
processor time of the main thread. What frees a gradient counts: whoever takes it has to.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import torch

from benchmarks import launch_nothing, peers
from imbsam_fast.bench.measure import Group
from imbsam_fast.bench.optimizers import (
    AUTHORS,
    AUTHORS_FUSED,
    IMBSAM,
    Contender,
    StepData,
    authors,
    imbsam,
    ours,
)
from imbsam_fast.bench.report import Report
from imbsam_fast.bench.script import run_script
from imbsam_fast.ops.dispatch import backend_name
from imbsam_fast.optim import ImbSAM

COUNTS = (161, 1000)  # tensors; ResNet-50 has 161
QUICK_COUNTS = (5,)
ELEMENTS = 64
CUDA = "imbsam-fast, CUDA launches that do nothing"


def size_of(count: int) -> str:
    return f"{count} tensors"


def groups(quick: bool) -> Iterator[Group]:
    """Steps of ImbSAM, SAM and SGD, a group for each number of tensors."""
    torch.set_num_threads(1)  # kernels this small run on one in any case; so does everybody else's
    for count in QUICK_COUNTS if quick else COUNTS:
        data, size = StepData([(ELEMENTS,)] * count), size_of(count)
        yield [
            data.step_operation(IMBSAM, imbsam_contenders(), size),
            data.step_operation(peers.SAM, peers.sam_contenders(), size),
            data.step_operation(peers.SGD, sgd_contenders(), size),
        ]


def imbsam_contenders() -> dict[str, Contender]:
    found = {
        ours(): imbsam(backend_name("cpu")),
        AUTHORS: authors(),
        peers.AUTHORS_FOREACH: authors(foreach=True),
        AUTHORS_FUSED: authors(fused=True),
    }
    if launch_nothing.LIBRARY.exists():
        found[CUDA] = Contender(
            lambda base, _: launch_nothing.OnNothing(ImbSAM(base, peers.RHO)), IMBSAM.moves
        )
    else:
        print(f"left out: {CUDA}, not built (python -m benchmarks.launch_nothing)")
    return found


def sgd_contenders() -> dict[str, Contender]:
    def plain(base: torch.optim.Optimizer, _: object) -> peers.PlainSGD:
        return peers.PlainSGD(base)

    return {
        **peers.sgd_contenders(),
        "SGD(foreach=True)": Contender(plain, 11, foreach=True),
    }


def summary(report: Report) -> list[str]:
    lines = []
    for t in report.timings:
        calls = " + ".join(f"{1e3 * ms:.0f}" for ms in t.laps_ms.values())
        per_call = f" ({calls})" if len(t.laps_ms) > 1 else ""
        lines.append(f"{t.size}: {t.operation}: {t.contestant}: {1e3 * t.ms:.0f} us{per_call}")
    whole = [t for t in report.timings if (t.operation, t.contestant) == (IMBSAM.name, ours())]
    return [*lines, f"host: {', '.join(f'{t.size} {1e3 * t.ms:.0f} us' for t in whole)}"]


def main() -> int:
    """Measure, and say the figure of the optimizer once more, last of all."""
    lines: list[str] = []

    def noted(report: Report) -> list[str]:
        lines[:] = summary(report)
        return lines

    code = run_script(__file__, groups, noted, clock=time.thread_time)
    print(lines[-1])
    return code


if __name__ == "__main__":
    sys.exit(main())

"""Processes that form one gloo group, their batches, and the checks that they run together."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from networks import COUNTS, batches
from torch import Tensor

from imbsam_fast import ClassSplit

STEPS = 6
SPLIT = ClassSplit.from_counts(COUNTS)

# What happens on a rank: called with the rank and the number of ranks.
Check = Callable[[int, int], None]

# Imported once, by the process that the ranks are forked from: torch takes seconds. Not what is
# tested: that process does not know yet where it is installed.
PRELOADED = ["torch", "torch.distributed.fsdp", "torch.multiprocessing"]


def data() -> list[tuple[Tensor, Tensor]]:
    """Among them batches whose second half has no tail row, no head row, or nothing but those."""
    found = list(batches(STEPS))
    for i, (_, y) in enumerate(found[:3]):
        y[8:] = torch.arange(8) % 5 + (0, 5, 0)[i]
    found[2][1][:8] = torch.arange(8) % 5 + 5
    return found


def own(batch: tuple[Tensor, Tensor], rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """This rank's rows."""
    size = len(batch[1]) // ranks
    rows = slice(rank * size, (rank + 1) * size)
    return batch[0][rows], batch[1][rows]


def join(rank: int, ranks: int, folder: Path) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    timeout = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=timeout
    )


def start(function: Callable[..., None], ranks: int, *args: Any, join: bool = True) -> Any:
    """`function(rank, ranks, *args)` in a process for each rank."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    return mp.start_processes(
        function, (ranks, *args), nprocs=ranks, join=join, start_method="forkserver"
    )


def outcomes(checks: Mapping[str, Check], ranks: int, folder: Path) -> dict[str, str]:
    """Each check, run in turn by all ranks, with the traceback of the first that failed or ""."""
    start(_run, ranks, folder, list(checks.values()))
    found = [(folder / f"outcomes {rank}").read_text().split("\0") for rank in range(ranks)]
    return {name: next(filter(None, texts), "") for name, texts in zip(checks, zip(*found))}


def _run(rank: int, ranks: int, folder: Path, checks: Sequence[Check]) -> None:
    torch.set_num_threads(1)
    join(rank, ranks, folder)
    found = []
    for check in checks:
        try:
            check(rank, ranks)
            found.append("")
        except Exception:
            found.append(f"rank {rank}: {traceback.format_exc()}")
    (folder / f"outcomes {rank}").write_text("\0".join(found))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends while they do

"""`imbsam-fast train RECIPE --dry-run`: a few steps of each run, and what all of it will take."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import active_children
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ...training.cuda_graph import WARM_UP_STEPS
from ..data.files import FileImages
from ..data.images import LongTailImages
from ..data.workers import slot_bytes
from ..settings.config import PERTURBING, RunConfig
from .evaluation import BATCH_SIZE, in_eval_mode
from .ranks import ALONE, Ranks
from .tables import plan_table
from .training import ImageTraining


class Measured(NamedTuple):
    """What a few steps of one run tell. Times are seconds."""

    config: RunConfig
    step: float
    first_step: float
    read: float  # until the workers together have read a batch
    first_batch: float  # with the start of the workers
    test: float  # of all test images
    steps_per_epoch: int
    epochs: int
    memory: dict[str, str]

    @property
    def epoch(self) -> float:
        """Reading and training go side by side; the slower one decides."""
        return self.steps_per_epoch * max(self.step, self.read)

    def run(self, validated: bool) -> float:
        """Seconds of the whole run, with a test after each epoch where it is validated."""
        tests = 1 + self.epochs * validated
        return self.epochs * self.epoch + tests * self.test


def dry_run(
    configs: Sequence[RunConfig], data: LongTailImages, console: Console, ranks: Ranks = ALONE
) -> list[Measured]:
    """Measure the runs of the first seed, print what all will take, and write no file."""
    console.print(plan_table(configs, data), highlight=False)
    measured = []
    try:
        for config in configs:
            if config.seed == configs[0].seed:
                measured.append(_measured(config, data, ranks))
    finally:
        data.train.close()
    seeds = len({config.seed for config in configs})
    console.print(_table(measured, data.validation is not None, seeds))
    for name, value in measured[0].memory.items():
        console.print(f"{name}: {value}", highlight=False)
    return measured


def _measured(config: RunConfig, data: LongTailImages, ranks: Ranks) -> Measured:
    training = ImageTraining(config, data, ranks)
    if not isinstance(data.train, FileImages):
        _first(training)  # puts them on a GPU, once
    first_batch, batch = _timed(ranks.device, lambda: _first(training))
    images, targets = batch
    before, counted = _steps(config)
    steps = range(before + counted)
    times = [_timed(ranks.device, lambda: training.step(images, targets))[0] for _ in steps]
    _forward(training, images)  # not counted: the first one may compile
    tested = _timed(ranks.device, lambda: _forward(training, images))[0]
    rows = len(targets)
    return Measured(
        config,
        step=sum(times[before:]) / counted,
        first_step=times[0],
        read=_read_seconds(config, data, rows, first_batch),
        first_batch=first_batch,
        test=tested / rows * len(data.test) / ranks.world,
        steps_per_epoch=training.steps_per_epoch,
        epochs=training.epochs,
        memory=_memory(training, rows),
    )


def _steps(config: RunConfig) -> tuple[int, int]:
    """How many steps are not counted, since they allocate, compile or capture; how many are.

    Of those that are counted one perturbs.
    """
    every = config.perturb_every if config.optimizer in PERTURBING else 1
    return (WARM_UP_STEPS + 1) * every if config.cuda_graph else 1, every


def _first(training: ImageTraining) -> tuple[Tensor, Tensor]:
    batches = training.ranks.agreed(training.batches())
    return next(iter(batches))


def _forward(training: ImageTraining, images: Tensor) -> None:
    """A test sees an image and, but for digits, its mirror image."""
    with torch.no_grad(), in_eval_mode(training.model):
        for _ in range(1 + training.data.test.mirrored):
            training.model(images)


def _timed(device: torch.device, call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, found


def _read_seconds(config: RunConfig, data: LongTailImages, rows: int, first: float) -> float:
    """Of a batch, by the CPU time of an image, the workers and the cores that there are."""
    if not isinstance(data.train, FileImages):
        return first
    each = data.train.cpu_seconds / max(data.train.read_images, 1)
    return rows * each / max(min(config.workers, _cores()), 1)


def _cores() -> int:
    """That this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


# ---------------------------------------------------------------- memory


def _memory(training: ImageTraining, rows: int) -> dict[str, str]:
    config, device = training.config, training.ranks.device
    facts = {}
    resident = _resident_bytes()
    if resident is not None:
        workers = active_children()
        own = [private for p in workers if p.pid for private in [_private_bytes(p.pid)] if private]
        facts["memory"] = _gigabytes(resident) + (
            f" at most, and {_gigabytes(sum(own))} in {len(workers)} workers" if own else " at most"
        )
    if device.type == "cuda":
        facts["GPU memory"] = _gigabytes(torch.cuda.max_memory_allocated(device)) + " at most"
    if isinstance(training.data.train, FileImages) and config.workers:
        train = slot_bytes(config.workers, rows, config.image_size)
        test = slot_bytes(config.workers, BATCH_SIZE, config.image_size)
        facts["shared memory"] = (
            f"{_gigabytes(train)} for batches under way, {_gigabytes(test)} more while testing; "
            "none of it in /dev/shm"
        )
    descriptors = _descriptors()
    if descriptors is not None:
        facts["descriptors"] = f"{descriptors[0]} of {descriptors[1]:,}"
    facts["checkpoint"] = f"{_checkpoint_bytes(training) / 1e6:,.1f} MB, twice where one is best.pt"
    return facts


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB"


def _resident_bytes() -> int | None:
    """The most that this process had."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _private_bytes(pid: int) -> int:
    """Memory that the process `pid` shares with no other; 0 where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(x.split()[1]) for x in lines if x.startswith("Private_"))
    return 0


def _descriptors() -> tuple[int, int] | None:
    """Open in this process, and how many it may open."""
    with suppress(ImportError, OSError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return len(os.listdir("/proc/self/fd")), limit
    return None


class _Counter:
    """A file that only counts what is written to it."""

    def __init__(self) -> None:
        self.bytes = 0

    def write(self, content: bytes) -> int:
        self.bytes += len(content)
        return len(content)

    def flush(self) -> None:
        pass


def _checkpoint_bytes(training: ImageTraining) -> int:
    counter = _Counter()
    torch.save(training.state_dict(), counter)  # type: ignore[arg-type]
    return counter.bytes


# ---------------------------------------------------------------- what is shown


def _table(measured: Sequence[Measured], validated: bool, seeds: int) -> Table:
    table = Table(title="Expected, from a few steps of each", show_edge=False)
    table.add_column("")
    for title in ("step", "reading a batch", "epoch", "test", "run"):
        table.add_column(title, justify="right")
    for m in measured:
        times = (m.step, m.read, m.epoch, m.test, m.run(validated))
        table.add_row(m.config.label(), *map(duration, times))
    whole = seeds * sum(m.run(validated) for m in measured)
    runs = seeds * len(measured)
    if runs > 1:
        table.add_row(f"all {runs} runs", "", "", "", "", duration(whole))
    return table


def duration(seconds: float) -> str:
    """In a unit that leaves few digits."""
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"

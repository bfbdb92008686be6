"""Worker processes that read image files, and the memory through which their pixels come back.

A worker decodes, crops and resizes the images of a batch straight into one of a few buffers that
it shares with the training process: an anonymous mapping, made before the workers are forked. So
a batch costs no descriptor, needs nothing of /dev/shm, and is not copied between processes. Where
processes are not forked (all systems but Linux), batches travel as torch's shared tensors.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import mmap
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augmentation import Box, crop_numbers, random_box
from .decoding import opened, reduction_for
from .images import DataError, generator

FORKS = sys.platform == "linux"
PREFETCH = 2  # batches that a worker is ahead
PR_SET_PDEATHSIG = 1


class Request(NamedTuple):
    """One batch to be read."""

    paths: list[str]
    key: tuple[int, ...] | None  # of the random crops; None for the centre
    part: slice  # which of the batch's images these are,
    whole: int  # of so many
    slot: int  # the buffer to write to


class Unreadable(NamedTuple):
    """An image file that cannot be used."""

    path: str
    reason: str


class Reply(NamedTuple):
    """What came of a request."""

    kept: list[int]  # images that were read, as positions in `paths`
    unreadable: list[Unreadable]
    cpu_seconds: float
    pixels: Tensor | None  # uint8 (kept, size, size, 3); None where they are in the slot


class Workers:
    """Processes that read batches of at most `rows` images of `size` pixels, in order.

    Args:
        processes: how many; 0 reads in this process.
        persistent: keep them between calls of `read`.

    `read` raises DataError where a process cannot be started or dies.
    """

    def __init__(self, processes: int, rows: int, size: int, persistent: bool) -> None:
        self.rows = rows
        self.persistent = persistent
        self._owner = os.getpid()
        self._processes: list[BaseProcess] = []
        _all.add(self)
        self.slots = shared_slots(processes, rows, size) if processes and FORKS else None
        self._requests = _Requests(1 if self.slots is None else len(self.slots))
        options: dict[str, Any] = {}
        if processes:
            options = {
                "prefetch_factor": PREFETCH,
                "persistent_workers": persistent,
                "multiprocessing_context": "fork" if FORKS else None,
                "worker_init_fn": _Start(os.getpid()),
            }
        self._loader = DataLoader(
            _Reader(size, self.slots),
            batch_size=None,
            sampler=self._requests,  # type: ignore[arg-type]
            num_workers=processes,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            **options,
        )

    def read(self, requests: Iterable[Request]) -> Iterator[tuple[Tensor, Reply]]:
        """Pixels uint8 (kept, size, size, 3), to be used before the next are asked for."""
        self._requests.all = requests
        try:
            before = active_children()
            with _held_back_signals(), warnings.catch_warnings():
                # More workers than cores: the loader warned of it when it was made.
                warnings.filterwarnings("ignore", "This DataLoader will create")
                replies = iter(self._loader)
            self._processes += [p for p in active_children() if p not in before]
            for i, reply in enumerate(replies):
                if reply.pixels is not None:
                    yield reply.pixels, reply
                else:
                    assert self.slots is not None
                    yield self.slots[i % len(self.slots)][: len(reply.kept)], reply
        except OSError as error:
            raise DataError(
                f"processes that read images cannot be started ({error}); try fewer --workers, "
                "or 0 for none"
            ) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a process that reads images died ({str(error).splitlines()[0]}); where memory "
                "is short, fewer --workers or a smaller --batch-size need less"
            ) from error
        finally:
            if not self.persistent:
                self.close()

    def close(self) -> None:
        """End the processes, whatever they are doing; nothing can be read afterwards."""
        if os.getpid() != self._owner:  # in a process forked from it, which owns none of them
            return
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes.clear()


# multiprocessing would wait at exit for processes that it asks to end by SIGTERM.
_all: weakref.WeakSet[Workers] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for workers in list(_all):
        workers.close()


def slot_bytes(processes: int, rows: int, size: int) -> int:
    """Memory that the buffers of so many workers take."""
    return (PREFETCH * processes + 1) * rows * size * size * 3


def shared_slots(processes: int, rows: int, size: int) -> Tensor:
    """uint8 (slots, rows, size, size, 3), shared with processes that are forked from now on.

    One for every batch that is under way, and one for the batch that is being used.
    """
    needed = slot_bytes(processes, rows, size)
    free = free_memory()
    if free is not None and needed > free:
        raise DataError(
            f"batches on their way from {processes} workers take {needed / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB of memory are free; fewer --workers, a smaller --batch-size or "
            "--image-size need less"
        )
    memory = mmap.mmap(-1, max(needed, 1))
    shape = (PREFETCH * processes + 1, rows, size, size, 3)
    return torch.frombuffer(memory, dtype=torch.uint8, count=math.prod(shape)).view(shape)


def free_memory() -> int | None:
    """Bytes that processes here may still take, by the system and its control group; or None."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError, IndexError):
        pass
    return min(found, default=None)


class _Requests:
    """The requests of one pass, each with its slot, for a loader that outlives the pass."""

    def __init__(self, slots: int) -> None:
        self.all: Iterable[Request] = ()
        self.slots = slots

    def __iter__(self) -> Iterator[Request]:
        for i, request in enumerate(self.all):
            yield request._replace(slot=i % self.slots)


def _as_it_is(reply: Reply) -> Reply:
    return reply


@contextmanager
def _held_back_signals() -> Iterator[None]:
    """Processes started inside never see SIGINT and SIGTERM: those are for the training process.

    torch's handler of SIGCHLD, which raises in the middle of a step when a worker dies, is taken
    out again; the loader notices it too when the next batch is asked for.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main and handler is not None:
            signal.signal(signal.SIGCHLD, handler)


class _Start(NamedTuple):
    """What a worker does first."""

    parent: int

    def __call__(self, worker: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # where there is no mask to inherit
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self.parent:  # it died before
                os._exit(1)


class _Reader(Dataset):
    """Item: the reply to a request."""

    def __init__(self, size: int, slots: Tensor | None) -> None:
        self.size = size
        self.slots = slots

    def __getitem__(self, request: Request) -> Reply:
        started = time.process_time()
        size, found = self.size, self.slots
        out = (
            torch.empty(len(request.paths), size, size, 3, dtype=torch.uint8)
            if found is None
            else found[request.slot]
        )
        numbers: list[list[float]] | None = None
        if request.key is not None:
            drawn = crop_numbers(request.whole, generator(*request.key))
            numbers = drawn[request.part].tolist()
        kept: list[int] = []
        unreadable = []
        for i, path in enumerate(request.paths):
            try:
                read_image(path, out[len(kept)], None if numbers is None else numbers[i])
                kept.append(i)
            except FileNotFoundError:
                unreadable.append(Unreadable(path, "does not exist"))
            except (OSError, ValueError) as error:
                unreadable.append(Unreadable(path, f"cannot be read as an image ({error})"))
        pixels = out[: len(kept)] if found is None else None
        return Reply(kept, unreadable, time.process_time() - started, pixels)


def read_image(
    path: str, out: Tensor, numbers: list[float] | None, short_side: int | None = None
) -> None:
    """Write the image in `path` to `out`, uint8 (size, size, 3).

    With `numbers` a random part, as torchvision's RandomResizedCrop; otherwise the shorter side is
    resized to `short_side`, 8/7 of `size` where that is None (256 for 224), and the centre cropped.
    Raises OSError or ValueError.
    """
    size = out.shape[0]
    picture = opened(Path(path).read_bytes())
    height, width = picture.height, picture.width
    if numbers is None:
        pixels = picture.pixels()
        short, target = min(height, width), short_side or round(size * 8 / 7)
        shape = (target * height // short, target * width // short)
        top, left = (round((side - size) / 2) for side in shape)
        out.copy_(_part(_resized(pixels, *shape), Box(top, left, size, size)))
        return
    box = random_box(height, width, numbers)
    pixels = picture.pixels(reduction_for(box.height, box.width, size))
    out.copy_(_resized(_part(pixels, _scaled(box, pixels.shape[0] / height)), size, size))


def _scaled(box: Box, factor: float) -> Box:
    top, left, height, width = (round(value * factor) for value in box)
    return Box(top, left, max(height, 1), max(width, 1))


def _part(pixels: Tensor, box: Box) -> Tensor:
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]


def _resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 (H, W, 3) as uint8 (height, width, 3), as torchvision's Resize with antialias."""
    if pixels.shape[:2] == (height, width):
        return pixels
    batch = pixels.permute(2, 0, 1).unsqueeze(0)
    resized = F.interpolate(batch, size=(height, width), mode="bilinear", antialias=True)
    return resized.squeeze(0).permute(1, 2, 0)

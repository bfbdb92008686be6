"""Images that are read from files while training, by worker processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .augmentation import Changes, finished
from .images import CPU, WHOLE, DataError, Images, Statistics, generator
from .lists import ImageList
from .transfer import RawBatch, finished_on
from .workers import Reply, Request, Unreadable, Workers

# What the random numbers of a batch are for, part of the key of each generator.
CROPS, CHANGES = range(2)


class FileOptions(NamedTuple):
    """How image files become tensors."""

    size: int  # pixels of the square that the network sees
    statistics: Statistics
    color_jitter: float  # brightness, contrast and saturation in training; 0 for none
    skip_corrupt: bool  # leave corrupt images out, and count them, instead of stopping
    workers: int


class FileImages(Images):
    """Image files, decoded as RGB.

    In training RandomResizedCrop, a random flip and colour jitter; otherwise the shorter side
    resized to 8/7 of `size` (256 for 224) and the centre cropped.
    """

    def __init__(self, images: ImageList, options: FileOptions) -> None:
        self.images = images
        self.options = options
        self.targets = torch.tensor(images.labels, dtype=torch.int64)
        self.cpu_seconds = 0.0  # of reading so many images, in whatever process
        self.read_images = 0
        self._corrupt: set[str] = set()
        self._workers: Workers | None = None  # those of training, which are kept

    @property
    def skipped(self) -> int:  # type: ignore[override]
        """How many files could not be read so far."""
        return len(self._corrupt)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a batch's images, in pixels."""
        return self.options.size, self.options.size

    def subset(self, rows: Tensor) -> FileImages:
        """The images of `rows`, in their order."""
        paths, labels = ([values[i] for i in rows.tolist()] for values in self.images[:2])
        return FileImages(self.images._replace(paths=paths, labels=labels), self.options)

    def batches(
        self,
        batches: Sequence[Tensor],
        key: tuple[int, ...] | None = None,
        start: int = 0,
        part: slice = WHOLE,
        device: torch.device = CPU,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As Images.batches; files are decoded by worker processes."""
        yield from finished_on(device, self._read(batches, key, start, part))

    def close(self) -> None:
        """End the processes that were kept."""
        if self._workers is not None:
            self._workers.close()
        self._workers = None

    def _read(
        self, batches: Sequence[Tensor], key: tuple[int, ...] | None, start: int, part: slice
    ) -> Iterator[RawBatch]:
        left = range(start, len(batches))
        rows = max((len(batches[i][part]) for i in left), default=0)
        if not rows:
            return
        requests = (self._request(batches[i], key, i, part) for i in left)
        replies = self._processes(rows, len(left), kept=key is not None).read(requests)
        for i, (pixels, reply) in zip(left, replies):
            self._refuse_or_count(reply)
            self.cpu_seconds += reply.cpu_seconds
            self.read_images += len(reply.kept)
            kept = torch.tensor(reply.kept)
            finish = self._finish(len(batches[i]), key, i, part, kept)
            yield RawBatch(pixels, finish, self.targets[batches[i][part][kept]])

    def _processes(self, rows: int, batches: int, kept: bool) -> Workers:
        """Workers for batches of so many rows; those of training are kept for its next epoch."""
        size, workers = self.options.size, self.options.workers
        if not kept:
            return Workers(min(workers, batches), rows, size, persistent=False)
        if self._workers is None or self._workers.rows < rows:
            self.close()
            self._workers = Workers(workers, rows, size, persistent=True)
        return self._workers

    def _request(self, rows: Tensor, key: tuple[int, ...] | None, i: int, part: slice) -> Request:
        paths = [self.images.paths[row] for row in rows[part].tolist()]
        return Request(paths, None if key is None else (*key, i, CROPS), part, len(rows), slot=0)

    def _finish(
        self, rows: int, key: tuple[int, ...] | None, i: int, part: slice, kept: Tensor
    ) -> Callable[[Tensor], Tensor]:
        statistics, jitter = self.options.statistics, self.options.color_jitter
        changes = None
        if key is not None:
            drawn = Changes.draw(rows, jitter, generator(*key, i, CHANGES))
            changes = drawn.of(part).of(kept)
        return partial(finished, statistics=statistics, jitter=jitter, changes=changes)

    def _refuse_or_count(self, reply: Reply) -> None:
        if reply.unreadable and not self.options.skip_corrupt:
            raise _refusal(reply.unreadable[0])
        for path, reason in reply.unreadable:
            if path not in self._corrupt:
                warnings.warn(f"'{path}' {reason}; left out", stacklevel=2)
            self._corrupt.add(path)
        if not reply.kept:
            raise DataError(
                f"no image of a batch can be read, among them '{reply.unreadable[0].path}'"
            )


def _refusal(image: Unreadable) -> DataError:
    path, reason = image
    if reason == "does not exist":
        advice = "--image-root says what the paths in the lists are relative to"
    else:
        advice = "copy it again"
    return DataError(f"'{path}' {reason}; {advice}, or leave such images out with --skip-corrupt")

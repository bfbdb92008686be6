"""Images that are read from files while training, by worker processes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .images import WHOLE, DataError, Images, Statistics, decode, generator
from .lists import ImageList


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
        self._corrupt: set[str] = set()

    @property
    def skipped(self) -> int:  # type: ignore[override]
        """How many files could not be read so far."""
        return len(self._corrupt)

    def subset(self, rows: Tensor) -> FileImages:
        """The images of `rows`, in their order."""
        paths, labels, names = self.images
        kept = [paths[i] for i in rows], [labels[i] for i in rows]
        return FileImages(ImageList(*kept, names), self.options)

    def batches(
        self,
        batches: Sequence[Tensor],
        key: tuple[int, ...] | None = None,
        start: int = 0,
        part: slice = WHOLE,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As Images.batches; files are decoded by worker processes."""
        # The row's position in the epoch goes with it: its random numbers depend on it.
        requests = [
            [(int(row), None if key is None else (*key, i, j)) for j, row in enumerate(rows)][part]
            for i, rows in enumerate(batches)
        ][start:]
        loader = DataLoader(
            _Decoded(self.images.paths, self.options),
            batch_sampler=requests,
            num_workers=min(self.options.workers, len(requests)),
            collate_fn=list,
            pin_memory=False,
        )
        for request, samples in zip(requests, loader):
            decoded = [s for s in samples if isinstance(s, Tensor)]
            self._refuse_or_count([s for s in samples if not isinstance(s, Tensor)])
            if not decoded:
                raise DataError(f"no image of a batch can be read, among them '{samples[0].path}'")
            rows = [row for (row, _), s in zip(request, samples) if isinstance(s, Tensor)]
            yield torch.stack(decoded), self.targets[rows]

    def _refuse_or_count(self, corrupt: list[_Corrupt]) -> None:
        if corrupt and not self.options.skip_corrupt:
            raise DataError(
                f"'{corrupt[0].path}' {corrupt[0].reason}; copy it again, or leave such images out "
                "with --skip-corrupt"
            )
        for path, reason in corrupt:
            if path not in self._corrupt:
                warnings.warn(f"'{path}' {reason}; left out", stacklevel=2)
            self._corrupt.add(path)


class _Corrupt(NamedTuple):
    path: str
    reason: str


class _Decoded(Dataset):
    """Item (row, key): the row's image float32 (3, size, size), or why it cannot be read."""

    def __init__(self, paths: list[str], options: FileOptions) -> None:
        self.paths = paths
        self.test = _transform(options, augmented=False)
        self.train = _transform(options, augmented=True)

    def __getitem__(self, item: tuple[int, tuple[int, ...] | None]) -> Tensor | _Corrupt:
        row, key = item
        path = self.paths[row]
        try:
            pixels = decode(path)
        except (OSError, ValueError) as error:
            return _Corrupt(path, f"cannot be read as an image ({error})")
        if key is None:
            return self.test(pixels)
        with torch.random.fork_rng(devices=[]):  # the one that transforms draw from
            torch.set_rng_state(generator(*key).get_state())
            return self.train(pixels)


def _transform(options: FileOptions, augmented: bool) -> Any:
    from torchvision.transforms import v2

    size, jitter = options.size, options.color_jitter
    if augmented:
        steps = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        if jitter:
            steps.append(v2.ColorJitter(jitter, jitter, jitter, 0))
    else:
        steps = [v2.Resize(round(size * 8 / 7), antialias=True), v2.CenterCrop(size)]
    scaled = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([*steps, scaled, v2.Normalize(*map(list, options.statistics))])

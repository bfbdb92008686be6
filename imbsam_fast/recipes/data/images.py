"""Images for training and testing: what a data set gives, and small ones held in memory."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of the channels

CIFAR_STATISTICS: dict[int, Statistics] = {  # by the number of classes
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


WHOLE = slice(None)
CPU = torch.device("cpu")
GPU_SHARE = 1 / 8  # of a GPU's free memory that a set of images may take


class DataError(Exception):
    """Files of a data set are missing or damaged; the text names them and says what to do."""


class Images(ABC):
    """Labelled images, from which batches of rows are taken."""

    targets: Tensor  # int64 (n,)
    skipped = 0  # corrupt images that were left out
    mirrored = True  # whether the mirror image of an image is one of its class

    def __len__(self) -> int:
        return len(self.targets)

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""

    @abstractmethod
    def batches(
        self,
        batches: Sequence[Tensor],
        key: tuple[int, ...] | None = None,
        start: int = 0,
        part: slice = WHOLE,
        device: torch.device = CPU,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images float32 (b, 3, H, W), normalised, on `device`, an entry at a time.

        With them their targets, int64 (b,), on the CPU.

        Args:
            batches: rows, int64 (b,) each.
            key: augment, with random numbers that depend on the key and the position in
                `batches` alone; None for no augmentation.
            start: the first entry to give; those before it are left out.
            part: which rows of each entry to give, the same images as if all were given.
            device: where images are normalised; bytes travel there.

        Raises DataError where an image cannot be read.
        """

    def close(self) -> None:  # noqa: B027  (most have nothing to close)
        """End the processes that read images; later batches start them anew."""

    @abstractmethod
    def subset(self, rows: Tensor) -> Images:
        """The images of `rows`, int64 (m,)."""


@dataclass(frozen=True)
class LongTailImages:
    """A long-tailed training set, its test set, and perhaps a validation set."""

    train: Images
    test: Images
    validation: Images | None
    counts: list[int]  # training images per class
    class_names: list[str] | None


def generator(*key: int) -> torch.Generator:
    """Random numbers that depend on `key` alone: nothing to save, nothing to restore."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def class_counts(targets: Tensor, num_classes: int) -> list[int]:
    """How many of `targets`, int64 (n,), each class has."""
    return torch.bincount(targets, minlength=num_classes).tolist()


def check_every_class(labels: Iterable[int], num_classes: int, where: str) -> None:
    """Raise DataError, naming `where`, unless each of the classes 0 .. num_classes - 1 is there."""
    present = set(labels)
    missing = next((k for k in range(num_classes) if k not in present), None)
    if missing is not None:
        raise DataError(
            f"{where} has no image of class {missing}, expected at least one of each of the "
            f"{num_classes} classes, numbered from 0"
        )


def rows_of_each_class(targets: Tensor, starts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Rows starts[k] .. starts[k] + counts[k] - 1 of every class k's, in their order, int64.

    Raises DataError where a class has too few.
    """
    kept = []
    for k, (start, count) in enumerate(zip(starts, counts, strict=True)):
        rows = (targets == k).nonzero().squeeze(1)
        if len(rows) < start + count:
            parts = f": {start} for training and {count} for validation" if start else ""
            raise DataError(
                f"class {k} has {len(rows)} images, expected at least {start + count}{parts}"
            )
        kept.append(rows[start : start + count])
    return torch.cat(kept).sort().values


def long_tailed(
    source: Images, test: Images, counts: Sequence[int], validation: int, names: list[str] | None
) -> LongTailImages:
    """The first counts[k] images of class k for training, the next `validation` of each beside."""
    train = rows_of_each_class(source.targets, [0] * len(counts), counts)
    held_out = None
    if validation:
        held_out = source.subset(
            rows_of_each_class(source.targets, counts, [validation] * len(counts))
        )
    return LongTailImages(source.subset(train), test, held_out, list(counts), names)


class MemoryImages(Images):
    """Small images held as bytes, cropped and flipped as a batch.

    Augmentation is torchvision's RandomCrop(size, padding) and RandomHorizontalFlip.

    Args:
        pixels: uint8 (n, 3, H, W).
        targets: int64 (n,).
        statistics: mean and standard deviation of the channels, of pixels from 0 to 1.
        padding: zeros around an image that a crop may reach into.
        mirrored: whether to flip.
    """

    def __init__(
        self,
        pixels: Tensor,
        targets: Tensor,
        statistics: Statistics,
        padding: int = 4,
        mirrored: bool = True,
    ) -> None:
        self.pixels = pixels
        self.targets = targets
        self.statistics = statistics
        self.padding = padding
        self.mirrored = mirrored
        mean, std = (torch.tensor(values) for values in statistics)
        padded = torch.nn.functional.pad(pixels, (padding,) * 4)
        # Channels last, so that one gather of rows, y and x crops, flips and stays dense.
        padded = padded.permute(0, 2, 3, 1).contiguous()
        self._tables = _Tables(padded, 1 / (255 * std), -mean / std)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        height, width = self.pixels.shape[2:]
        return height, width

    def subset(self, rows: Tensor) -> MemoryImages:
        """The images of `rows`, in their order."""
        return MemoryImages(
            self.pixels[rows], self.targets[rows], self.statistics, self.padding, self.mirrored
        )

    def batches(
        self,
        batches: Sequence[Tensor],
        key: tuple[int, ...] | None = None,
        start: int = 0,
        part: slice = WHOLE,
        device: torch.device = CPU,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As Images.batches; images that take no more than GPU_SHARE of a GPU stay there."""
        self._tables = self._tables.near(device)
        for i, rows in enumerate(batches[start:], start):
            random = None if key is None else generator(*key, i)
            pixels = self._tables.pixels(self._crops(rows, random)[:, part], self.size)
            yield self._tables.normalised(pixels.to(device)), self.targets[rows[part]]

    def _crops(self, rows: Tensor, random: torch.Generator | None) -> Tensor:
        """int64 (4, b): the row, the first y and x, whether to flip."""
        if random is None:
            start = torch.full_like(rows, self.padding)
            return torch.stack([rows, start, start, torch.zeros_like(rows)])
        top, left = torch.randint(2 * self.padding + 1, (2, len(rows), 1), generator=random)
        flip = torch.randint(2, (len(rows), 1), generator=random) * self.mirrored
        return torch.cat([rows[:, None], top, left, flip], dim=1).T


def place_for(images: Tensor, device: torch.device) -> torch.device:
    """`device`, or the CPU where `images` would take more than GPU_SHARE of what a GPU has free."""
    if device.type != "cuda":
        return device
    index = torch.cuda.current_device() if device.index is None else device.index
    free, _ = torch.cuda.mem_get_info(index)
    return device if images.nbytes <= GPU_SHARE * free else CPU


class _Tables(NamedTuple):
    """What batches are made of, on one device."""

    padded: Tensor  # uint8 (n, H + 2 padding, W + 2 padding, 3)
    scale: Tensor  # float32 (3,)
    shift: Tensor  # float32 (3,)

    def near(self, device: torch.device) -> _Tables:
        """On `device`, or on the CPU where they would take much of a GPU's memory."""
        if not (self.padded.is_cuda and device.type == "cuda"):  # there already
            device = place_for(self.padded, device)
        return _Tables(*(table.to(device) for table in self))

    def pixels(self, crops: Tensor, size: tuple[int, int]) -> Tensor:
        """uint8 (b, H, W, 3); `crops` as MemoryImages._crops makes them."""
        # So few bytes that the host need not wait for them.
        rows, top, left, flip = crops.to(self.padded.device, non_blocking=True).unsqueeze(2)
        ys, xs = (torch.arange(length, device=rows.device) for length in size)
        xs = torch.where(flip.bool(), xs.flip(0), xs)
        return self.padded[rows[:, :, None], (top + ys)[:, :, None], (left + xs)[:, None, :]]

    def normalised(self, pixels: Tensor) -> Tensor:
        """float32 (b, 3, H, W), where `pixels` are."""
        scale, shift = self.scale.to(pixels.device), self.shift.to(pixels.device)
        return (pixels * scale + shift).permute(0, 3, 1, 2)

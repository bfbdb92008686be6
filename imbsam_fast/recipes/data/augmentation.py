"""Random crops, flips and colours of a batch: torchvision's, for each image alone.

RandomResizedCrop is drawn where files are read, since it decides how much of one is read; the
rest happens to a whole batch, on the device that trains.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .images import Statistics

CROP_AREA = (0.08, 1.0)  # of the image
CROP_RATIO = (3 / 4, 4 / 3)  # width over height
CROP_TRIES = 10
CROP_NUMBERS = 2 * CROP_TRIES + 2
GREY = (0.2989, 0.587, 0.114)


class Box(NamedTuple):
    """Part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def crop_numbers(rows: int, random: torch.Generator) -> Tensor:
    """What `random_box` needs for each of `rows` images: float64 (rows, CROP_NUMBERS), 0 to 1."""
    return torch.rand(rows, CROP_NUMBERS, generator=random, dtype=torch.float64)


def random_box(height: int, width: int, numbers: list[float]) -> Box:
    """The box of torchvision's RandomResizedCrop, from `numbers` between 0 and 1."""
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    for i in range(CROP_TRIES):
        area = height * width * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * numbers[2 * i])
        ratio = math.exp(low + (high - low) * numbers[2 * i + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = numbers[-2] * (height - h + 1), numbers[-1] * (width - w + 1)
            return Box(int(top), int(left), h, w)
    return _central_box(height, width)


def _central_box(height: int, width: int) -> Box:
    """As large as CROP_RATIO allows."""
    w = min(width, round(height * CROP_RATIO[1]))
    h = min(height, round(width / CROP_RATIO[0]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


class Changes(NamedTuple):
    """What happens to each image of a batch."""

    flipped: Tensor  # bool (b,)
    factors: Tensor  # float32 (b, 3): of brightness, contrast and saturation
    order: Tensor  # int64 (b, 3): which of the three comes first, second, third

    @classmethod
    def draw(cls, rows: int, jitter: float, random: torch.Generator) -> Changes:
        """What is done to each of `rows` images, drawn at random."""
        flipped = torch.rand(rows, generator=random) < 0.5
        factors = max(1 - jitter, 0) + (1 + jitter - max(1 - jitter, 0)) * torch.rand(
            rows, 3, generator=random
        )
        return cls(flipped, factors, torch.rand(rows, 3, generator=random).argsort(dim=1))

    def of(self, rows: slice | Tensor) -> Changes:
        """Those of some of the images."""
        return Changes(*(values[rows] for values in self))


def finished(
    pixels: Tensor, statistics: Statistics, jitter: float, changes: Changes | None
) -> Tensor:
    """Images float32 (b, 3, H, W), channels last and normalised, where `pixels` is.

    Args:
        pixels: uint8 (b, H, W, 3).
        statistics: mean and standard deviation of the channels, of pixels from 0 to 1.
        jitter: strength of ColorJitter's brightness, contrast and saturation; 0 for none.
        changes: None for no augmentation.
    """

    def there(values: Tensor) -> Tensor:
        return values.to(pixels.device, non_blocking=True)  # so few that the host need not wait

    if changes is not None:
        flipped = there(changes.flipped)[:, None, None, None]
        pixels = torch.where(flipped, pixels.flip(2), pixels)
    mean, std = (there(torch.tensor(values)) for values in statistics)
    if changes is None or not jitter:
        return (pixels * (1 / (255 * std)) - mean / std).permute(0, 3, 1, 2)
    images = _jittered(pixels / 255, there(changes.factors), there(changes.order))
    return ((images - mean) / std).permute(0, 3, 1, 2)


def _jittered(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """`images`, float32 (b, H, W, 3) from 0 to 1, blended with black, their mean grey, their grey.

    Each of the three is a blend f x + (1 - f) y, so that images in different orders go together.
    """
    weights = torch.tensor(GREY).to(images.device, non_blocking=True)
    for step in order.unbind(dim=1):
        grey = (images * weights).sum(dim=3, keepdim=True)
        which = step[:, None, None, None]
        other = torch.where(which == 1, grey.mean(dim=(1, 2), keepdim=True), grey)
        other = torch.where(which == 0, 0.0, other)
        factor = factors.gather(1, step[:, None])[:, :, None, None]
        images = torch.lerp(other, images, factor).clamp(0, 1)
    return images

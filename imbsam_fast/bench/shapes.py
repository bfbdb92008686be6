"""The shapes of the parameters that optimizers are measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence

Shape = tuple[int, ...]


def resnet50_shapes(num_classes: int = 8142) -> list[Shape]:
    """The parameters of ResNet-50 in their order: 161 tensors, 40.2M elements for 8,142 classes."""
    shapes = _conv_and_norm(64, 3, 7)
    width_in = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += _conv_and_norm(width, width_in, 1)
            shapes += _conv_and_norm(width, width, 3)
            shapes += _conv_and_norm(4 * width, width, 1)
            if block == 0:
                shapes += _conv_and_norm(4 * width, width_in, 1)
            width_in = 4 * width
    return [*shapes, (num_classes, width_in), (num_classes,)]


def resnet32_shapes(num_classes: int = 100) -> list[Shape]:
    """The parameters of the CIFAR ResNet-32: 95 tensors, 0.5M elements."""
    shapes = _conv_and_norm(16, 3, 3)
    width_in = 16
    for width in (16, 32, 64):
        for _ in range(5):
            shapes += _conv_and_norm(width, width_in, 3) + _conv_and_norm(width, width, 3)
            width_in = width
    return [*shapes, (num_classes, width_in), (num_classes,)]


def vit_b16_shapes(num_classes: int = 1000) -> list[Shape]:
    """The parameters of ViT-B/16 for 224 x 224 images in their order: 152 tensors, 86.6M."""
    width, patch, tokens = 768, 16, (224 // 16) ** 2 + 1
    shapes: list[Shape] = [(1, 1, width), (width, 3, patch, patch), (width,), (1, tokens, width)]
    for _ in range(12):
        shapes += [(width,), (width,)]
        shapes += _linear(3 * width, width) + _linear(width, width)
        shapes += [(width,), (width,)]
        shapes += _linear(4 * width, width) + _linear(width, 4 * width)
    return [*shapes, (width,), (width,), *_linear(num_classes, width)]


def _conv_and_norm(out: int, width_in: int, kernel: int) -> list[Shape]:
    return [(out, width_in, kernel, kernel), (out,), (out,)]


def _linear(out: int, width_in: int) -> list[Shape]:
    return [(out, width_in), (out,)]


def elements(shapes: Sequence[Shape]) -> int:
    """Elements of all shapes together."""
    return sum(math.prod(shape) for shape in shapes)


def describe(shapes: Sequence[Shape]) -> str:
    """Such as "161 tensors, 40.2M"."""
    count = elements(shapes)
    return f"{len(shapes):,} tensor{'s'[: len(shapes) > 1]}, " + (
        f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,} elements"
    )

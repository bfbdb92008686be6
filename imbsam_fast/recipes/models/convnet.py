"""The network of the digits recipe, and the layers that all networks here share."""

from __future__ import annotations

from torch import Tensor, nn

from .names import NORMS


class ConvNet(nn.Module):
    """Three 3x3 convolutions with a normalisation each, global average, a linear classifier.

    Takes images (N, channels, H, W) and returns logits (N, num_classes). 24,058 parameters for
    one channel and ten classes.

    Args:
        norm: "batch" for BatchNorm (rows of a batch influence each other: joint plan), "group"
            for GroupNorm (they do not: split plan).
        num_classes: K, the length of a row of logits.
        channels: of the images.

    Raises ValueError for any other `norm`.
    """

    def __init__(self, norm: str = "batch", num_classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _block(channels, 16, norm, stride=1),
            _block(16, 32, norm, stride=2),
            _block(32, 64, norm, stride=1),
        )
        self.classifier = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, K)."""
        return self.classifier(self.features(images).mean(dim=(2, 3)))


def make_norm(norm: str, channels: int) -> nn.Module:
    """BatchNorm for "batch", GroupNorm of eight groups for "group"; ValueError for another."""
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}, expected one of {', '.join(NORMS)}")
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(8, channels)


def _block(channels_in: int, channels: int, norm: str, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
        make_norm(norm, channels),
        nn.ReLU(),
    )

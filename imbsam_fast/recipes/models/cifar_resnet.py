"""Residual networks for images of 32x32 (He et al. 2016, section 4.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .convnet import make_norm
from .names import DEPTHS


class CifarResNet(nn.Module):
    """ResNet-(6n+2): a 3x3 stem and three stages of n blocks with 16, 32 and 64 channels.

    Takes images (N, 3, H, W) and returns logits (N, num_classes) from the linear layer `fc`.
    Shortcuts between stages subsample and pad with zeros (option A). Weights are drawn as He et
    al. 2015 did, for ReLU.

    Args:
        depth: 6n + 2, one of DEPTHS.
        num_classes: K, the length of a row of logits.
        norm: "batch" or "group", as for ConvNet.
    """

    def __init__(self, depth: int, num_classes: int, norm: str = "batch") -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"depth is {depth!r}, expected one of {', '.join(map(str, DEPTHS))}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm1 = make_norm(norm, 16)
        self.layer1 = _stage(16, 16, blocks, norm)
        self.layer2 = _stage(16, 32, blocks, norm)
        self.layer3 = _stage(32, 64, blocks, norm)
        self.fc = nn.Linear(64, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, K)."""
        x = F.relu(self.norm1(self.conv1(images)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))


def _stage(channels_in: int, channels: int, blocks: int, norm: str) -> nn.Sequential:
    first = _Block(channels_in, channels, norm)
    return nn.Sequential(first, *(_Block(channels, channels, norm) for _ in range(blocks - 1)))


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, norm: str) -> None:
        super().__init__()
        self.new_channels = channels - channels_in
        stride = 2 if self.new_channels else 1
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = make_norm(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = make_norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        if self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(y + x, inplace=True)

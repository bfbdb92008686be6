"""Small networks for (N, 3, 32, 32) images whose normalisation decides which plans are exact."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3x3 convolutions with a normalisation each, and the input added."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def conv_net(norm: Callable[[int], nn.Module], classes: int) -> nn.Module:
    """A ResNet with widths 16, 32 and 64."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16), nn.ReLU(), Residual(16, norm)),
        *(nn.Conv2d(16, 32, 3, 2, padding=1, bias=False), norm(32), nn.ReLU(), Residual(32, norm)),
        *(nn.Conv2d(32, 64, 3, 2, padding=1, bias=False), norm(64), nn.ReLU(), Residual(64, norm)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)),
    )


def batch_norm_resnet(classes: int) -> nn.Module:
    return conv_net(nn.BatchNorm2d, classes)


def group_norm_resnet(classes: int) -> nn.Module:
    return conv_net(lambda width: nn.GroupNorm(8, width), classes)


def mlp(classes: int, width: int, depth: int) -> nn.Module:
    """Nearly all of whose memory is weights."""
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    first = nn.Linear(3 * 32 * 32, width)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), *hidden, nn.Linear(width, classes))


class LayerNormViT(nn.Module):
    """A small ViT: 64 patches of 4x4 pixels."""

    def __init__(self, classes: int, width: int = 96, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(64, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.classifier(self.layers(tokens).mean(dim=1))

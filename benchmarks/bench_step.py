"""Whole training steps, counted in steps of SGD, on batches with 44 % tail rows.

    python -m benchmarks.bench_step [--rounds N] [--json FILE] [--quick]

With f the share of tail rows, DESIGN.md section 6 expects 2 for SAM, 2.67 for the authors' loop
and the joint plan, and 1 + f for the split plan, which is left out under BatchNorm.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep, bench, peers
from imbsam_fast.bench_cases import long_tail_batch
from imbsam_fast.bench_measure import Contestant, Operation, Stopwatch

TAIL_FRACTION = 0.44
CLASSES = 100
STEP = "training step"
LR, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 5e-4


# ---------------------------------------------------------------- networks


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


def conv_net(norm: Callable[[int], nn.Module]) -> nn.Module:
    """A ResNet for (N, 3, 32, 32) images with widths 16, 32 and 64."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16), nn.ReLU(), Residual(16, norm)),
        *(nn.Conv2d(16, 32, 3, 2, padding=1, bias=False), norm(32), nn.ReLU(), Residual(32, norm)),
        *(nn.Conv2d(32, 64, 3, 2, padding=1, bias=False), norm(64), nn.ReLU(), Residual(64, norm)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)),
    )


class Transformer(nn.Module):
    """A small ViT for (N, 3, 32, 32) images: 64 patches of 4x4 pixels, LayerNorm."""

    def __init__(self, width: int = 96, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(64, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.classifier(self.layers(tokens).mean(dim=1))


# ---------------------------------------------------------------- contestants


def operation(name: str, model: nn.Module, rows: int, split_plan: bool) -> Operation:
    """The steps on one network, each contestant with its own copy of it and one batch."""
    images = torch.randn(rows, 3, 32, 32)
    split, targets = long_tail_batch(rows, CLASSES, TAIL_FRACTION)

    def train_step(split: ClassSplit, plan: str) -> Callable:
        copy = deepcopy(model)
        return TrainStep(copy, SplitCrossEntropy(split), ImbSAM(sgd(copy)), plan)

    plain, authors = deepcopy(model), deepcopy(model)
    steps: dict[str, Callable] = {
        "SGD": peers.plain_training_step(plain, sgd(plain)),
        "SAM, TrainStep joint": train_step(ClassSplit.all_tail(), "joint"),
        "authors' loop": peers.authors_training_step(
            authors, peers.BooleanMasking(split), peers.AuthorsSequence(sgd(authors))
        ),
        "ImbSAM, TrainStep joint": train_step(split, "joint"),
    }
    if split_plan:
        steps["ImbSAM, TrainStep split"] = train_step(split, "split")

    def taking(step: Callable) -> Contestant:
        def contestant(watch: Stopwatch) -> None:
            with watch.lap("step"):
                step(images, targets)

        return contestant

    contestants = {name: taking(step) for name, step in steps.items()}
    return Operation(STEP, f"{name}, {rows} rows", contestants)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def operations(quick: bool) -> list[Operation]:
    rows = 16 if quick else 128
    return [
        operation("GroupNorm ResNet", conv_net(lambda width: nn.GroupNorm(8, width)), rows, True),
        operation("LayerNorm ViT", Transformer(), rows, True),
        operation("BatchNorm ResNet", conv_net(nn.BatchNorm2d), rows, False),
    ]


def summary(report: bench.Report) -> list[str]:
    sizes = dict.fromkeys(t.size for t in report.timings)
    return [
        f"{size}: in SGD steps, "
        + ", ".join(
            f"{t.contestant} {t.ratio:.2f}"
            for t in report.timings
            if t.size == size and t.contestant != "SGD"
        )
        for size in sizes
    ]


if __name__ == "__main__":
    sys.exit(bench.run_script(__file__, operations, summary))

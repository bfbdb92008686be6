"""One epoch of DeepSAD and DevNet: SGD, SAM, the authors' loop and ours.

    python -m benchmarks.bench_anomaly [--rounds N] [--json FILE] [--quick]

Random features with the shape of ADBench's CIFAR10_0 after the split: 3,684 rows of 512, 184
anomalies. With 25 % of them labelled a fifth of DeepSAD's batches have no labelled one, with 1 %
nearly all; the authors' loop runs all its passes on these too. DevNet's batches are half
anomalies at any ratio. Times are those of an epoch on one thread, which is what networks so small
can use.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from imbsam_fast import ClassSplit, ImbSAM, SplitLoss, TrainStep, split_loss
from imbsam_fast.bench import peers
from imbsam_fast.bench.measure import Contestant, Group, Operation, Stopwatch
from imbsam_fast.bench.report import Report
from imbsam_fast.bench.script import run_script
from imbsam_fast.recipes.anomaly.losses import PerSampleLoss, deepsad_loss, deviation_loss
from imbsam_fast.recipes.anomaly.networks import CODE, Encoder, Scorer
from imbsam_fast.recipes.anomaly.training import (
    anomalies_are_tail,
    balanced_batches,
    shuffled_batches,
)

EPOCH = "epoch"
SGD = "SGD"
SAM = "SAM"
AUTHORS = "authors' loop"
IMBSAM = "ImbSAM"

ROWS, FEATURES, ANOMALIES = 3_684, 512, 184
BATCH_SIZE = 128
DEVNET_BATCHES = 20
RATIOS = (0.25, 0.01)
LR, MOMENTUM = 1e-3, 0.9

Step = Callable[[Tensor, Tensor], object]
Batches = list[tuple[Tensor, Tensor]]


class MaskedLoss(nn.Module):
    """The authors' way with any loss: head and tail rows picked by a mask."""

    def __init__(self, loss: PerSampleLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor, labels: Tensor) -> SplitLoss:
        losses, tail = self.loss(outputs, labels), labels == 1
        return SplitLoss(losses[~tail].sum() / len(labels), losses[tail].sum() / len(labels))


def steps(
    network: nn.Module, loss: PerSampleLoss, make_base: Callable[..., torch.optim.Optimizer]
) -> dict[str, Step]:
    """A step of each contestant, with a network and an optimizer of its own."""

    def ours(split: ClassSplit) -> Step:
        own = deepcopy(network)
        return TrainStep(own, split_loss(loss, split), ImbSAM(make_base(own)))

    def authors() -> Step:
        own = deepcopy(network)
        sequence = peers.AuthorsSequence(make_base(own))
        return peers.authors_training_step(own, MaskedLoss(loss), sequence)

    def sgd() -> Step:
        own = deepcopy(network)
        base = make_base(own)

        def step(features: Tensor, labels: Tensor) -> None:
            loss(own(features), labels).mean().backward()
            base.step()
            base.zero_grad()

        return step

    return {
        SGD: sgd(),
        SAM: ours(ClassSplit.all_tail()),
        AUTHORS: authors(),
        IMBSAM: ours(anomalies_are_tail()),
    }


def epoch(step: Step, batches: Batches) -> Contestant:
    def run(watch: Stopwatch) -> None:
        with watch.lap(EPOCH):
            for features, labels in batches:
                step(features, labels)

    return run


def sgd_base(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), LR, MOMENTUM)


def operation(detector: str, ratio: float, rows: int) -> Operation:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(rows, FEATURES, generator=generator)
    labels = torch.zeros(rows, dtype=torch.int64)
    labels[: math.ceil(ratio * ANOMALIES * rows / ROWS)] = 1
    torch.manual_seed(0)
    if detector == "DeepSAD":
        network: nn.Module = Encoder(FEATURES)
        loss = deepsad_loss(torch.full((CODE,), 0.1))
        order = shuffled_batches(rows, BATCH_SIZE, generator)
    else:
        network, loss = Scorer(FEATURES), deviation_loss(0.0, 1.0)
        order = balanced_batches(labels, BATCH_SIZE, DEVNET_BATCHES, generator)
    batches = [(features[b], labels[b]) for b in order]
    without = sum(not y.any() for _, y in batches)
    size = f"{detector}, {100 * ratio:g} % labelled: {len(batches)} batches, {without} without"
    contestants = {
        who: epoch(step, batches) for who, step in steps(network, loss, sgd_base).items()
    }
    return Operation(EPOCH, size, contestants)


def groups(quick: bool) -> Iterator[Group]:
    rows = 300 if quick else ROWS
    for ratio in RATIOS:
        yield [operation("DeepSAD", ratio, rows)]
    yield [operation("DevNet", RATIOS[0], rows)]


def summary(report: Report) -> list[str]:
    lines = []
    for size in dict.fromkeys(t.size for t in report.timings):
        times = {t.contestant: t.ms for t in report.timings if t.size == size}
        lines.append(
            f"{size}: in SGD epochs, SAM {times[SAM] / times[SGD]:.2f}, ImbSAM "
            f"{times[IMBSAM] / times[SGD]:.2f}, the authors' loop {times[AUTHORS] / times[SGD]:.2f}"
        )
    return lines


if __name__ == "__main__":
    torch.set_num_threads(1)  # before the environment is written down
    sys.exit(run_script(__file__, groups, summary))

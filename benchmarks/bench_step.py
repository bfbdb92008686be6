"""Whole training steps, counted in steps of SGD, on batches with more and more tail rows.

    python -m benchmarks.bench_step [--rounds N] [--json FILE] [--quick]

With f the share of tail rows, docs/design.md section 6 expects 2 for SAM, 2.67 for the authors'
loop and the joint plan, and 1 + f for the split plan, which is left out under BatchNorm; there the
sampled plan stands in its place, 1 + 2 `sample`, and the joint plan in every 4th step, 1 + 1.67 / 4
as the mean of 4 steps. The same passes "by hand", without TrainStep, show what TrainStep adds. The
optimizer's calls are a lap of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from benchmarks import networks
from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.bench import peers
from imbsam_fast.bench.cases import long_tail_batch
from imbsam_fast.bench.measure import Group, Operation, Stopwatch
from imbsam_fast.bench.report import Report
from imbsam_fast.bench.script import run_script

TAIL_FRACTIONS = (0.1, 0.25, 0.44)
CLASSES = 100
STEP = "training step"
PASSES, OPTIMIZER = "passes", "optimizer"  # the laps of a step
LR, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 5e-4

SGD = "SGD"
SAM = "SAM, TrainStep joint"
AUTHORS = "authors' loop"
JOINT, SPLIT = "ImbSAM, TrainStep joint", "ImbSAM, TrainStep split"
SAMPLED = {share: f"ImbSAM, TrainStep sampled {share:g}" for share in (0.25, 0.125)}
EVERY = 4
EVERY_4TH = f"ImbSAM, TrainStep joint, every {EVERY}"
JOINT_BY_HAND, SPLIT_BY_HAND = "joint passes by hand", "split passes by hand"

# Whether rows do not influence each other, so that the split plan is exact.
NETWORKS: dict[str, tuple[Callable[[int], nn.Module], bool]] = {
    "BatchNorm ResNet": (networks.batch_norm_resnet, False),
    "GroupNorm ResNet": (networks.group_norm_resnet, True),
    "LayerNorm ViT": (networks.LayerNormViT, True),
}

IMBSAM_CALLS = ("first_step", "second_step", "third_step")

Step = Callable[[Tensor, Tensor], object]


class TimedStep:
    """A contestant: one step on one batch, with the calls of its optimizer timed apart.

    Where steps differ in their passes, the mean of so many `steps`.
    """

    def __init__(
        self, step: Step, optimizer: object, batch: tuple[Tensor, Tensor], steps: int = 1
    ) -> None:
        self.step, self.batch, self.steps = step, batch, steps
        calls = ("step",) if isinstance(optimizer, torch.optim.SGD) else IMBSAM_CALLS
        for call in calls:
            setattr(optimizer, call, self._timed(getattr(optimizer, call)))

    def __call__(self, watch: Stopwatch) -> None:
        self.watch = watch
        with watch.lap(PASSES):
            for _ in range(self.steps):
                self.step(*self.batch)
        watch.laps = {name: seconds / self.steps for name, seconds in watch.laps.items()}

    def _timed(self, call: Callable[..., object]) -> Callable[..., object]:
        def timed(*args: object) -> object:
            with self.watch.lap(OPTIMIZER):
                return call(*args)

        return timed


# ---------------------------------------------------------------- the passes of a plan


def joint_by_hand(model: nn.Module, criterion: SplitCrossEntropy, optimizer: ImbSAM) -> Step:
    def step(images: Tensor, targets: Tensor) -> None:
        loss = criterion(model(images), targets)
        loss.head.backward(retain_graph=True)
        optimizer.first_step()
        loss.tail.backward()
        optimizer.second_step()
        criterion(model(images), targets).tail.backward()
        optimizer.third_step()

    return step


def split_by_hand(
    model: nn.Module,
    criterion: SplitCrossEntropy,
    optimizer: ImbSAM,
    batch: tuple[Tensor, Tensor],
) -> Step:
    """On rows that were selected before the step."""
    tail = criterion.split.tail_mask(batch[1])
    (head_images, tail_images), (head_targets, tail_targets) = (
        (x[~tail].contiguous(), x[tail].contiguous()) for x in batch
    )

    def step(images: Tensor, targets: Tensor) -> None:
        b = len(targets)
        criterion(model(head_images), head_targets, batch_size=b).head.backward()
        optimizer.first_step()
        criterion(model(tail_images), tail_targets, batch_size=b).tail.backward()
        optimizer.second_step()
        criterion(model(tail_images), tail_targets, batch_size=b).tail.backward()
        optimizer.third_step()

    return step


# ---------------------------------------------------------------- contestants


def operation(
    name: str, model: nn.Module, rows: int, tail_fraction: float, split_is_exact: bool
) -> Operation:
    """The steps on one network, each contestant with its own copy of it, and one batch."""
    split, targets = long_tail_batch(rows, CLASSES, tail_fraction)
    batch = (torch.randn(rows, 3, 32, 32), targets)
    criterion = SplitCrossEntropy(split)
    contestants = {}

    def add(
        who: str,
        make: Callable[[nn.Module, torch.optim.SGD], tuple[Step, object]],
        steps: int = 1,
    ) -> None:
        copy = deepcopy(model)
        contestants[who] = TimedStep(*make(copy, sgd(copy)), batch, steps)

    def planned(split: ClassSplit, plan: str, **settings: float) -> Callable:
        def make(model: nn.Module, base: torch.optim.SGD) -> tuple[Step, object]:
            optimizer = ImbSAM(base)
            loss = SplitCrossEntropy(split)
            return TrainStep(model, loss, optimizer, plan, **settings), optimizer  # type: ignore[arg-type]

        return make

    def by_hand(passes: Callable[..., Step], *args: object) -> Callable:
        def make(model: nn.Module, base: torch.optim.SGD) -> tuple[Step, object]:
            optimizer = ImbSAM(base)
            return passes(model, criterion, optimizer, *args), optimizer

        return make

    def authors(model: nn.Module, base: torch.optim.SGD) -> tuple[Step, object]:
        sequence = peers.AuthorsSequence(base)
        return peers.authors_training_step(model, peers.BooleanMasking(split), sequence), sequence

    add(SGD, lambda model, base: (peers.plain_training_step(model, base), base))
    add(SAM, planned(ClassSplit.all_tail(), "joint"))
    add(AUTHORS, authors)
    add(JOINT, planned(split, "joint"))
    add(JOINT_BY_HAND, by_hand(joint_by_hand))
    if split_is_exact:
        add(SPLIT, planned(split, "split"))
        add(SPLIT_BY_HAND, by_hand(split_by_hand, batch))
    else:
        for share, who in SAMPLED.items():
            add(who, planned(split, "sampled", sample=share))
        add(EVERY_4TH, planned(split, "joint", perturb_every=EVERY), EVERY)
    return Operation(STEP, f"{name}, {rows} rows, f = {tail_fraction}", contestants, memory=True)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def groups(quick: bool) -> Iterator[Group]:
    rows = 4 if quick else 128
    for name, (network, split_is_exact) in NETWORKS.items():
        for tail_fraction in TAIL_FRACTIONS[-1:] if quick else TAIL_FRACTIONS:
            yield [operation(name, network(CLASSES), rows, tail_fraction, split_is_exact)]


# ---------------------------------------------------------------- what the numbers say


def summary(report: Report) -> list[str]:
    sizes = dict.fromkeys(t.size for t in report.timings)
    return [
        f"{size}: in SGD steps, "
        + ", ".join(
            f"{t.contestant} {t.ratio:.2f}"
            for t in report.timings
            if t.size == size and t.contestant != SGD
        )
        for size in sizes
    ]


if __name__ == "__main__":
    sys.exit(run_script(__file__, groups, summary))

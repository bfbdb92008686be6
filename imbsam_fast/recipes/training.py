"""Training one method on one seed, from the settings of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep
from .digits import NUM_CLASSES, LongTailData
from .metrics import per_class_accuracy
from .models import ConvNet

# Keys of the methods in results and file names, with their names in tables. The second is the
# control for a tail weight: plain SGD with the class weights that ImbSAM gives its tail.
LABELS = {
    "sgd": "SGD",
    "sgd_weighted": "SGD, tail weight {tail_weight:g}",
    "sam": "SAM",
    "imbsam": "ImbSAM",
}
OPTIMIZERS = ("sgd", "sam", "imbsam")


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is trained, one value an option."""

    optimizers: tuple[str, ...]
    preset: str
    eta: float
    inclusive: bool
    tail_weight: float
    batch_norm: str
    rho: float
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    norm: str
    plan: str
    seeds: int
    imbalance_factor: float
    device: str

    def methods(self) -> list[str]:
        """Keys of LABELS: the optimizers asked for, and the control where one is needed."""
        control = self.tail_weight != 1 and "imbsam" in self.optimizers
        asked = {*self.optimizers, *(["sgd_weighted"] if control else [])}
        return [method for method in LABELS if method in asked]

    def label(self, method: str) -> str:
        return LABELS[method].format(tail_weight=self.tail_weight)

    def split(self, counts: list[int]) -> ClassSplit:
        return ClassSplit.from_counts(counts, self.eta, self.inclusive)


class Trainer(NamedTuple):
    """A model's optimizer and one step of it: (images, targets) -> loss (), before the step."""

    optimizer: torch.optim.Optimizer
    step: Callable[[Tensor, Tensor], Tensor]


class Trained(NamedTuple):
    """A model after its last epoch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    train_loss: float  # mean over the last epoch
    per_class: list[float]  # test accuracy in %


class TrainingDivergedError(Exception):
    """The training loss is no longer a finite number."""


def make_model(settings: Settings, seed: int) -> nn.Module:
    """The network with weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConvNet(settings.norm, NUM_CLASSES).to(settings.device)


def make_trainer(method: str, model: nn.Module, settings: Settings, counts: list[int]) -> Trainer:
    """The step of `method`, a key of LABELS. SGD is a plain PyTorch loop, without this package."""
    sgd = torch.optim.SGD(
        model.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay
    )
    split = settings.split(counts)
    if method == "sgd":
        return Trainer(sgd, _plain_step(model, sgd, None))
    if method == "sgd_weighted":
        weight = (split.plain + settings.tail_weight * split.sharp).float().to(settings.device)
        return Trainer(sgd, _plain_step(model, sgd, weight))
    if method == "sam":
        criterion = SplitCrossEntropy(ClassSplit.all_tail())
    else:
        criterion = SplitCrossEntropy(split, tail_weight=settings.tail_weight)
    optimizer = ImbSAM(sgd, settings.rho)
    step = TrainStep(model, criterion, optimizer, settings.plan, settings.batch_norm)
    return Trainer(optimizer, lambda images, targets: step(images, targets).loss)


def _plain_step(
    model: nn.Module, sgd: torch.optim.SGD, class_weight: Tensor | None
) -> Callable[[Tensor, Tensor], Tensor]:
    def step(images: Tensor, targets: Tensor) -> Tensor:
        targets = targets.to(images.device)
        logits = model(images)
        if class_weight is None:
            loss = F.cross_entropy(logits, targets)
        else:  # over the batch size, not over the sum of weights, as ImbSAM divides
            losses = F.cross_entropy(logits, targets, reduction="none")
            loss = (class_weight[targets] * losses).mean()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        return loss.detach()

    return step


def batches(
    data: LongTailData, settings: Settings, shuffle: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of training batches: images on the device, targets on the CPU."""
    images = data.train_images.to(settings.device)
    for rows in torch.randperm(len(images), generator=shuffle).split(settings.batch_size):
        yield images[rows.to(images.device)], data.train_targets[rows]


def train(
    method: str,
    settings: Settings,
    data: LongTailData,
    seed: int,
    on_epoch: Callable[[float], None] = lambda loss: None,
) -> Trained:
    """Train to the last epoch, then test once; the test set decides nothing.

    The initial weights and the order of the batches depend on `seed` alone, so every method
    sees the same ones. `on_epoch` is told the mean loss of every epoch. Raises
    TrainingDivergedError where that is not finite.
    """
    model = make_model(settings, seed)
    trainer = make_trainer(method, model, settings, data.counts)
    steps = settings.epochs * -(-len(data.train_targets) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(trainer.optimizer, steps)
    shuffle = torch.Generator().manual_seed(seed)
    loss = float("nan")
    for epoch in range(settings.epochs):
        total = torch.zeros((), device=settings.device)
        for images, targets in batches(data, settings, shuffle):
            total += trainer.step(images, targets) * len(targets)
            schedule.step()
        loss = total.item() / len(data.train_targets)
        if not abs(loss) < float("inf"):
            raise TrainingDivergedError(
                f"the training loss of {settings.label(method)}, seed {seed}, is {loss} in "
                f"epoch {epoch + 1}; try a --lr below {settings.lr:g}"
            )
        on_epoch(loss)
    return Trained(model, trainer.optimizer, loss, evaluate(model, data))


@torch.no_grad()
def evaluate(model: nn.Module, data: LongTailData) -> list[float]:
    """Test accuracy per class in %, (K,), of `model` in eval mode; its mode is left as it was."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        predictions = model(data.test_images.to(device)).argmax(dim=1).cpu()
    finally:
        model.train(was_training)
    return per_class_accuracy(predictions, data.test_targets, len(data.counts))

"""Training one method on one seed, from the settings of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import methods
from .digits import NUM_CLASSES, LongTailData
from .methods import LABELS, MethodSettings, Trainer
from .metrics import per_class_accuracy
from .models import ConvNet

OPTIMIZERS = ("sgd", "sam", "imbsam")


@dataclass(frozen=True)
class Settings(MethodSettings):
    """Everything that decides what is trained, one value an option."""

    optimizers: tuple[str, ...]
    preset: str
    epochs: int
    batch_size: int
    norm: str
    seeds: int
    imbalance_factor: float

    def methods(self) -> list[str]:
        """Keys of LABELS: the optimizers asked for, and the control where one is needed."""
        control = self.tail_weight != 1 and "imbsam" in self.optimizers
        asked = {*self.optimizers, *(["sgd_weighted"] if control else [])}
        return [method for method in LABELS if method in asked]

    def label(self, method: str) -> str:
        return LABELS[method].format(tail_weight=self.tail_weight)


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
    """The step of `method`, a key of LABELS; SAM is the unweighted one."""
    if method == "sam":
        settings = replace(settings, tail_weight=1.0)
    return methods.make_trainer(method, model, settings, counts)


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
            total += trainer.step(images, targets).loss * len(targets)
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

"""One training run on images: its state, its epochs, and the checkpoints that it resumes from.

Random numbers are functions of the seed, the epoch and the position in it (image_data.generator),
so a run that was interrupted anywhere goes on bit for bit as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..env import environment
from .config import RunConfig
from .evaluation import evaluate
from .image_data import LongTailImages, generator
from .image_models import make_model
from .methods import StepOptions, make_trainer
from .run_directory import RunDirectory
from .schedule import cosine_with_warmup
from .training import TrainingDivergedError

# What the random numbers of a run are for, part of the key of each generator.
ORDER, AUGMENTATION = 0, 1


class InterruptedRun(Exception):  # noqa: N818  (not an error: the run can go on)
    """The run was asked to stop; its checkpoint is written."""


class EpochSums:
    """Sums over the images of an epoch so far, kept on the device so that no step waits."""

    NAMES = ("rows", "loss", "head", "head_rows", "tail", "tail_rows", "right")

    def __init__(self, tail: Tensor, device: str) -> None:
        self.tail = tail.to(device)  # bool (K,): which classes are tail
        self.values = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self.seconds = 0.0

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        targets = targets.to(logits.device)
        losses = F.cross_entropy(logits.float(), targets, reduction="none").double()
        tail = self.tail[targets]
        rows = torch.ones_like(losses)
        self.values += torch.stack(
            [
                rows.sum(),
                loss.double() * len(targets),
                losses[~tail].sum(),
                rows[~tail].sum(),
                losses[tail].sum(),
                rows[tail].sum(),
                (logits.argmax(dim=1) == targets).double().sum(),
            ]
        )

    def means(self) -> dict[str, float | None]:
        """loss, head and tail (mean cross-entropy of an image) and train_accuracy in %."""
        sums = dict(zip(self.NAMES, self.values.tolist()))

        def mean(name: str, rows: str) -> float | None:
            return sums[name] / sums[rows] if sums[rows] else None

        return {
            "loss": mean("loss", "rows"),
            "head": mean("head", "head_rows"),
            "tail": mean("tail", "tail_rows"),
            "train_accuracy": 100 * sums["right"] / max(sums["rows"], 1),
        }


class ImageTraining:
    """The state of one run: what `state_dict` returns is all that is needed to go on."""

    def __init__(self, config: RunConfig, data: LongTailImages) -> None:
        self.config = config
        self.data = data
        self.epoch = 0  # complete epochs
        self.position = 0  # steps taken in the epoch that is not complete
        self.steps_per_epoch = -(-len(data.train) // config.batch_size)
        self.tail = config.split(data.counts).sharp > 0
        self.sums = EpochSums(self.tail, config.device)
        self.model = make_model(config.model, len(data.counts), config.norm, config.seed)
        self.model.to(config.device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.grad_scaler = torch.amp.GradScaler(config.device) if config.amp == "fp16" else None
        self.trainer = make_trainer(
            config.step_method,
            self.model,
            config,
            data.counts,
            options=StepOptions(self._autocast(), self.grad_scaler),
        )
        self.scheduler = cosine_with_warmup(
            self.trainer.optimizer,
            config.epochs * self.steps_per_epoch,
            config.warmup_epochs * self.steps_per_epoch,
        )
        self.model.train()

    def _autocast(self) -> torch.autocast | None:
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = dtypes.get(self.config.amp)
        return None if dtype is None else torch.autocast(self.config.device, dtype)

    # ------------------------------------------------------------ training

    def train_epoch(self, on_step: Callable[[ImageTraining], None]) -> dict[str, Any]:
        """The rest of the epoch, and its line of the log. `on_step` may raise between steps."""
        config = self.config
        self.model.train()
        order = torch.randperm(
            len(self.data.train), generator=generator(config.seed, ORDER, self.epoch)
        )
        batches = self.data.train.batches(
            order.split(config.batch_size),
            key=(config.seed, AUGMENTATION, self.epoch),
            start=self.position,
        )
        started = time.perf_counter()
        before = self.sums.seconds
        for images, targets in batches:
            result = self.trainer.step(self._placed(images), targets)
            self.sums.add(result.loss, result.logits, targets)
            self.scheduler.step()
            self.position += 1
            self.sums.seconds = before + time.perf_counter() - started
            on_step(self)
        return self._end_epoch()

    def _placed(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return images.to(self.config.device, memory_format=layout)

    def _end_epoch(self) -> dict[str, Any]:
        self.epoch += 1
        means = self.sums.means()
        row = {
            "epoch": self.epoch,
            "seconds": self.sums.seconds,
            "lr": self.scheduler.get_last_lr()[0],
            **means,
            "images_per_second": len(self.data.train) / self.sums.seconds,
        }
        if means["loss"] is None or not math.isfinite(means["loss"]):
            raise TrainingDivergedError(
                f"the training loss of {self.config.label()}, seed {self.config.seed}, is "
                f"{means['loss']} in epoch {self.epoch}; try a --lr below {self.config.lr:g}"
            )
        self.position = 0
        self.sums = EpochSums(self.tail, self.config.device)
        return row

    # ------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; `load_state_dict` of a new object makes it this one."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.trainer.optimizer.state_dict(),
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "grad_scaler": self.grad_scaler.state_dict() if self.grad_scaler else None,
            "epoch": self.epoch,
            "position": self.position,
            "sums": self.sums.values,
            "seconds": self.sums.seconds,
            "random": {"torch": torch.get_rng_state(), "cuda": _cuda_random_state()},
            "config": self.config.to_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        self.scheduler._last_lr = [g["lr"] for g in self.trainer.optimizer.param_groups]
        if self.grad_scaler is not None:
            self.grad_scaler.load_state_dict(state["grad_scaler"])
        self.epoch, self.position = state["epoch"], state["position"]
        self.sums.values.copy_(state["sums"])
        self.sums.seconds = state["seconds"]
        torch.set_rng_state(state["random"]["torch"])
        if state["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["random"]["cuda"])


def _cuda_random_state() -> Tensor | None:
    return torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def run_to_the_end(
    training: ImageTraining,
    directory: RunDirectory,
    on_step: Callable[[ImageTraining], None] = lambda training: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train the epochs that are left, test, and return the content of result.json.

    A checkpoint is written after every epoch and where `should_stop` says so after a step;
    InterruptedRun is raised then. A run that has a checkpoint goes on from it.
    """
    if directory.has_checkpoint():
        training.load_state_dict(directory.load_checkpoint())
        directory.keep_log(training.epoch)

    def after_step(training: ImageTraining) -> None:
        on_step(training)
        if should_stop():
            directory.save_checkpoint(training.state_dict())
            raise InterruptedRun(str(directory.path))

    while training.epoch < training.config.epochs:
        row = training.train_epoch(after_step)
        directory.append_log(row)
        directory.save_checkpoint(training.state_dict())
    result = make_result(training, directory)
    directory.write_result(result)
    return result


def make_result(training: ImageTraining, directory: RunDirectory) -> dict[str, Any]:
    """Test the model as it is after its last epoch; run_directory.py describes the content."""
    config, data = training.config, training.data
    log = directory.log()
    tested = evaluate(training.model, data.test, data.counts, config.group_borders)
    return {
        "class_counts": data.counts,
        "class_names": data.class_names,
        "tail_classes": training.tail.nonzero().flatten().tolist(),
        "group_borders": list(config.group_borders),
        "train_accuracy": log[-1]["train_accuracy"],
        "train_loss": log[-1]["loss"],
        "last": {"epoch": training.epoch, **tested},
        "best": None,
        "seconds": sum(row["seconds"] for row in log),
        "skipped_images": data.train.skipped + data.test.skipped,
        "environment": environment(),
    }

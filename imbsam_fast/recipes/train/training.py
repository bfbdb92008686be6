"""The state of one training run on images: its stages, its epochs, and its checkpoints.

Random numbers are functions of the seed, the epoch and the position in it (image_data.generator),
so a run that was interrupted between any two steps goes on bit for bit as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...training.train_step import TrainStep
from ..data.images import LongTailImages, generator
from ..models.registry import classifier, make_model
from ..run_directory import RunDirectory, RunDirectoryError
from ..settings.config import RunConfig
from .epoch_sums import EpochSums
from .methods import StepOptions, make_trainer
from .ranks import ALONE, Ranks, load_state, state_of
from .schedule import cosine_with_warmup, place_lr
from .stages import Stage, norm_cap, project_norms, stages_of

# What the random numbers of a run are for, part of the key of each generator.
ORDER, AUGMENTATION, NETWORK = range(3)


class TrainingDivergedError(Exception):
    """The training loss is no longer a finite number."""


class ImageTraining:
    """One run between two steps: what `state_dict` returns is all that is needed to go on.

    Args:
        config: the settings.
        data: what `datasets.load(config)` returned.
        ranks: the processes that share the run.

    Raises RunDirectoryError where `config.stage1` is no run of this network, and RanksError for a
    batch that the ranks cannot share alike and a method that sharded weights exclude.
    """

    def __init__(self, config: RunConfig, data: LongTailImages, ranks: Ranks = ALONE) -> None:
        self.config = config
        self.data = data
        self.ranks = ranks
        self.stages = stages_of(config)
        ranks.check_method(config.method)
        for stage in self.stages:
            ranks.check_batch(stage.config.batch_size, len(data.train))
        self.epoch = 0  # complete epochs, over all stages
        self.position = 0  # steps taken in the epoch that is not complete
        self.row: dict[str, Any] | None = None  # line of the log of an epoch not yet validated
        self.tail = config.split(data.counts).sharp > 0
        self.sums = self._new_sums()
        self.model = make_model(config.model, len(data.counts), config.norm, config.seed)
        if config.stage1:
            self._load_stage1(Path(config.stage1))
        self._start_stage(0)

    def _load_stage1(self, run: Path) -> None:
        first = RunDirectory.open(run).load_checkpoint()
        try:
            self.model.load_state_dict(first["model"])
        except RuntimeError as error:
            raise RunDirectoryError(
                f"--stage1 is '{run}', expected a run of --method ce with --model "
                f"{self.config.model}: its weights do not fit"
            ) from error

    @property
    def epochs(self) -> int:
        """Of all stages."""
        return self.stages[-1].end

    @property
    def stage(self) -> Stage:
        """The stage that is being trained."""
        return self.stages[self.stage_index]

    @property
    def steps_per_epoch(self) -> int:
        """Several ranks leave out the last batch where it is not whole."""
        size, rows = self.stage.config.batch_size, len(self.data.train)
        return rows // size if self.ranks.world > 1 else -(-rows // size)

    def _start_stage(self, index: int) -> None:
        self.stage_index = index
        self.best: float | None = None  # the stage's best mean accuracy on the validation set
        stage, config = self.stage, self.stage.config
        stage.prepare(self.model)
        # FSDP2 takes contiguous weights alone; images are channels_last there too.
        permuted = config.channels_last and self.ranks.kind != "fsdp"
        layout = torch.channels_last if permuted else torch.contiguous_format
        self.model.to(self.ranks.device, memory_format=layout)  # type: ignore[call-overload]
        self.cap = norm_cap(classifier(self.model)) if stage.name == "classifier" else None
        self._set_mode()
        if config.compile:
            torch._dynamo.reset()  # graphs of other runs may be made for a single backward
            self.model.compile()
        self.grad_scaler = None
        if config.amp == "fp16":
            self.grad_scaler = torch.amp.GradScaler(self.ranks.device.type)
        self.trainer = make_trainer(
            self.ranks.spread(self.model),
            config,
            self.data.counts,
            stage.class_weight(self.data.counts),
            StepOptions(self._autocast(), self.grad_scaler),
        )
        self.scheduler = cosine_with_warmup(
            self.trainer.optimizer,
            config.epochs * self.steps_per_epoch,
            config.warmup_epochs * self.steps_per_epoch,
        )

    def _set_mode(self) -> None:
        self.model.train(self.stage.trains_features)

    def _autocast(self) -> torch.autocast | None:
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = dtypes.get(self.config.amp)
        return None if dtype is None else torch.autocast(self.ranks.device.type, dtype)

    def _new_sums(self) -> EpochSums:
        return EpochSums(self.tail, self.ranks.device)

    # ------------------------------------------------------------ training

    def train_epoch(self, on_step: Callable[[ImageTraining], None]) -> dict[str, Any]:
        """The rest of the epoch, and its line of the log. `on_step` may raise between steps."""
        if self.epoch == self.stage.end:
            self._start_stage(self.stage_index + 1)
        self._set_mode()
        started, before = time.perf_counter(), self.sums.seconds
        for images, targets in self.ranks.agreed(self.batches()):
            self.step(images, targets)
            self.sums.seconds = before + time.perf_counter() - started
            on_step(self)
        return self._end_epoch()

    def step(self, images: Tensor, targets: Tensor) -> None:
        """One batch: images on the rank's device, labels anywhere."""
        self._seed_network()
        result = self.trainer.step(self._placed(images), targets)
        self.sums.add(result.loss, result.logits, targets)
        self.scheduler.step()
        self.position += 1

    def _seed_network(self) -> None:
        """For dropout and stochastic depth, which draw from torch's own generators."""
        key = (self.config.seed, NETWORK, self.epoch, self.position, self.ranks.rank)
        torch.manual_seed(generator(*key).initial_seed())

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the batches of the epoch that are left."""
        order = self.stage.order(
            self.data.train.targets,
            len(self.data.counts),
            generator(self.config.seed, ORDER, self.epoch),
        )
        batches = order.split(self.stage.config.batch_size)[: self.steps_per_epoch]
        key = (self.config.seed, AUGMENTATION, self.epoch)
        return self.data.train.batches(
            batches, key, self.position, self.ranks.part, self.ranks.device
        )

    def _placed(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return images.to(self.ranks.device, memory_format=layout)

    def _end_epoch(self) -> dict[str, Any]:
        if self.cap is not None:
            project_norms(classifier(self.model), self.cap)
        self.epoch += 1
        self.ranks.sum_(self.sums.values)
        means = self.sums.means()
        row = {
            "epoch": self.epoch,
            "stage": self.stage.name,
            "seconds": self.sums.seconds,
            "lr": float(self.scheduler.get_last_lr()[0]),
            **means,
            "images_per_second": float(self.sums.values[0]) / self.sums.seconds,
        }
        if means["loss"] is None or not math.isfinite(means["loss"]):
            raise TrainingDivergedError(
                f"the training loss of {self.config.label()}, seed {self.config.seed}, is "
                f"{means['loss']} in epoch {self.epoch}; try a --lr below {self.config.lr:g}"
            )
        self.position = 0
        self.sums = self._new_sums()
        return row

    # ------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; under several ranks, all of them have to call it."""
        self.ranks.average_statistics(self.model)
        step = self.trainer.step
        weights, optimizer = state_of(self.ranks.kind, self.model, self.trainer.optimizer)
        return {
            "model": weights,
            "optimizer": optimizer,
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "grad_scaler": self.grad_scaler.state_dict() if self.grad_scaler else None,
            "step": step.state_dict() if isinstance(step, TrainStep) else None,
            "stage": self.stage_index,
            "epoch": self.epoch,
            "position": self.position,
            "sums": self.sums.values.cpu(),
            "seconds": self.sums.seconds,
            "row": self.row,
            "norm_cap": self.cap,
            "best": self.best,
            "config": self.config.to_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, in a training of the same configuration."""
        for index in range(self.stage_index + 1, state["stage"] + 1):
            self._start_stage(index)
        optimizer = self.trainer.optimizer
        load_state(self.ranks.kind, self.model, optimizer, state["model"], state["optimizer"])
        place_lr(optimizer, self.ranks.device if self.config.cuda_graph else None)
        for group in optimizer.param_groups:  # of a run that was captured, or was not
            group["fused"] = optimizer.defaults["fused"]
        self.scheduler.last_epoch = state["scheduler"]["last_epoch"]
        self.scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
        if self.grad_scaler is not None:
            self.grad_scaler.load_state_dict(state["grad_scaler"])
        if isinstance(self.trainer.step, TrainStep) and state.get("step"):
            self.trainer.step.load_state_dict(state["step"])
        self.epoch, self.position = state["epoch"], state["position"]
        self.sums.values.copy_(state["sums"])
        self.sums.seconds = state["seconds"]
        self.row = state.get("row")
        self.cap, self.best = state["norm_cap"], state["best"]

"""One training run from its first epoch, or its checkpoint, to its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...env import environment
from ..data.images import Images
from ..models.registry import make_model
from ..run_directory import RunDirectory
from ..settings.config import RunConfig
from .evaluation import evaluate
from .stages import stages_of
from .training import ImageTraining


class InterruptedRun(Exception):  # noqa: N818  (not an error: the run can go on)
    """The run was asked to stop, and its checkpoint is written; the text is its directory."""


def run_to_the_end(
    training: ImageTraining,
    directory: RunDirectory,
    on_step: Callable[[ImageTraining], None] = lambda training: None,
    should_stop: Callable[[], bool] = lambda: False,
    on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Train the epochs that are left, test, and return the content of result.json.

    A checkpoint is written after every epoch and where `should_stop` says so after a step;
    InterruptedRun is raised then. A run that has a checkpoint goes on from it. Under several
    ranks all call this, and rank 0 writes.
    """
    ranks = training.ranks
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)
    if directory.has_checkpoint():
        training.load_state_dict(directory.load_checkpoint())
    if ranks.writes:
        directory.keep_log(training.epoch)  # without a checkpoint too: it may have failed

    def after_step(training: ImageTraining) -> None:
        on_step(training)
        if ranks.any(should_stop()):
            _save(training, directory)
            raise InterruptedRun(str(directory.path))

    while training.epoch < training.epochs:
        row = training.train_epoch(after_step)
        improved = _validate(training, row)
        if ranks.writes:
            directory.append_log(row)
        if improved:
            _save(training, directory, best=True)
        _save(training, directory)
        on_epoch(row)
    on_gpu = ranks.device.type == "cuda"
    peak_bytes = torch.cuda.max_memory_allocated(ranks.device) if on_gpu else None
    result = _result(training, directory, peak_bytes)
    if ranks.writes:
        directory.write_result(result)
    return result


def _save(training: ImageTraining, directory: RunDirectory, best: bool = False) -> None:
    state = training.state_dict()
    if training.ranks.writes:
        directory.save_checkpoint(state, best)
    training.ranks.any(False)  # nobody looks for the file before it is there


def _validate(training: ImageTraining, row: dict[str, Any]) -> bool:
    """Add `validation` to the epoch's line; whether its mean over the classes is the best yet."""
    data = training.data
    if data.validation is None:
        return False
    training.ranks.average_statistics(training.model)
    row["validation"] = _test(training, data.validation)["plain"]
    accuracy = row["validation"]["all"]
    improved = training.best is None or accuracy > training.best
    if improved:
        training.best = accuracy
    return improved


def _test(training: ImageTraining, images: Images) -> dict[str, dict[str, Any]]:
    borders = training.config.group_borders
    return evaluate(training.model, images, training.data.counts, borders, training.ranks)


def _result(
    training: ImageTraining, directory: RunDirectory, peak_bytes: int | None
) -> dict[str, Any]:
    """Test the last and the best checkpoint; run_directory.py describes the content."""
    data = training.data
    log = directory.log()
    last = {"epoch": training.epoch, **_test(training, data.test)}
    best = None
    if directory.has_checkpoint(best=True):
        training.load_state_dict(directory.load_checkpoint(best=True))
        best = {"epoch": training.epoch, **_test(training, data.test)}
    return {
        "class_counts": data.counts,
        "class_names": data.class_names,
        "tail_classes": training.tail.nonzero().flatten().tolist(),
        "group_borders": list(training.config.group_borders),
        "train_accuracy": log[-1]["train_accuracy"] if log else None,
        "train_loss": log[-1]["loss"] if log else None,
        "last": last,
        "best": best,
        "seconds": sum(row["seconds"] for row in log),
        "peak_bytes": peak_bytes,
        "skipped_images": data.train.skipped + data.test.skipped,
        "ranks": training.ranks.world,
        "environment": environment(),
    }


def load_model(directory: RunDirectory, num_classes: int, best: bool = False) -> nn.Module:
    """The network of a run with the weights of last.pt, or best.pt, on the CPU in eval mode."""
    state = directory.load_checkpoint(best)
    config = RunConfig.from_dict(directory.config)
    model = make_model(config.model, num_classes, config.norm, config.seed)
    for stage in stages_of(config)[: state["stage"] + 1]:
        stage.prepare(model)
    model.load_state_dict(state["model"])
    return model.eval().requires_grad_(True)

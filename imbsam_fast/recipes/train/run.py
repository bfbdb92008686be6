"""One training run from its first epoch, or its checkpoint, to its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...env import environment
from ..data.images import DataError, Images
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

    A checkpoint is written after every epoch, and where `should_stop` says so after a step or a
    batch of a test; InterruptedRun is raised then. It is written too before the DataError of an
    image that cannot be read. A run that has a checkpoint goes on from it. Under several ranks all
    call this, and rank 0 writes.
    """
    ranks = training.ranks
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)
    if directory.has_checkpoint():
        training.load_state_dict(directory.load_checkpoint())
    if ranks.writes:  # without a checkpoint too: it may have failed
        directory.keep_log(training.epoch - (training.row is not None))

    def stop_if_asked() -> None:
        if ranks.any(should_stop()):
            raise InterruptedRun(str(directory.path))

    def after_step(training: ImageTraining) -> None:
        on_step(training)
        stop_if_asked()

    try:
        while training.epoch < training.epochs or training.row is not None:
            row = _epoch(training, directory, after_step, stop_if_asked)
            on_epoch(row)
    except InterruptedRun:
        _save(training, directory)
        raise
    except DataError as error:
        _save(training, directory)
        raise DataError(f"{error}; '{directory.path}' goes on with --resume") from error
    on_gpu = ranks.device.type == "cuda"
    peak_bytes = torch.cuda.max_memory_allocated(ranks.device) if on_gpu else None
    result = _result(training, directory, stop_if_asked, peak_bytes)
    if ranks.writes:
        directory.write_result(result)
    return result


def _epoch(
    training: ImageTraining,
    directory: RunDirectory,
    after_step: Callable[[ImageTraining], None],
    stop_if_asked: Callable[[], None],
) -> dict[str, Any]:
    """What is left of an epoch: training, validation, and the files that they leave."""
    if training.row is None:
        training.row = training.train_epoch(after_step)
    improved = _validate(training, training.row, stop_if_asked)
    row, training.row = training.row, None
    if training.ranks.writes:
        directory.append_log(row)
    if improved:
        _save(training, directory, best=True)
    _save(training, directory)
    return row


def _save(training: ImageTraining, directory: RunDirectory, best: bool = False) -> None:
    state = training.state_dict()
    if training.ranks.writes:
        directory.save_checkpoint(state, best)
    training.ranks.any(False)  # nobody looks for the file before it is there


def _validate(training: ImageTraining, row: dict[str, Any], between: Callable[[], None]) -> bool:
    """Add `validation` to the epoch's line; whether its mean over the classes is the best yet."""
    data = training.data
    if data.validation is None:
        return False
    training.ranks.average_statistics(training.model)
    row["validation"] = _test(training, data.validation, between)["plain"]
    accuracy = row["validation"]["all"]
    improved = training.best is None or accuracy > training.best
    if improved:
        training.best = accuracy
    return improved


def _test(
    training: ImageTraining, images: Images, between: Callable[[], None], confusion: bool = False
) -> dict[str, dict[str, Any]]:
    counts, borders = training.data.counts, training.config.group_borders
    ranks = training.ranks
    return evaluate(training.model, images, counts, borders, ranks, between, confusion)


def _result(
    training: ImageTraining,
    directory: RunDirectory,
    between: Callable[[], None],
    peak_bytes: int | None,
) -> dict[str, Any]:
    """Test the last and the best checkpoint; run_directory.py describes the content."""
    data = training.data
    data.train.close()
    log = directory.log()
    last = {"epoch": training.epoch, **_test(training, data.test, between, True)}
    best = None
    if directory.has_checkpoint(best=True):
        training.load_state_dict(directory.load_checkpoint(best=True))
        best = {"epoch": training.epoch, **_test(training, data.test, between, True)}
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

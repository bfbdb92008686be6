"""Time per training step of every method, relative to a plain PyTorch SGD loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import fmean, median
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from .digits import LongTailData
from .training import Settings, Trainer, batches, make_model, make_trainer

MAX_BATCHES = 16


class Timings(NamedTuple):
    """What `time_steps` measured."""

    sgd_ms: float  # milliseconds of one step of the plain SGD loop
    relative: dict[str, dict[str, float]]  # method -> backend -> time relative to SGD
    batches: int
    repetitions: int


def backends(device: str) -> list[str]:
    """The backend in use on `device`, and the pure-torch reference where that is another."""
    return list(dict.fromkeys([dispatch.backend_name(device), "reference"]))


def time_steps(
    settings: Settings,
    data: LongTailData,
    repetitions: int = 8,
    on_repetition: Callable[[], None] = lambda: None,
) -> Timings:
    """Train every method side by side on the first batches of an epoch and time each step.

    All variants take one step on a batch before any takes the next, so that a change in the
    machine's speed meets them alike. A variant's time is the mean over the batches of its
    median over the repetitions; one more repetition before them is not counted.
    """
    epoch = list(batches(data, settings, torch.Generator().manual_seed(0)))[:MAX_BATCHES]
    names = backends(settings.device)
    trainers = _trainers(settings, data.counts, names)
    seconds: dict[tuple[str, str], list[list[float]]] = {v: [[] for _ in epoch] for v in trainers}
    for repetition in range(repetitions + 1):
        for i, batch in enumerate(epoch):
            for (method, backend), trainer in trainers.items():
                elapsed = _timed_step(trainer, backend, batch)
                if repetition > 0:
                    seconds[method, backend][i].append(elapsed)
        on_repetition()
    step_time = {v: fmean(median(samples) for samples in rows) for v, rows in seconds.items()}
    sgd = step_time["sgd", ""]
    relative = {
        # A plain loop uses no backend; its one time stands under each of them.
        method: {
            b: step_time.get((method, b), step_time.get((method, ""), sgd)) / sgd for b in names
        }
        for method in dict.fromkeys(["sgd", *settings.methods()])
    }
    return Timings(1000 * sgd, relative, len(epoch), repetitions)


def _trainers(
    settings: Settings, counts: list[int], names: list[str]
) -> dict[tuple[str, str], Trainer]:
    """A trainer with a model of its own for every method and backend, "" for a plain loop."""
    variants = [("sgd", "")]
    for method in settings.methods():
        if method == "sgd_weighted":
            variants.append((method, ""))
        elif method != "sgd":
            variants += [(method, backend) for backend in names]
    return {
        (method, backend): make_trainer(method, make_model(settings, 0), settings, counts)
        for method, backend in variants
    }


def _timed_step(trainer: Trainer, backend: str, batch: tuple[Tensor, Tensor]) -> float:
    with dispatch.use_backend(backend) if backend else nullcontext():
        _synchronize(batch[0])
        start = time.perf_counter()
        trainer.step(*batch)
        _synchronize(batch[0])
        return time.perf_counter() - start


def _synchronize(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)

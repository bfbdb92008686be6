"""Runs the fits of a grid, cell by cell, in this process or in several."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from . import data
from .deepsad import DeepSAD
from .detector import Detector
from .detectors import DETECTORS
from .metrics import detection_metrics
from .networks import Encoder
from .settings import Cell, Fit, Settings
from .store import Store
from .training import denormals_flushed


class Job(NamedTuple):
    """The fits of a cell that are still to be made."""

    cell: Cell
    path: Path  # of the data set
    methods: tuple[str, ...]
    settings: Settings
    detectors: Path | None  # where the fitted detectors go
    run: int


def jobs(
    store: Store,
    settings: Settings,
    paths: Iterable[Path],
    protocols: Iterable[str],
    ratios: Iterable[float],
    seeds: int,
    detectors: Iterable[str],
    methods: Sequence[str],
    keep: Path | None,
) -> Iterator[Job]:
    """What `store` does not hold yet.

    The first seed of every set comes first, and the ratios of a set one after the other, since
    they share its pre-training.
    """
    done: dict[Cell, set[str]] = {}
    for fit in store.fits:
        done.setdefault(fit.cell, set()).add(fit.method)
    axes = range(seeds), protocols, paths, detectors, ratios
    for seed, protocol, path, detector, ratio in itertools.product(*axes):
        cell = Cell(path.stem, protocol, ratio, seed, detector)
        missing = tuple(m for m in methods if m not in done.get(cell, ()))
        if missing:
            yield Job(cell, path, missing, settings, keep, store.run)


def run(jobs: Sequence[Job], processes: int, threads: int) -> Iterator[list[Fit]]:
    """The fits of each job, as they come; a job that fails raises here.

    Every process works on `threads` threads of torch.
    """
    if processes == 1:
        yield from map(run_job, jobs)
        return
    # Not forked: torch's threads do not survive that.
    context = multiprocessing.get_context("spawn")
    workers = ProcessPoolExecutor(processes, context, torch.set_num_threads, (threads,))
    try:
        for future in as_completed([workers.submit(run_job, job) for job in jobs]):
            yield future.result()
    finally:
        workers.shutdown(cancel_futures=True)


def run_job(job: Job) -> list[Fit]:
    """Train and test every method of a job on the same rows from the same start."""
    with denormals_flushed():
        return _fits(job)


def _fits(job: Job) -> list[Fit]:
    cell = job.cell
    data_set = _read(job.path)
    parts = data.part(data_set, cell.protocol, cell.ratio, cell.seed)
    train, test = data_set.X[parts.train_rows], data_set.X[parts.test_rows]
    fits = []
    for method in job.methods:
        detector = _fitted(job, method, train, parts.train_labels)
        areas = detection_metrics(data_set.y[parts.test_rows], detector.decision_function(test))
        fits.append(
            Fit(
                **cell._asdict(),
                method=method,
                aucroc=areas["aucroc"],
                aucpr_anomaly=areas["aucpr_anomaly"],
                aucpr_normal=areas["aucpr_normal"],
                train_loss=detector.train_loss_,
                train_rows=len(train),
                labelled=int(parts.train_labels.sum()),
                leaked=round(parts.leaked, 4),
                run=job.run,
            )
        )
        if job.detectors is not None:
            detector.save(job.detectors / detector_file(cell, method))
    return fits


def detector_file(cell: Cell, method: str) -> str:
    """The file name of a saved detector."""
    name = f"{cell.set}_{cell.detector}_{method}_{cell.protocol}_{cell.ratio:g}_{cell.seed}"
    return f"{name}.pt"


def _fitted(job: Job, method: str, train: np.ndarray, labels: np.ndarray) -> Detector:
    cell = job.cell
    params = job.settings.detector_params(cell.detector, method, cell.seed)
    detector = DETECTORS[cell.detector](**params)
    if isinstance(detector, DeepSAD):
        encoder = _pretrained(job.path, cell.protocol, cell.seed, job.settings)
        return detector.fit(train, labels, encoder=encoder)
    return detector.fit(train, labels)


@lru_cache(maxsize=1)
def _pretrained(path: Path, protocol: str, seed: int, settings: Settings) -> Encoder:
    """Of DeepSAD, shared by ratios and methods: it sees neither labels nor the method."""
    data_set = _read(path)
    rows = data.part(data_set, protocol, 1.0, seed).train_rows  # the same at any ratio
    detector = DeepSAD(**settings.detector_params("deepsad", "sgd", seed))
    return detector.pretrain(data_set.X[rows])


@lru_cache(maxsize=4)
def _read(path: Path) -> data.DataSet:
    return data.read(path)

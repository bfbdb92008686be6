"""DistributedDataParallel with gloo: the ranks together take the step of one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from networks import COUNTS, batches, distance, imbsam, network
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from imbsam_fast import ClassSplit, SplitCrossEntropy, TrainStep
from imbsam_fast.data_parallel import average_

STEPS = 6


def data() -> list[tuple[Tensor, Tensor]]:
    """Among them batches whose second half has no tail row, no head row, or nothing but those."""
    found = list(batches(STEPS))
    for i, (_, y) in enumerate(found[:3]):
        y[8:] = torch.arange(8) % 5 + (0, 5, 0)[i]
    found[2][1][:8] = torch.arange(8) % 5 + 5
    return found


def train(model: nn.Module, rank: int, ranks: int, **settings) -> None:
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    step = TrainStep(model, criterion, imbsam(model), **settings)
    for x, y in data():
        size = len(y) // ranks
        rows = slice(rank * size, (rank + 1) * size)
        step(x[rows], y[rows])


# Settings, and the network's normalisation; all run in one group of processes.
CASES = {
    "joint": ("group", {"plan": "joint"}),
    "split": ("group", {"plan": "split"}),
    "pieces": ("group", {"plan": "joint", "max_norm": 0.05, "micro_batch_size": 3}),
    "local": ("group", {"plan": "split", "perturbation": "local"}),
    "batch norm": ("batch", {"plan": "auto"}),
}


def on_rank(rank: int, ranks: int, folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    join(rank, ranks, folder)
    try:
        for case in cases:
            norm, settings = CASES[case]
            model = network(norm)
            train(DistributedDataParallel(model), rank, ranks, **settings)
            torch.save(model.state_dict(), folder / f"{case} {rank}.pt")
    finally:
        dist.destroy_process_group()


def join(rank: int, ranks: int, folder: Path) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    timeout = timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=timeout
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], list[nn.Module]]:
    """(ranks, case) -> the model of every rank after training."""
    folders = {}
    for ranks, cases in ((2, [*CASES]), (4, ["split"])):
        folders[ranks] = tmp_path_factory.mktemp("ranks")
        mp.spawn(on_rank, (ranks, folders[ranks], cases), nprocs=ranks)

    def models(ranks: int, case: str) -> list[nn.Module]:
        found = [network(CASES[case][0]) for _ in range(ranks)]
        for rank, model in enumerate(found):
            model.load_state_dict(torch.load(folders[ranks] / f"{case} {rank}.pt"))
        return found

    return models


def alone(case: str) -> nn.Module:
    norm, settings = CASES[case]
    model = network(norm)
    train(model, 0, 1, **settings)
    return model


@pytest.mark.parametrize(("ranks", "case"), [(2, "joint"), (2, "split"), (4, "split")])
def test_ranks_step_like_one_process(trained, ranks, case):
    expected = alone(case)
    for model in trained(ranks, case):
        assert distance(model, expected) < 1e-12


def test_clipping_and_micro_batches_span_the_ranks(trained):
    expected = alone("pieces")
    for model in trained(2, "pieces"):
        assert distance(model, expected) < 1e-7  # the factor is float32


def test_a_local_perturbation_keeps_the_ranks_together(trained):
    models = trained(2, "local")
    assert distance(*models) == 0
    assert 0 < distance(models[0], alone("split")) < 0.1


def test_batch_norm_trains_under_the_joint_plan(trained):
    models = trained(2, "batch norm")
    for p, q in zip(*(model.parameters() for model in models)):
        assert torch.equal(p, q)
    assert models[0][1].num_batches_tracked == STEPS


def test_gradients_of_several_kinds_are_averaged(tmp_path):
    join(0, 1, tmp_path)
    try:
        found = [torch.ones(3), torch.ones(2, 2).double(), torch.ones(0), torch.ones(4, 3).t()]
        average_(found, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(g, torch.ones_like(g)) for g in found)


def dies(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    join(rank, 2, folder)
    model = network("group")
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    step = TrainStep(DistributedDataParallel(model), criterion, imbsam(model))
    x, y = next(batches(1))
    step(x, y)
    if rank == 1:
        os._exit(7)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError):
        step(x, y)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    os._exit(0)


def test_a_rank_that_dies_is_an_error_on_the_others_and_not_a_hang(tmp_path):
    context = mp.get_context("spawn")
    processes = [context.Process(target=dies, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=90)
    assert [process.exitcode for process in processes] == [0, 7]


def test_an_unknown_perturbation_is_named():
    model = network("group")
    criterion = SplitCrossEntropy(ClassSplit.all_tail())
    with pytest.raises(ValueError, match="perturbation is 'none', expected one of global, local"):
        TrainStep(model, criterion, imbsam(model), perturbation="none")

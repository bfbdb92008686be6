"""DistributedDataParallel with gloo: the ranks together take the step of one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks as processes
import torch
import torch.distributed as dist
from networks import batches, distance, imbsam, network
from ranks import SPLIT, STEPS, data, join, own
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from imbsam_fast import ClassSplit, SplitCrossEntropy, TrainStep, frozen_batch_norm_statistics
from imbsam_fast.optim.replicas import average_
from imbsam_fast.training.batch_norm import has_batch_statistics


def train(model: nn.Module, rank: int, ranks: int, **settings) -> None:
    step = TrainStep(model, SplitCrossEntropy(SPLIT), imbsam(model), **settings)
    for batch in data():
        step(*own(batch, rank, ranks))


# Settings, and the network's normalisation; all run in one group of processes.
CASES = {
    "joint": ("group", {"plan": "joint"}),
    "split": ("group", {"plan": "split"}),
    "pieces": ("group", {"plan": "joint", "max_norm": 0.05, "micro_batch_size": 3}),
    "local": ("group", {"plan": "split", "perturbation": "local"}),
    "sampled": ("group", {"plan": "sampled", "micro_batch_size": 3}),
    "every": ("group", {"plan": "joint", "perturb_every": 4}),
    "sampled, local": ("group", {"plan": "sampled", "perturbation": "local", "perturb_every": 2}),
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], list[nn.Module]]:
    """(ranks, case) -> the model of every rank after training."""
    folders = {}
    for ranks, cases in ((2, [*CASES]), (4, ["joint", "split"])):
        folders[ranks] = tmp_path_factory.mktemp("ranks")
        processes.start(on_rank, ranks, folders[ranks], cases)

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


@pytest.mark.parametrize(
    ("ranks", "case"),
    [(2, "joint"), (2, "split"), (2, "sampled"), (2, "every"), (4, "joint"), (4, "split")],
)
def test_ranks_step_like_one_process(trained, ranks, case):
    expected = alone(case)
    for model in trained(ranks, case):
        assert distance(model, expected) < 1e-12


def test_clipping_and_micro_batches_span_the_ranks(trained):
    expected = alone("pieces")
    for model in trained(2, "pieces"):
        assert distance(model, expected) < 1e-7  # the factor is float32


@pytest.mark.parametrize(("case", "exact"), [("local", "split"), ("sampled, local", "sampled")])
def test_a_local_perturbation_keeps_the_ranks_together(trained, case, exact):
    models = trained(2, case)
    assert distance(*models) == 0
    assert 0 < distance(models[0], alone(exact)) < 0.1


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


# ---------------------------------------------------------------- SyncBatchNorm


class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return SumOverRanks.forward(ctx, gradient)


class SyncBatchNormOnCPU(nn.SyncBatchNorm):
    """The same numbers on the CPU, where torch has none: statistics of the rows of all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = SumOverRanks.apply(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = SumOverRanks.apply(centred.square().sum((0, 2, 3))) / count
        if self.track_running_stats:
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * count / (count - 1), self.momentum)
        scale = self.weight / (variance + self.eps).sqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


def synchronised_statistics_are_those_of_the_whole_batch(rank: int, ranks: int) -> None:
    """Also where a rank has no tail row, or no head row: it runs the passes of the others."""
    expected = network("batch")
    train(expected, 0, 1)
    for settings in ({}, {"plan": "sampled", "sample": 1.0}):
        model = network("batch")
        wrapped = DistributedDataParallel(model)  # which refuses the layer on a CPU
        model[1].__class__ = SyncBatchNormOnCPU
        train(wrapped, rank, ranks, **settings)
        assert distance(model, expected) < 1e-11


def errors_in_the_perturbed_pass_restore_every_rank(rank: int, ranks: int) -> None:
    model = network("group")
    optimizer = imbsam(model)
    step = TrainStep(DistributedDataParallel(model), SplitCrossEntropy(SPLIT), optimizer)

    def fail(*_: object) -> None:
        if optimizer.is_perturbed:
            raise ArithmeticError

    step(*own(data()[3], rank, ranks))
    before = [p.detach().clone() for p in model.parameters()]
    hook = model[-1].register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        step(*own(data()[3], rank, ranks))
    assert all(map(torch.equal, model.parameters(), before))
    hook.remove()
    step(*own(data()[3], rank, ranks))
    assert not any(map(torch.equal, model.parameters(), before))


def norms_are_those_of_all_rows(rank: int, ranks: int) -> None:
    """g_t is each rank's own under a local perturbation."""
    wanted = {"plan": "joint", "max_norm": float("inf")}
    models = [network("group") for _ in range(3)]
    distributed = [DistributedDataParallel(model) for model in models[1:]]
    alone, ours, local = (
        TrainStep(wrapped, SplitCrossEntropy(SPLIT), imbsam(model), **settings)
        for wrapped, model, settings in zip(
            [models[0], *distributed],
            models,
            [wanted, wanted, {**wanted, "perturbation": "local"}],
        )
    )
    batch = data()[3]
    expected = alone(*batch)
    found, apart = (step(*own(batch, rank, ranks)) for step in (ours, local))
    for name in ("grad_norm", "tail_grad_norm", "clip_factor"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    sizes = [torch.zeros((), dtype=torch.float64) for _ in range(ranks)]
    dist.all_gather(sizes, apart.tail_grad_norm)
    assert len({float(size) for size in sizes}) == ranks


CHECKS = {
    check.__name__: check
    for check in (
        norms_are_those_of_all_rows,
        synchronised_statistics_are_those_of_the_whole_batch,
        errors_in_the_perturbed_pass_restore_every_rank,
    )
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return processes.outcomes(CHECKS, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", CHECKS)
def test_on_ranks(outcomes, check):
    assert not outcomes[check], outcomes[check]


def test_sync_batch_norm_counts_as_batch_norm():
    """Alone, where it is ordinary BatchNorm: torch synchronises on GPUs only."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network("batch"))
    assert isinstance(model[1], nn.SyncBatchNorm) and has_batch_statistics(model)
    assert not has_batch_statistics(model.eval())
    train(model.train(), 0, 1, plan="auto")
    assert model[1].num_batches_tracked == STEPS
    assert distance(model, alone("batch norm")) == 0
    mean = model[1].running_mean.clone()
    with frozen_batch_norm_statistics(model):
        model(data()[0][0])
    assert torch.equal(model[1].running_mean, mean)


# ---------------------------------------------------------------- failures


def dies(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    join(rank, ranks, folder)
    model = network("group")
    step = TrainStep(DistributedDataParallel(model), SplitCrossEntropy(SPLIT), imbsam(model))
    x, y = next(batches(1))
    step(x, y)
    if rank == 1:
        os._exit(7)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError):
        step(x, y)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before))
    os._exit(0)


@pytest.mark.slow  # starts ranks
def test_a_rank_that_dies_is_an_error_on_the_others_and_not_a_hang(tmp_path):
    running = processes.start(dies, 2, tmp_path, join=False).processes
    for process in running:
        process.join(timeout=60)
    assert [process.exitcode for process in running] == [0, 7]


def test_an_unknown_perturbation_is_named():
    model = network("group")
    criterion = SplitCrossEntropy(ClassSplit.all_tail())
    with pytest.raises(ValueError, match="perturbation is 'none', expected one of global, local"):
        TrainStep(model, criterion, imbsam(model), perturbation="none")

"""DistributedDataParallel in every form of a step: ranks step like one process, or refuse."""

from __future__ import annotations

import pytest
import ranks as processes
import torch
import torch.distributed as dist
from networks import batches, distance, imbsam, network
from ranks import SPLIT, own
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from imbsam_fast import LeanImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.optim.replicas import replicas_of

STEPS = 4
CRITERION = SplitCrossEntropy(SPLIT)


def data():
    """Without batches that lack a part: every form needs both gradients on every rank."""
    for x, y in batches(STEPS):
        y[:8], y[8:] = torch.arange(8) + 1, torch.arange(8)
        yield x, y


def alone() -> nn.Module:
    model = network("group")
    step = TrainStep(model, CRITERION, imbsam(model), "joint")
    for batch in data():
        step(*batch)
    return model


def check_same(model: nn.Module) -> None:
    assert distance(model, alone()) < 1e-12


def a_closure_takes_the_step_of_one_process(rank: int, ranks: int) -> None:
    for settings in ({}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}):
        model = network("group")
        replica, optimizer = DistributedDataParallel(model, **settings), imbsam(model)
        for batch in data():
            x, y = own(batch, rank, ranks)
            optimizer.step(lambda x=x, y=y, replica=replica: CRITERION(replica(x), y))
        assert replica.require_backward_grad_sync
        check_same(model)


def three_calls_take_it_with_one_forward_or_two(rank: int, ranks: int) -> None:
    for forwards in (1, 2):
        model = network("group")
        replica, optimizer = DistributedDataParallel(model), imbsam(model)
        for batch in data():
            x, y = own(batch, rank, ranks)
            loss = CRITERION(replica(x), y)
            loss.head.backward(retain_graph=forwards == 1)
            optimizer.first_step()
            (loss if forwards == 1 else CRITERION(replica(x), y)).tail.backward()
            optimizer.second_step()
            CRITERION(replica(x), y).tail.backward()
            optimizer.third_step()
        check_same(model)


def gradients_kept_apart_by_the_user_stay_apart(rank: int, ranks: int) -> None:
    """Inside no_sync the perturbation is each rank's own."""
    model = network("group")
    replica, optimizer = DistributedDataParallel(model), imbsam(model)
    for batch in data():
        x, y = own(batch, rank, ranks)
        CRITERION(replica(x), y).head.backward()
        optimizer.first_step()
        with replica.no_sync():
            CRITERION(replica(x), y).tail.backward()
            optimizer.second_step()
        CRITERION(replica(x), y).tail.backward()
        optimizer.third_step()
    expected = network("group")
    step = TrainStep(
        DistributedDataParallel(expected), CRITERION, imbsam(expected), "joint",
        perturbation="local",
    )  # fmt: skip
    for batch in data():
        step(*own(batch, rank, ranks))
    assert distance(model, expected) < 1e-12
    assert distance(model, alone()) > 1e-6


def a_wrapper_around_or_inside_the_model_is_found(rank: int, ranks: int) -> None:
    class Fabric(nn.Module):  # as Lightning's and torch.compile's modules hold it
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    class Derived(DistributedDataParallel):
        pass

    for place in ("around", "inside"):
        model = network("group")
        replica = Derived(model)
        step = TrainStep(
            model if place == "around" else Fabric(replica), CRITERION, imbsam(model), "joint"
        )
        for batch in data():
            step(*own(batch, rank, ranks))
        check_same(model)


def lean_is_refused_in_every_form(rank: int, ranks: int) -> None:
    model = network("group")
    base = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    optimizer = LeanImbSAM(base)
    replica = DistributedDataParallel(model)
    x, y = own(next(data()), rank, ranks)
    before = [p.detach().clone() for p in model.parameters()]
    message = "the parameters are DistributedDataParallel's, expected those of one process"

    def three_calls() -> None:
        CRITERION(replica(x), y).head.backward()
        optimizer.first_step()

    def without_a_head() -> None:
        CRITERION(replica(x), y).tail.backward()
        optimizer.second_step()

    def without_a_tail() -> None:
        CRITERION(replica(x), y).head.backward()
        optimizer.third_step()

    for form in (
        three_calls, without_a_head, without_a_tail,
        lambda: optimizer.step(lambda: CRITERION(replica(x), y)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            form()
        optimizer.restore()
        model.zero_grad()
    for given in (model, replica):
        with pytest.raises(ValueError, match=r"model is DistributedDataParallel, expected .*Lean"):
            TrainStep(given, CRITERION, optimizer)
    assert all(map(torch.equal, model.parameters(), before)) and not optimizer.state


def ranks_that_train_apart_are_left_alone(rank: int, ranks: int) -> None:
    """One of them takes no step at all: it would hang if they talked to each other."""
    for make in (imbsam, lambda m: LeanImbSAM(imbsam(m).base)):
        model, expected = network("group"), network("group")
        other = DistributedDataParallel(nn.Linear(2, 2))  # of somebody else's
        assert replicas_of(list(other.parameters())) == [other]
        assert not replicas_of(list(model.parameters()))
        if rank == 0:
            optimizer = make(model)
            step = TrainStep(expected, CRITERION, make(expected), "joint")
            for x, y in data():
                optimizer.step(lambda x=x, y=y, model=model: CRITERION(model(x), y))
                step(x, y)
            assert distance(model, expected) < 1e-12


def static_graphs_are_refused_by_name(rank: int, ranks: int) -> None:
    model = network("group")
    replica, optimizer = DistributedDataParallel(model, static_graph=True), imbsam(model)
    x, y = own(next(data()), rank, ranks)
    with pytest.raises(ValueError, match="has static_graph=True, expected False"):
        TrainStep(replica, CRITERION, optimizer)
    with pytest.raises(ValueError, match="has static_graph=True, expected False"):
        optimizer.step(lambda: CRITERION(replica(x), y))


def models_of_two_groups_are_refused(rank: int, ranks: int) -> None:
    groups = [dist.new_group(), dist.new_group()]
    parts = [DistributedDataParallel(nn.Linear(4, 4), process_group=g) for g in groups]
    model = nn.Sequential(*parts)
    with pytest.raises(ValueError, match="models of two process groups"):
        TrainStep(model, CRITERION, imbsam(model))


def fsdp1_is_refused_in_the_three_calls(rank: int, ranks: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(
        network("group", torch.float32), device_id=torch.device("cpu"), use_orig_params=True
    )
    optimizer = imbsam(model)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="FullyShardedDataParallel's, expected fully_shard"):
        optimizer.second_step()


def same_dropout_and_own_buffers_on_every_rank(rank: int, ranks: int) -> None:
    """DDP writes one rank's buffers to all before the first forward, which is no change."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network("group")
            self.register_buffer("table", torch.zeros(3, 1, 1, dtype=torch.float64))
            self.draws: list[torch.Tensor] = []

        def forward(self, x):
            kept = nn.functional.dropout(torch.ones_like(x[:, :, 0, 0]))
            self.draws.append(kept)
            return checkpoint(
                self.body, x * kept[:, :, None, None] + self.table, use_reentrant=False
            )

    model = Net()
    step = TrainStep(
        DistributedDataParallel(model), CRITERION, imbsam(model), "split", same_dropout=True
    )
    torch.manual_seed(rank)
    x, y = own(next(data()), rank, ranks)
    step(x, y)
    assert not step.own_writes.changing
    assert len(model.draws) == 2 + (int((y < 5).sum()) > 0) - (int((y >= 5).sum()) == 0)
    assert torch.equal(model.draws[-1], model.draws[-2])


CHECKS = {
    check.__name__: check
    for check in (
        a_closure_takes_the_step_of_one_process,
        three_calls_take_it_with_one_forward_or_two,
        gradients_kept_apart_by_the_user_stay_apart,
        a_wrapper_around_or_inside_the_model_is_found,
        lean_is_refused_in_every_form,
        ranks_that_train_apart_are_left_alone,
        static_graphs_are_refused_by_name,
        models_of_two_groups_are_refused,
        fsdp1_is_refused_in_the_three_calls,
        same_dropout_and_own_buffers_on_every_rank,
    )
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return processes.outcomes(CHECKS, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", CHECKS)
def test_on_ranks(outcomes, check):
    assert not outcomes[check], outcomes[check]


def test_a_static_graph_of_one_process_is_refused_too(tmp_path):
    processes.join(0, 1, tmp_path)
    try:
        model = network("group")
        replica = DistributedDataParallel(model, static_graph=True)
        with pytest.raises(ValueError, match="has static_graph=True, expected False"):
            TrainStep(replica, CRITERION, imbsam(model))
    finally:
        dist.destroy_process_group()

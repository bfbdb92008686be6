"""FSDP2 with gloo: ranks that hold shards together take the step of one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks as processes
import torch
import torch.distributed as dist
from networks import COUNTS, LR, MOMENTUM, RHO, WEIGHT_DECAY, imbsam, network
from ranks import SPLIT, STEPS, data, own
from sharded import Scaled, assert_same, needs_fsdp, parts, sharded, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from imbsam_fast import ClassSplit, ImbSAM, LeanImbSAM, SplitCrossEntropy, TrainStep

pytestmark = needs_fsdp

# ---------------------------------------------------------------- as one process

Base = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    first, *others = model.parameters()
    groups = [{"params": [first], "lr": 0.1, "nesterov": True}, {"params": others, "rho": 0.2}]
    return torch.optim.SGD(groups, LR, MOMENTUM, weight_decay=WEIGHT_DECAY)


def train(
    model: nn.Module, rank: int, ranks: int, base: Base = sgd, adaptive: bool = False,
    norms: list | None = None, **settings: Any,
) -> ImbSAM:  # fmt: skip
    criterion = SplitCrossEntropy(settings.pop("split", SPLIT))
    optimizer = ImbSAM(base(model), RHO, adaptive)
    with torch.no_grad():
        model.eval()(data()[0][0])  # which leaves the root's weights gathered
    model.train()
    step = TrainStep(model, criterion, optimizer, **settings)
    for x, y in data():
        seen = step(*own((x, y), rank, ranks))
        assert len(seen.logits) == len(y) // ranks
        if norms is not None:
            zero = torch.zeros((), dtype=torch.float64)  # ranks perturb by it without tail rows
            tail_norm = zero if seen.tail_grad_norm is None else seen.tail_grad_norm
            norms.append((seen.grad_norm, tail_norm, seen.clip_factor))
    return optimizer


def like_one_process(
    rank: int, ranks: int, tolerance: float = 1e-12, norm: str = "group", replicas: int = 1,
    forward_reshards: bool | None = None, **settings: Any,
) -> None:  # fmt: skip
    expected = Scaled(norm, torch.float64)
    train(expected, 0, 1, **settings)
    names = ("replicas", "shards")
    mesh = init_device_mesh("cpu", (replicas, ranks // replicas), mesh_dim_names=names)
    mesh = mesh if replicas > 1 else mesh["shards"]
    # None, to leave it to torch, is an argument of newer ones only.
    reshards = {} if forward_reshards is None else {"reshard_after_forward": forward_reshards}
    model = sharded(Scaled(norm, torch.float64), mesh=mesh, **reshards)
    if forward_reshards is False:
        model.set_reshard_after_backward(False)
    optimizer = train(model, rank, ranks, **settings)
    assert_same(model, expected, tolerance)
    kept = [s for state in optimizer.state.values() for n, s in state.items() if n != "step"]
    assert kept and all(isinstance(s, DTensor) for s in kept)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3, amsgrad=True)


def rmsprop(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters(), 1e-3, momentum=0.9)


def focal() -> ClassSplit:
    return ClassSplit.focal(COUNTS, 2.0, 0.7)


CLIPPED = 1e-7  # the factor is float32

LIKE_ONE_PROCESS: dict[str, dict[str, Any]] = {
    "joint": {"plan": "joint"},
    "split": {"plan": "split"},
    "joint, weights stay gathered": {"plan": "joint", "forward_reshards": False},
    "split, gathered anew in the backward": {"plan": "split", "forward_reshards": True},
    "adaptive, groups": {"plan": "auto", "adaptive": True, "base": grouped},
    "clipped pieces": {"max_norm": 0.05, "micro_batch_size": 3, "tolerance": CLIPPED},
    "AdamW": {"plan": "split", "base": adamw},
    "RMSprop, clipped": {"plan": "joint", "base": rmsprop, "max_norm": 0.05, "tolerance": 1e-6},
    "sampled": {"plan": "sampled"},
    "sampled, AdamW, clipped": {
        "plan": "sampled",
        "base": adamw,
        "max_norm": 0.05,
        "tolerance": 1e-6,
    },
    "every": {"plan": "split", "perturb_every": 4},
    "Focal-SAM": {"split": focal()},
    "SAM": {"split": ClassSplit.all_tail()},
    "SGD": {"split": ClassSplit.none()},
    "scaler": {"plan": "joint", "grad_scaler": torch.amp.GradScaler("cpu", init_scale=256.0)},
}


def norms_are_those_of_all_shards(rank: int, ranks: int) -> None:
    found: list[list] = [[], []]
    for norms, model, (own_rank, own_ranks) in zip(
        found,
        (Scaled("group", torch.float64), sharded(Scaled("group", torch.float64))),
        ((0, 1), (rank, ranks)),
    ):
        train(model, own_rank, own_ranks, plan="split", max_norm=0.05, norms=norms)
    torch.testing.assert_close(found[1][0], found[0][0])  # later ones: clipped in float32
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


def batch_norm_trains(rank: int, ranks: int) -> None:
    """Statistics of this rank's rows, those of the unperturbed pass only."""
    model = sharded(Scaled("batch", torch.float64))
    train(model, rank, ranks)
    assert model.layers[1].num_batches_tracked == STEPS


def sam_with_ignored_rows(rank: int, ranks: int) -> None:
    """Ranks with an ignored row, which no part counts, run the passes of the others."""
    models = [Scaled("group", torch.float64), sharded(Scaled("group", torch.float64))]
    for model, (own_rank, own_ranks) in zip(models, ((0, 1), (rank, ranks))):
        step = TrainStep(model, SplitCrossEntropy(ClassSplit.all_tail()), imbsam(model))
        for x, y in data():
            y[:3], y[-3:] = -100, -100
            step(*own((x, y), own_rank, own_ranks))
    assert_same(models[1], models[0])


# ---------------------------------------------------------------- the calls of ImbSAM


def passes(model: nn.Module, optimizer: ImbSAM, x: Tensor, y: Tensor) -> None:
    criterion = SplitCrossEntropy(SPLIT)
    loss = criterion(model(x), y)
    loss.head.backward(retain_graph=True)
    optimizer.first_step()
    loss.tail.backward()
    optimizer.second_step()
    criterion(model(x), y).tail.backward()


def calls_and_closure(rank: int, ranks: int) -> None:
    expected = Scaled("group", torch.float64)
    train(expected, 0, 1, plan="joint")
    by_calls, by_closure = (sharded(Scaled("group", torch.float64)) for _ in range(2))
    optimizers = imbsam(by_calls), imbsam(by_closure)
    for batch in data():
        x, y = own(batch, rank, ranks)
        passes(by_calls, optimizers[0], x, y)
        optimizers[0].third_step()
        optimizers[1].step(lambda x=x, y=y: SplitCrossEntropy(SPLIT)(by_closure(x), y))
    assert_same(by_calls, expected)
    assert_same(by_closure, expected)


def overflow_on_one_rank_skips_the_step_on_all(rank: int, ranks: int) -> None:
    for where in ("g_t", "g_p"):
        model = sharded(Scaled("group", torch.float64))
        optimizer = imbsam(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        x, y = own(data()[0], rank, ranks)
        before = parts(model)
        losses = SplitCrossEntropy(SPLIT)(model(x), y)
        scaler.scale(losses.tail).backward()
        classifier = model.layers[-1].weight
        if where == "g_t" and rank == 0:
            classifier.grad.to_local()[0, 0] = torch.inf
        optimizer.second_step()
        scaler.scale(SplitCrossEntropy(SPLIT)(model(x), y).tail).backward()
        if where == "g_p" and rank == 0:
            classifier.grad.to_local()[0, 0] = torch.inf
        optimizer.third_step(scaler)
        scaler.update()
        assert scaler.get_scale() == 2.0
        assert all(map(torch.equal, parts(model), before))


def master_weights_move_by_less_than_a_rounding(rank: int, ranks: int) -> None:
    """bfloat16 shards with float32 master weights step like whole weights do."""
    models = []
    for own_rank, own_ranks in ((0, 1), (rank, ranks)):
        model = Scaled("none", torch.bfloat16)
        if own_ranks > 1:
            sharded(model)
        base = torch.optim.SGD(model.parameters(), 1e-3, MOMENTUM)
        optimizer = ImbSAM(base, RHO, master_weights=True)
        step = TrainStep(model, SplitCrossEntropy(SPLIT), optimizer, "joint")
        for x, y in data():
            step(*own((x.bfloat16(), y), own_rank, own_ranks))
        models.append((model, optimizer))
    (alone, of_alone), (model, optimizer) = models
    for p, q in zip(model.parameters(), alone.parameters()):
        master, expected = optimizer.state[p]["master_weight"], of_alone.state[q]["master_weight"]
        assert isinstance(master, DTensor) and master.dtype == torch.float32
        assert torch.equal(master.to(torch.bfloat16).to_local(), p.to_local())
        # Gradients are rounded on each rank before they are averaged.
        torch.testing.assert_close(whole(master), expected, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- checkpoints


def checkpoints_go_on_with_the_same_bits(rank: int, ranks: int) -> None:
    for base in (sgd, adamw):
        runs = []
        for _ in range(2):
            model = sharded(Scaled("group", torch.float64))
            optimizer = ImbSAM(base(model), RHO)
            runs.append((model, optimizer, TrainStep(model, SplitCrossEntropy(SPLIT), optimizer)))
        (model, optimizer, step), (other, of_other, resumed) = runs
        for batch in data()[:3]:
            step(*own(batch, rank, ranks))
        weights, state = deepcopy(get_state_dict(model, optimizer))
        set_state_dict(other, of_other, model_state_dict=weights, optim_state_dict=state)
        for batch in data()[3:]:
            step(*own(batch, rank, ranks))
            resumed(*own(batch, rank, ranks))
        assert all(map(torch.equal, parts(model), parts(other)))
        plain = base(sharded(Scaled("group", torch.float64)))
        plain.load_state_dict(optimizer.state_dict())  # as from its own checkpoint
        plain.step()


def checkpoints_of_plain_sgd_load(rank: int, ranks: int) -> None:
    models = [sharded(Scaled("group", torch.float64)) for _ in range(2)]
    plain = sgd(models[0])
    x, y = own(data()[0], rank, ranks)
    nn.functional.cross_entropy(models[0](x), y).backward()
    plain.step()
    optimizer = imbsam(models[1])
    weights, state = get_state_dict(models[0], plain)
    set_state_dict(models[1], optimizer, model_state_dict=weights, optim_state_dict=state)
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        momenta = plain.state[p]["momentum_buffer"], optimizer.state[q]["momentum_buffer"]
        assert torch.equal(*(m.to_local() for m in momenta))


# ---------------------------------------------------------------- failures


class InjectedError(Exception):
    pass


def failures(model: nn.Module, optimizer: ImbSAM) -> Iterator[Callable[[], Any]]:
    """Each arranges for a failure while the weights are perturbed, and says how to undo that."""

    def when_perturbed(*_: Any) -> None:
        if optimizer.is_perturbed:
            raise InjectedError

    yield model.layers[-1].register_forward_pre_hook(when_perturbed).remove
    # In the backward, after the classifier's gradient was reduced and before the others'.
    hook = model.layers[2].register_full_backward_hook(when_perturbed)
    yield hook.remove


def failures_restore_every_rank(rank: int, ranks: int) -> None:
    model, untroubled = (sharded(Scaled("group", torch.float64)) for _ in range(2))
    optimizer, other = imbsam(model), imbsam(untroubled)
    step = TrainStep(model, SplitCrossEntropy(SPLIT), optimizer, "split")
    expected = TrainStep(untroubled, SplitCrossEntropy(SPLIT), other, "split")
    batch = own(data()[3], rank, ranks)
    step(*batch), expected(*batch)
    for undo in failures(model, optimizer):
        before = parts(model)
        with pytest.raises(InjectedError):
            step(*batch)
        undo()
        assert all(p.grad is None for p in model.parameters())
        assert all(map(torch.equal, parts(model), before))
        if not hasattr(model, "reset_iter_state"):  # an older torch: see the next check
            return
        step(*batch), expected(*batch)  # as if nothing had been
        assert all(map(torch.equal, parts(model), parts(untroubled)))


def a_failure_ends_training_where_torch_cannot_reset(rank: int, ranks: int) -> None:
    model = sharded(Scaled("group", torch.float64))
    optimizer = imbsam(model)
    step = TrainStep(model, SplitCrossEntropy(SPLIT), optimizer)
    batch = own(data()[3], rank, ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(FSDPModule, "reset_iter_state", raising=False)
        before = parts(model)
        next(failures(model, optimizer))
        with pytest.raises(InjectedError):
            step(*batch)
        assert all(
            map(torch.equal, [p.to_local() for p in optimizer.param_groups[0]["params"]], before)
        )
        with pytest.raises(RuntimeError, match="this torch has no reset_iter_state"):
            step(*batch)


def unsynchronised_gradients_are_refused(rank: int, ranks: int) -> None:
    model = sharded(Scaled("group", torch.float64))
    step = TrainStep(model, SplitCrossEntropy(SPLIT), imbsam(model))
    model.set_requires_gradient_sync(False)
    with pytest.raises(RuntimeError, match="set_requires_gradient_sync is False, expected True"):
        step(*own(data()[0], rank, ranks))
    model.set_requires_gradient_sync(True)
    step(*own(data()[0], rank, ranks))


# ---------------------------------------------------------------- what is refused


def settings_are_refused(rank: int, ranks: int) -> None:
    model = sharded(Scaled("group", torch.float64))
    criterion, optimizer = SplitCrossEntropy(SPLIT), imbsam(model)
    for settings, message in {
        ("perturbation", "local"): "perturbation is 'local', expected 'global' with a fully_shard",
        ("cuda_graph", True): "cuda_graph is True, expected False with a fully_shard model",
    }.items():
        with pytest.raises(ValueError, match=message):
            TrainStep(model, criterion, optimizer, "joint", **dict([settings]))
    with pytest.raises(ValueError, match="micro_batch_size is 2, expected None with plan='split'"):
        TrainStep(model, criterion, optimizer, "split", micro_batch_size=2)
    with pytest.raises(ValueError, match="None with plan='sampled' where"):
        TrainStep(model, criterion, optimizer, "sampled", micro_batch_size=2)
    with pytest.raises(ValueError, match="the parameters are sharded, expected those of one"):
        LeanImbSAM(sgd(model))


def placements_are_refused(rank: int, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (ranks,))

    def of(*placements: Any) -> nn.Parameter:
        return nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, placements))

    two = init_device_mesh("cpu", (1, ranks))
    shards = nn.Parameter(distribute_tensor(torch.ones(4, 4), two, (Shard(0), Shard(1))))
    for params, message in (
        ([of(Shard(1))], r"parameter 0 has placements \(Shard\(dim=1\),\)"),
        ([of(Shard(0)), of(Replicate())], r"parameter 1 has placements \(Replicate\(\),\)"),
        ([shards], r"placements \(Shard\(dim=0\), Shard\(dim=1\)\) on a mesh of 2 dimensions"),
        ([of(Shard(0)), nn.Parameter(torch.ones(2))], "parameter 1 is a tensor of this rank alone"),
    ):
        with pytest.raises(ValueError, match=message):
            ImbSAM(torch.optim.SGD(params, 0.1))
    p = of(Shard(0))
    optimizer = ImbSAM(torch.optim.SGD([p], 0.1))
    p.grad = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])
    with pytest.raises(TypeError, match=r"placements \(Partial\(sum\),\), expected those"):
        optimizer.third_step()


# ---------------------------------------------------------------- all of them


def named(*checks: processes.Check) -> dict[str, processes.Check]:
    return {check.__name__: check for check in checks}


def likes(*cases: str, **more: Any) -> dict[str, processes.Check]:
    chosen = {case: LIKE_ONE_PROCESS[case] for case in cases or LIKE_ONE_PROCESS}
    suffix = "".join(f", {name} {value}" for name, value in more.items())
    return {
        case + suffix: partial(like_one_process, **settings, **more)
        for case, settings in chosen.items()
    }


CHECKS: dict[int, dict[str, processes.Check]] = {
    1: likes("joint", "split"),
    2: likes()
    | named(
        batch_norm_trains, sam_with_ignored_rows, calls_and_closure,
        norms_are_those_of_all_shards, overflow_on_one_rank_skips_the_step_on_all,
        master_weights_move_by_less_than_a_rounding,
        checkpoints_go_on_with_the_same_bits, checkpoints_of_plain_sgd_load,
        failures_restore_every_rank, a_failure_ends_training_where_torch_cannot_reset,
        unsynchronised_gradients_are_refused, settings_are_refused, placements_are_refused,
    ),
    4: likes("joint", "split", "clipped pieces") | likes("split", "scaler", replicas=2),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], str]:
    """(ranks, check) -> the traceback of a rank where the check failed, or nothing."""
    found: dict[int, dict[str, str]] = {}

    def of(ranks: int, check: str) -> str:
        if ranks not in found:
            folder = tmp_path_factory.mktemp("ranks")
            found[ranks] = processes.outcomes(CHECKS[ranks], ranks, folder)
        return found[ranks][check]

    return of


@pytest.mark.parametrize(
    ("ranks", "check"), [(ranks, check) for ranks, checks in CHECKS.items() for check in checks]
)
def test_on_ranks(outcome, ranks, check):
    failure = outcome(ranks, check)
    assert not failure, failure


class OldWrapper(FullyShardedDataParallel):
    """As far as it goes without a GPU."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self._fsdp_wrapped_module = module


def test_flat_parameters_are_refused():
    model = nn.Sequential(OldWrapper(network("group")))
    with pytest.raises(ValueError, match="model has FullyShardedDataParallel at '0', expected ful"):
        TrainStep(model, SplitCrossEntropy(SPLIT), imbsam(model))


def test_state_is_made_without_a_closure_at_learning_rate_0_alone():
    model = network("group")
    optimizer = imbsam(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(TypeError, match="closure is None"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    assert optimizer.step(closure=None) is None
    assert all(map(torch.equal, model.parameters(), before))
    for p in model.parameters():  # as torch.optim.SGD does
        assert torch.equal(optimizer.state[p]["momentum_buffer"], WEIGHT_DECAY * p)
    with pytest.raises(TypeError, match="closure is None"):
        optimizer.step()


def dies(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    processes.join(rank, ranks, folder)
    model = sharded(Scaled("group", torch.float64))
    optimizer = imbsam(model)
    step = TrainStep(model, SplitCrossEntropy(SPLIT), optimizer)
    batch = own(data()[3], rank, ranks)
    step(*batch)
    if rank == 1:
        model.layers[2].register_forward_hook(
            lambda *_: os._exit(7) if optimizer.is_perturbed else None
        )
    before = parts(model)
    with pytest.raises(RuntimeError):
        step(*batch)
    assert all(map(torch.equal, parts(model), before))
    os._exit(0)


@pytest.mark.slow  # starts ranks
def test_a_rank_that_dies_is_an_error_on_the_others_and_not_a_hang(tmp_path):
    running = processes.start(dies, 2, tmp_path, join=False)
    for process in running.processes:
        process.join(timeout=60)
    assert [process.exitcode for process in running.processes] == [0, 7]
    assert not dist.is_initialized()

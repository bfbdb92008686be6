"""Training steps on 1, 2 and 4 gloo processes: their time, and what the processes exchange.

    python -m benchmarks.bench_distributed [--rounds N] [--json FILE] [--quick]

Every process has one thread and a batch of its own, so that the work grows with the processes.
A step is compared with a model: its time on one process, longer where processes share cores, and
for every collective a latency and a cost of each byte, both from timing collectives alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import bench_growth, networks
from benchmarks.bench_step import AUTHORS, SGD, sgd
from imbsam_fast import ImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.bench import peers
from imbsam_fast.bench.cases import long_tail_batch
from imbsam_fast.bench.measure import Group, Operation, Stopwatch, Timing, measure, warm_up
from imbsam_fast.bench.process import OtherLoad
from imbsam_fast.bench.report import Report, save
from imbsam_fast.env import environment
from imbsam_fast.optim.replicas import average_

RANKS = (1, 2, 4)
CLASSES = 100
TAIL_FRACTION = 0.25
STEP, COLLECTIVE = "training step", "collective"
JOINT, SPLIT, LOCAL = "ImbSAM joint", "ImbSAM split", "ImbSAM split, local perturbation"
SHARDED = "fully_shard: "

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
# What torch's dispatcher calls them, and which argument is as large as the whole tensor.
OPERATORS = {
    "allreduce_": (ALL_REDUCE, 0),
    "_allgather_base_": (ALL_GATHER, 0),
    "_reduce_scatter_base_": (REDUCE_SCATTER, 1),
}
COLLECTIVE_ELEMENTS = (1, 1024, 64 * 1024, 512 * 1024, 4 * 1024 * 1024)  # float32

Step = Callable[[Tensor, Tensor], object]

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the rows of a process
    "MLP, 4 layers of 512": (lambda: networks.mlp(CLASSES, 512, 4), 32),
    "LayerNorm ViT": (lambda: networks.LayerNormViT(CLASSES), 32),
}
QUICK_NETWORKS = {"MLP, 1 layer of 16": (lambda: networks.mlp(CLASSES, 16, 1), 8)}


class Exchanged(NamedTuple):
    """The collectives of one kind in one step; bytes are those of the whole tensors."""

    calls: int
    bytes: int


class Counted(TorchDispatchMode):
    """Counts collectives, also those that DDP's reducer and FSDP2 call."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Exchanged] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name in OPERATORS:
            kind, whole = OPERATORS[name]
            size = sum(t.nbytes for t in pytree.tree_leaves(args[whole]))
            calls, total = self.found.get(kind, Exchanged(0, 0))
            self.found[kind] = Exchanged(calls + 1, total + size)
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------- contestants


class AuthorsOnRanks(peers.AuthorsSequence):
    """The authors' sequence as three backwards under data parallelism would have it."""

    def _average(self) -> None:
        average_([p.grad for p in self.params], dist.group.WORLD)  # type: ignore[misc, arg-type]

    def first_step(self) -> None:
        self._average()
        super().first_step()

    def second_step(self) -> None:
        self._average()
        super().second_step()

    def third_step(self) -> None:
        self._average()
        super().third_step()


def replicated(model: nn.Module) -> DistributedDataParallel:
    return DistributedDataParallel(model)


def spread(model: nn.Module) -> nn.Module:
    """Every linear layer in shards of its own; a transformer's layers as wholes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # not a GPU that is there too
    wholes = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    for m in wholes or [m for m in model.modules() if isinstance(m, nn.Linear)]:
        fully_shard(m, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def contestants(network: Callable[[], nn.Module], criterion: SplitCrossEntropy) -> dict[str, Step]:
    """Each with a network of its own."""

    def plain(wrap: Callable[[nn.Module], nn.Module]) -> Step:
        model = wrap(network())
        return peers.plain_training_step(model, sgd(model))

    def authors() -> Step:
        model = network()
        masks = peers.BooleanMasking(criterion.split)
        return peers.authors_training_step(model, masks, AuthorsOnRanks(sgd(model)))

    def planned(wrap: Callable[[nn.Module], nn.Module], plan: str, **settings: str) -> Step:
        model = wrap(network())
        return TrainStep(model, criterion, ImbSAM(sgd(model)), plan, **settings)  # type: ignore

    return {
        SGD: plain(replicated),
        AUTHORS: authors(),
        JOINT: planned(replicated, "joint"),
        SPLIT: planned(replicated, "split"),
        LOCAL: planned(replicated, "split", perturbation="local"),
        SHARDED + SGD: plain(spread),
        SHARDED + JOINT: planned(spread, "joint"),
        SHARDED + SPLIT: planned(spread, "split"),
    }


# ---------------------------------------------------------------- on a rank


def in_step(call: Callable[[], object]) -> Callable[[Stopwatch], None]:
    """A contestant that all processes begin together."""

    def contestant(watch: Stopwatch) -> None:
        dist.barrier()
        with watch.lap("step"):
            call()

    return contestant


def collectives(size: str) -> Group:
    """Each kind on tensors of several sizes, to be timed alone."""
    ranks = dist.get_world_size()

    def calls(whole: Tensor, part: Tensor) -> dict[str, Callable[[], object]]:
        return {
            ALL_REDUCE: lambda: dist.all_reduce(whole),
            ALL_GATHER: lambda: dist.all_gather_into_tensor(whole, part),
            REDUCE_SCATTER: lambda: dist.reduce_scatter_tensor(part, whole),
        }

    found = []
    for elements in COLLECTIVE_ELEMENTS:
        part = torch.zeros(-(-elements // ranks))
        whole = torch.zeros(len(part) * ranks)
        timed = {kind: in_step(call) for kind, call in calls(whole, part).items()}
        found.append(Operation(COLLECTIVE, size, timed, bytes=whole.nbytes))
    return found


def on_rank(rank: int, ranks: int, folder: Path, quick: bool, rounds: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # of names that newer torch has others for
    rendezvous = f"file://{folder}/rendezvous {ranks}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    group = collectives(label(ranks))
    warm_up(group)
    timings = [t for operation in group for t in measure([operation], rounds)]
    exchanged = {}
    for name, (network, rows) in (QUICK_NETWORKS if quick else NETWORKS).items():
        size = size_of(name, ranks)
        of_steps, exchanged[size] = measured_steps(size, network, rows, rounds)
        timings += of_steps
    if rank == 0:
        found = {"timings": [asdict(t) for t in timings], "exchanged": exchanged}
        (folder / f"{ranks}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends while they do


def measured_steps(
    size: str, network: Callable[[], nn.Module], rows: int, rounds: int
) -> tuple[list[Timing], dict[str, dict[str, Exchanged]]]:
    """The steps on one network, and what each of them exchanges."""
    split, targets = long_tail_batch(rows, CLASSES, TAIL_FRACTION)
    images = torch.randn(rows, 3, 32, 32)

    def seeded() -> nn.Module:
        torch.manual_seed(0)  # the same on all ranks
        return network()

    steps = contestants(seeded, SplitCrossEntropy(split))
    timed = {who: in_step(partial(step, images, targets)) for who, step in steps.items()}
    operation = Operation(STEP, size, timed, sum(p.nbytes for p in seeded().parameters()))
    warm_up([operation])
    timings = measure([operation], rounds)
    exchanged = {}
    for who, step in steps.items():
        with Counted() as counted:
            step(images, targets)
        exchanged[who] = counted.found
    return timings, exchanged


# ---------------------------------------------------------------- the model


def label(ranks: int) -> str:
    return f"{ranks} rank{'s' if ranks > 1 else ''}"


def size_of(network: str, ranks: int) -> str:
    return f"{network}, {label(ranks)}"


def costs(report: Report, ranks: int) -> dict[str, bench_growth.Line]:
    """By kind of collective: the latency, and the time of a byte."""
    found = [t for t in report.timings if (t.operation, t.size) == (COLLECTIVE, label(ranks))]
    return {
        kind: bench_growth.fit(
            [t.bytes for t in found if t.contestant == kind],
            [t.ms for t in found if t.contestant == kind],
        )
        for kind in (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER)
    }


def predicted_ms(report: Report, network: str, who: str, ranks: int) -> float:
    """The time on one process, that cores are shared for, and all collectives one by one."""
    cores = report.settings["environment"]["machine"]["cores"]
    alone = report.ms(STEP, who, size_of(network, 1))
    lines = costs(report, ranks)
    exchanged = report.settings["exchanged"][size_of(network, ranks)][who]
    talking = sum(
        calls * lines[kind].fixed_ms + size * lines[kind].ms_each
        for kind, (calls, size) in exchanged.items()
    )
    return alone * max(1.0, ranks / cores) + talking


def sizes(report: Report) -> Iterator[tuple[str, int]]:
    """(network, ranks) of every comparison, in the order of networks."""
    found = dict.fromkeys(t.size for t in report.timings if t.operation == STEP)
    pairs = [size.rpartition(", ")[::2] for size in found]
    for network in dict.fromkeys(network for network, _ in pairs):
        for of_network, ranks in pairs:
            if of_network == network:
                yield network, int(ranks.split()[0])


# ---------------------------------------------------------------- the command


def summary(report: Report) -> list[str]:
    return [
        f"{size_of(network, ranks)}: "
        + ", ".join(
            f"{t.contestant} {t.ms:.1f} ms"
            + (f" (model {predicted_ms(report, network, t.contestant, ranks):.1f})" * (ranks > 1))
            for t in report.timings
            if (t.operation, t.size) == (STEP, size_of(network, ranks))
        )
        for network, ranks in sizes(report)
    ]


def run(quick: bool, rounds: int) -> Report:
    settings: dict[str, Any] = {
        "rounds": rounds,
        "quick": quick,
        "freed_memory": "returned",
        "threads of a rank": 1,
        "environment": environment(),
        "exchanged": {},
    }
    settings["environment"]["machine"]["torch_threads"] = 1
    report = Report("bench_distributed", [], settings=settings)
    others = OtherLoad()
    with tempfile.TemporaryDirectory() as directory, others:
        for ranks in RANKS:
            folder = Path(directory)
            mp.spawn(on_rank, (ranks, folder, quick, rounds), nprocs=ranks)
            found = json.loads((folder / f"{ranks}.json").read_text())
            report.timings += [Timing(**t) for t in found["timings"]]
            settings["exchanged"].update(found["exchanged"])
    settings["cores_used_by_others"] = others.cores
    report.summary = summary(report)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_distributed", allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds to take the median over")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write everything")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, expected at least 1")
    if args.json is None and not args.quick:
        args.json = Path(__file__).parent / "results" / "bench_distributed.json"
    start = time.perf_counter()
    report = run(args.quick, 2 if args.quick else args.rounds)
    print("\n".join([*report.summary, f"took {time.perf_counter() - start:.0f} s"]))
    if args.json is not None:
        save(report, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

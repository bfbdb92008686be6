"""The memory of whole training steps, counted: every tensor that is alive, at the peak and after.

    python -m benchmarks.bench_memory [--json FILE] [--quick]

The bytes of all storages that PyTorch's dispatcher has seen are added up, so that the numbers are
the same in every run and on every machine; what an operation needs inside itself is not counted,
nor what an allocator keeps in reserve. Weights, inputs and activations are part of the sum. One n
is the bytes of all weights.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import networks
from benchmarks.bench_step import AUTHORS, JOINT, SGD, SPLIT, sgd
from imbsam_fast import ImbSAM, LeanImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.bench import peers
from imbsam_fast.bench.cases import long_tail_batch
from imbsam_fast.bench.measure import Memory
from imbsam_fast.bench.report import Report, save
from imbsam_fast.env import environment

CLASSES = 100
TAIL_FRACTION = 0.25
LEAN_JOINT, LEAN_SPLIT = "LeanImbSAM, joint", "LeanImbSAM, split"
SAMPLED, LEAN_SAMPLED = "ImbSAM, sampled 0.25", "LeanImbSAM, sampled 0.25"

Step = Callable[[Tensor, Tensor], object]
# From the network, its SGD and the criterion of the batch; all but SGD's own need the last.
Contestant = Callable[[nn.Module, torch.optim.SGD, SplitCrossEntropy], Step]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive: those given, and those made inside."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: set[int] = set()
        self._add(tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._add(pytree.tree_leaves(out))
        return out

    def _add(self, found: Sequence[Any]) -> None:
        for storage in (t.untyped_storage() for t in found if isinstance(t, Tensor)):
            if storage._cdata not in self._storages:
                self._storages.add(storage._cdata)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
                self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _freed(self, storage: int, size: int) -> None:
        self._storages.remove(storage)
        self.live -= size


# ---------------------------------------------------------------- contestants


def authors(model: nn.Module, base: torch.optim.SGD, criterion: SplitCrossEntropy) -> Step:
    masks = peers.BooleanMasking(criterion.split)
    return peers.authors_training_step(model, masks, peers.AuthorsSequence(base))


def planned(plan: str, kind: type[ImbSAM] = ImbSAM, **settings: Any) -> Contestant:
    return lambda model, base, criterion: TrainStep(model, criterion, kind(base), plan, **settings)


CONTESTANTS: dict[str, Contestant] = {
    SGD: lambda model, base, _: peers.plain_training_step(model, base),
    AUTHORS: authors,
    JOINT: planned("joint"),
    SPLIT: planned("split"),
    SAMPLED: planned("sampled", sample=0.25),
    LEAN_JOINT: planned("joint", LeanImbSAM),
    LEAN_SPLIT: planned("split", LeanImbSAM),
    LEAN_SAMPLED: planned("sampled", LeanImbSAM, sample=0.25),
}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the rows of a batch
    "MLP, 8 layers of 1024": (lambda: networks.mlp(CLASSES, 1024, 8), 32),
    "LayerNorm ViT, 6 layers of 384": (lambda: networks.LayerNormViT(CLASSES, 384, 6), 8),
    "BatchNorm ResNet": (lambda: networks.batch_norm_resnet(CLASSES), 128),
    "GroupNorm ResNet": (lambda: networks.group_norm_resnet(CLASSES), 32),
}
QUICK_NETWORKS = {"MLP, 2 layers of 64": (lambda: networks.mlp(CLASSES, 64, 2), 4)}


def measure(network: Callable[[], nn.Module], rows: int, label: str) -> Iterator[Memory]:
    """The third step of every contestant, all on one batch."""
    split, targets = long_tail_batch(rows, CLASSES, TAIL_FRACTION)
    images = torch.randn(rows, 3, 32, 32)
    for who, make in CONTESTANTS.items():
        model = network()
        weights = sum(p.nbytes for p in model.parameters())
        with LiveBytes(*model.parameters(), images, targets) as count:
            # Made inside: the authors' code has memory of its own from the beginning.
            step = make(model, sgd(model), SplitCrossEntropy(split))
            for _ in range(2):
                step(images, targets)
            count.peak = 0
            step(images, targets)
        yield Memory(label, who, weights, count.live, count.peak)


def summary(memory: Sequence[Memory]) -> list[str]:
    return [
        f"{m.size}: {m.contestant}: {m.peak_bytes / m.weight_bytes:.2f}n at the peak, "
        f"{m.kept_bytes / m.weight_bytes:.2f}n from step to step"
        for m in memory
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_memory", allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write everything")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args(argv)
    if args.json is None and not args.quick:
        args.json = Path(__file__).parent / "results" / "bench_memory.json"
    memory = [
        m
        for label, (network, rows) in (QUICK_NETWORKS if args.quick else NETWORKS).items()
        for m in measure(network, rows, f"{label}, {rows} rows")
    ]
    report = Report(
        "bench_memory",
        [],
        summary(memory),
        {"quick": args.quick, "environment": environment()},
        memory,
    )
    print("\n".join(report.summary))
    if args.json is not None:
        save(report, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

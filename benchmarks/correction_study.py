"""How well a sample's sharpness correction stands in for that of all rows, over a training.

    python -m benchmarks.correction_study [--seeds N] [--json FILE]

The correction is what the perturbation adds to the gradient, g_p - g_t. The digits are trained by
the joint plan (released preset, statistics updated once); in some epochs, on the first batches that
have tail rows, the corrections of samples are compared with the joint plan's on the same weights:
the cosine, and the ratio of the norms.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median, stdev

import torch
from torch import Tensor

from imbsam_fast import frozen_batch_norm_statistics
from imbsam_fast.env import environment
from imbsam_fast.recipes.data.datasets import load
from imbsam_fast.recipes.settings.config import resolve
from imbsam_fast.recipes.settings.datasets import DATASETS
from imbsam_fast.recipes.train.methods import Trainer
from imbsam_fast.recipes.train.training import ImageTraining
from imbsam_fast.training.rows import Rows
from imbsam_fast.training.sampled import SampledPlan
from imbsam_fast.training.train_step import TrainStep

EPOCHS = (1, 10, 20, 30, 40, 50, 60)
BATCHES = 3  # of an epoch
SHARES = (0.5, 0.25, 0.125, 0.0625)
RHO = 0.05

Found = dict[str, list[tuple[float, float]]]  # sample -> cosines and ratios


class Corrections:
    """Of one network on one batch: the corrections of samples, as flat vectors.

    Passes run in `dtype` by autocast, in float32 without one.
    """

    def __init__(
        self, step: TrainStep, images: Tensor, targets: Tensor, dtype: torch.dtype | None = None
    ) -> None:
        self.step, self.images, self.targets = step, images, targets
        self.params = [p for p in step.model.parameters() if p.requires_grad]
        self.autocast = torch.autocast(images.device.type, dtype, enabled=dtype is not None)

    def of(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """g_p - g_t; see `gradients`."""
        g_t, g_p = self.gradients(first, second)
        return g_p - g_t

    def gradients(self, first: Tensor, second: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """g_t from the rows `first`, bool (N,), and g_p from `second` where those are others.

        Without some of the tail rows, the sample's loss counts as that of a batch of its size.
        """
        g_t = self.gradient(first)
        norm = flat(g_t).norm()
        if norm == 0:
            return flat(g_t), flat(g_t)
        start = [p.detach().clone() for p in self.params]
        with torch.no_grad():
            for p, g in zip(self.params, g_t):
                p.add_(g, alpha=float(RHO / norm))
        g_p = self.gradient(first if second is None else second)
        with torch.no_grad():
            for p, saved in zip(self.params, start):
                p.copy_(saved)
        return flat(g_t), flat(g_p)

    def gradient(self, rows: Tensor) -> Sequence[Tensor]:
        """Of the tail loss of `rows`, bool (N,)."""
        tail = self.step.criterion.split.tail_mask(self.targets)
        whole = bool((rows | ~tail).all())
        b = len(rows) if whole else int(rows.sum())
        with frozen_batch_norm_statistics(self.step.model), self.autocast:
            logits = self.step.model(self.images[rows])
            loss = self.step.criterion(logits, self.targets[rows], batch_size=b)
            return torch.autograd.grad(loss.tail, self.params)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def samples(step: TrainStep, targets: Tensor, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A name, and the rows of the first and of the second pass."""
    tail = step.criterion.split.tail_mask(targets)
    rows = Rows(~tail, tail, int((~tail).sum()), int(tail.sum()), len(tail))
    for share in SHARES:
        plan = SampledPlan(share, seed)
        drawn = plan.drawn(rows)
        plan.number += 1
        yield f"{share:g}", drawn, drawn
        yield f"{share:g}, head rows drawn anew", drawn, plan.drawn(rows)
        some = torch.zeros_like(tail)
        generator = torch.Generator().manual_seed(seed)
        some[torch.randperm(len(tail), generator=generator)[: int(drawn.sum())]] = True
        yield f"{share:g}, tail rows by chance", some, some


def measure(seed: int) -> Found:
    given = {"dataset": "digits", "optimizer": "imbsam", "preset": "released", "seed": seed}
    config = resolve(DATASETS["digits"], {**given, "plan": "joint", "batch_norm": "once"})
    training = ImageTraining(config, load(config))
    optimizer, step = training.trainer
    assert isinstance(step, TrainStep)
    found: Found = {}
    seen: dict[int, int] = {}

    def measured(images: Tensor, targets: Tensor):
        epoch = training.epoch + 1
        has_tail = bool(step.criterion.split.tail_mask(targets).any())
        if epoch in EPOCHS and has_tail and seen.get(epoch, 0) < BATCHES:
            seen[epoch] = seen.get(epoch, 0) + 1
            corrections = Corrections(step, images, targets)
            joint = corrections.of(torch.ones_like(targets, dtype=torch.bool))
            for name, first, second in samples(step, targets, 1000 * epoch + seen[epoch]):
                c = corrections.of(first, second)
                cosine = torch.nn.functional.cosine_similarity(c, joint, dim=0)
                found.setdefault(name, []).append((float(cosine), float(c.norm() / joint.norm())))
        return step(images, targets)

    training.trainer = Trainer(optimizer, measured)
    for _ in range(training.epochs):
        training.train_epoch(lambda training: None)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.correction_study")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: Found = {}
    for seed in range(args.seeds):
        for name, pairs in measure(seed).items():
            found.setdefault(name, []).extend(pairs)
    rows = {}
    for name, pairs in found.items():
        (cosine, spread), ratio = _over([c for c, _ in pairs]), median(r for _, r in pairs)
        rows[name] = {"cosine": cosine, "std": spread, "norm_ratio": ratio, "batches": len(pairs)}
        print(f"{name}: cosine {cosine:.2f} ± {spread:.2f}, norm {ratio:.2f} times the joint one's")
    if args.json is not None:
        settings = {"epochs": EPOCHS, "batches": BATCHES, "seeds": args.seeds, "rho": RHO}
        content = {"settings": settings, "rows": rows, "environment": environment()}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def _over(values: list[float]) -> tuple[float, float]:
    return mean(values), stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    sys.exit(main())

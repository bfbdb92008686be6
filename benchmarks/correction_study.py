"""How well other corrections stand in for the one of all rows of the batch, over a training.

    python -m benchmarks.correction_study [--seeds N] [--epochs N ...] [--json FILE]

The correction is what the perturbation adds to the gradient, g_p - g_t. The digits are trained by
the joint plan under both presets (statistics updated once); in some epochs, on the first batches
that have tail rows, the joint plan's correction is compared with those of samples on the same
weights, and with its own on the batch before: the cosine, and the ratio of the norms.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies import Study, write
from benchmarks.tables import Lines, Table, markdown
from imbsam_fast import frozen_batch_norm_statistics
from imbsam_fast.recipes.data.datasets import load
from imbsam_fast.recipes.settings.config import resolve
from imbsam_fast.recipes.settings.datasets import DATASETS
from imbsam_fast.recipes.train.methods import Trainer
from imbsam_fast.recipes.train.training import ImageTraining
from imbsam_fast.training.rows import Rows
from imbsam_fast.training.sampled import SampledPlan
from imbsam_fast.training.train_step import TrainStep

EPOCHS = (1, 10, 20, 40, 60)
BATCHES = 3  # of an epoch
SHARES = (0.5, 0.25, 0.125, 0.0625)
VARIED = 0.25  # of the samples that are drawn otherwise
BEFORE = "all rows of the batch before"  # at the weights before, as a step that used it again would
RHO = 0.05

Found = dict[str, dict[int, list[tuple[float, float]]]]  # name -> epoch -> cosines and ratios


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


def samples(
    step: TrainStep, targets: Tensor, seed: int
) -> Iterator[tuple[str, list[tuple[Tensor, Tensor]]]]:
    """A name, and of each sample the rows of the first and of the second pass.

    Of several samples the correction is the mean, each with an epsilon of its own (m-sharpness).
    """
    tail = step.criterion.split.tail_mask(targets)
    rows = Rows(~tail, tail, int((~tail).sum()), int(tail.sum()), len(tail))

    def drawn(share: float, number: int = 0) -> Tensor:
        plan = SampledPlan(share, seed)
        plan.number = number
        return plan.drawn(rows)

    for share in SHARES:
        yield f"sampled {share:g}", [(drawn(share),) * 2]
    yield f"sampled {VARIED:g}, other head rows", [(drawn(VARIED), drawn(VARIED, 1))]
    some = torch.zeros_like(tail)
    order = torch.randperm(len(tail), generator=torch.Generator().manual_seed(seed))
    some[order[: round(VARIED * len(tail))]] = True
    yield f"{VARIED:g} of all rows by chance", [(some, some)]
    several = [drawn(VARIED / 4, number) for number in range(4)]
    yield f"four of sampled {VARIED / 4:g}", [(rows, rows) for rows in several]


def compared(correction: Tensor, joint: Tensor) -> tuple[float, float]:
    """The cosine of the two, and the ratio of their norms."""
    cosine = torch.nn.functional.cosine_similarity(correction, joint, dim=0)
    return float(cosine), float(correction.norm() / joint.norm())


def measure(preset: str, seed: int, epochs: Sequence[int] = EPOCHS) -> Found:
    """Of one training of as many epochs as the last of `epochs` says."""
    given = {"dataset": "digits", "optimizer": "imbsam", "preset": preset, "seed": seed}
    given |= {"plan": "joint", "batch_norm": "once", "epochs": epochs[-1]}
    config = resolve(DATASETS["digits"], given)
    training = ImageTraining(config, load(config))
    optimizer, step = training.trainer
    assert isinstance(step, TrainStep)
    found: Found = {}
    seen: dict[int, list[Tensor]] = {}  # by epoch: corrections of all rows

    def measured(images: Tensor, targets: Tensor):
        epoch = training.epoch + 1
        so_far = seen.setdefault(epoch, [])
        has_tail = bool(step.criterion.split.tail_mask(targets).any())
        if epoch in epochs and has_tail and len(so_far) < BATCHES:
            corrections = Corrections(step, images, targets)
            joint = corrections.of(torch.ones_like(targets, dtype=torch.bool))
            others = {
                name: torch.stack([corrections.of(*rows) for rows in drawn]).mean(0)
                for name, drawn in samples(step, targets, 1000 * epoch + len(so_far))
            }
            if so_far:
                others[BEFORE] = so_far[-1]
            so_far.append(joint)
            for name, correction in others.items():
                by_epoch = found.setdefault(name, {})
                by_epoch.setdefault(epoch, []).append(compared(correction, joint))
        return step(images, targets)

    training.trainer = Trainer(optimizer, measured)
    for _ in range(training.epochs):
        training.train_epoch(lambda training: None)
    return found


def table(study: Study) -> Lines:
    """The cosine with the correction of all rows, and in parentheses the ratio of the norms."""
    epochs = [str(epoch) for epoch in study.settings["epochs"]]
    rows = [
        (f"{row['preset']}: {row['name']}",
         *(f"{e['cosine']:.2f} ± {e['std']:.2f} ({e['norm_ratio']:.2f})"
           for e in (row["epochs"][epoch] for epoch in epochs)))
        for row in study.rows
    ]  # fmt: skip
    return markdown(("cosine (norm)", *(f"epoch {epoch}" for epoch in epochs)), rows)


TABLES = {"corrections": Table(("studies/correction",), table)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.correction_study")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--epochs", type=int, nargs="+", default=EPOCHS, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for preset in ("released", "paper"):
        found: Found = {}
        for seed in range(args.seeds):
            for name, by_epoch in measure(preset, seed, args.epochs).items():
                for epoch, pairs in by_epoch.items():
                    found.setdefault(name, {}).setdefault(epoch, []).extend(pairs)
        for name, by_epoch in found.items():
            rows.append({"preset": preset, "name": name, "epochs": {}})
            for epoch, pairs in sorted(by_epoch.items()):
                cosines = [cosine for cosine, _ in pairs]
                rows[-1]["epochs"][str(epoch)] = {
                    "cosine": mean(cosines),
                    "std": stdev(cosines) if len(cosines) > 1 else 0.0,
                    "norm_ratio": median(ratio for _, ratio in pairs),
                    "batches": len(pairs),
                }
    settings = {"epochs": args.epochs, "batches": BATCHES, "seeds": args.seeds, "rho": RHO}
    print("\n".join(table(Study("correction_study", settings, rows, {}))))
    if args.json is not None:
        write(args.json, settings, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

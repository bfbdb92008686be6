"""What bfloat16 leaves of the sharpness correction, on trained networks.

    python -m benchmarks.bfloat16_study RUN... --data-dir DATA [--batches N] [--json FILE]

The correction is what the perturbation adds to the tail's gradient, g_p - g_t. Autocast rounds the
weights of a pass to 8 bits, and with them an epsilon that is small beside the weights. On batches
with tail rows of each finished run of `imbsam-fast train`, with its network's final weights, both
gradients and the correction under bfloat16 autocast are compared with those in float32: the cosine,
and the ratio of the norms, in the median over batches. benchmarks/results/studies/bfloat16.json is
read by `python -m benchmarks.report`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.correction_study import RHO, Corrections
from benchmarks.studies import Study, write
from benchmarks.tables import Lines, Table, markdown
from imbsam_fast.recipes.data.datasets import load
from imbsam_fast.recipes.run_directory import RunDirectory
from imbsam_fast.recipes.settings.config import RunConfig
from imbsam_fast.recipes.train.training import ImageTraining
from imbsam_fast.training.train_step import TrainStep

NAMES = ("g_t", "g_p", "g_p - g_t")
Compared = dict[str, tuple[float, float]]  # vector -> cosine and ratio of norms


def compared(step: TrainStep, images: Tensor, targets: Tensor) -> Compared:
    """bfloat16 beside float32, on one batch."""
    vectors: list[dict[str, Tensor]] = []
    everybody = torch.ones(len(targets), dtype=torch.bool)
    for dtype in (None, torch.bfloat16):
        g_t, g_p = Corrections(step, images, targets, dtype).gradients(everybody)
        vectors.append(dict(zip(NAMES, (g_t, g_p, g_p - g_t))))
    exact, rounded = vectors
    return {
        name: (
            float(torch.nn.functional.cosine_similarity(rounded[name], v, dim=0)),
            float(rounded[name].norm() / v.norm()),
        )
        for name, v in exact.items()
    }


def measure(path: Path, data_dir: Path, batches: int) -> list[Compared]:
    """Of the first batches with tail rows of an epoch that the run has not seen."""
    run = RunDirectory.open(path)
    config = RunConfig.from_dict({**run.config, "data_dir": str(data_dir)})
    # The preset's own split and weights, whatever the run was trained with.
    config = replace(config, optimizer="imbsam", plan="joint", device="cpu", cuda_graph=False)
    training = ImageTraining(config, load(config))
    training.model.load_state_dict(run.load_checkpoint()["model"])
    training.epoch = config.epochs
    step = training.trainer.step
    assert isinstance(step, TrainStep)
    split = step.criterion.split
    with_tail = ((x, y) for x, y in training.batches() if split.tail_mask(y).any())
    return [compared(step, x, y) for x, y in islice(with_tail, batches)]


def table(study: Study) -> Lines:
    """bfloat16 beside float32: the cosine, and the ratio of the norms."""
    rows = [
        (f"{row['dataset']}, {row['images']} images, {row['model']}: {row['label']}",
         str(row["batches"]),
         *(f"{row[name]['cosine']:.3f} ({row[name]['norm_ratio']:.3f})" for name in NAMES))
        for row in study.rows
    ]  # fmt: skip
    return markdown(("cosine (norm)", "batches", *NAMES), rows)


TABLES = {"bfloat16": Table(("studies/bfloat16",), table)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bfloat16_study")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--batches", type=int, default=10, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for path in args.runs:
        run = RunDirectory.open(path)
        found = measure(path, args.data_dir, args.batches)
        row = {key: run.config[key] for key in ("label", "seed", "dataset", "images", "model")}
        row["batches"] = len(found)
        print(f"{row['label']}, seed {row['seed']}, {row['model']}, {len(found)} batches")
        for name in NAMES:
            cosine, ratio = (median(batch[name][i] for batch in found) for i in (0, 1))
            row[name] = {"cosine": cosine, "norm_ratio": ratio}
            print(f"  {name}: cosine {cosine:.3f}, norm {ratio:.3f} times that in float32")
        rows.append(row)
    if args.json is not None:
        write(args.json, {"rho": RHO}, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

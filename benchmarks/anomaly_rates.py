"""Learning rates for the anomaly detectors, compared on training rows alone.

    python -m benchmarks.anomaly_rates --data-dir DIR [--sets NAME ...] --json FILE

The paper does not say its learning rate. For every rate, set and protocol the detector is trained
with plain SGD on 70 % of the training rows, and its AUCROC taken on the other 30 %; no test row of
the split is seen. One rate a detector is then used for all optimizers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from sklearn.model_selection import train_test_split

from imbsam_fast.env import environment
from imbsam_fast.recipes.anomaly import data, paper
from imbsam_fast.recipes.anomaly.detector import TrainingDivergedError
from imbsam_fast.recipes.anomaly.detectors import DETECTORS
from imbsam_fast.recipes.anomaly.metrics import detection_metrics
from imbsam_fast.recipes.anomaly.settings import DETECTOR_NAMES, PROTOCOLS

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


class Trial(NamedTuple):
    detector: str
    lr: float
    set: str
    protocol: str
    train_loss: float | None  # mean over the last epoch; None: diverged
    aucroc: float  # in %, on the rows held out of training; 50 where training diverged


def trials(data_set: data.DataSet, protocol: str, seed: int) -> Iterator[Trial]:
    parts = data.part(data_set, protocol, paper.RATIO, seed)
    X, y = data_set.X[parts.train_rows], data_set.y[parts.train_rows]
    fitted, held = train_test_split(
        range(len(y)), test_size=data.TEST_SHARE, stratify=y, random_state=seed
    )
    labels = parts.train_labels[fitted]
    start = {"encoder": DETECTORS["deepsad"](random_state=seed).pretrain(X[fitted])}
    for name, lr in itertools.product(DETECTORS, RATES):
        detector = DETECTORS[name](optimizer="sgd", lr=lr, random_state=seed)
        try:
            detector.fit(X[fitted], labels, **(start if name == "deepsad" else {}))
            area = detection_metrics(y[held], detector.decision_function(X[held]))["aucroc"]
            yield Trial(name, lr, data_set.name, protocol, detector.train_loss_, area)
        except TrainingDivergedError:
            yield Trial(name, lr, data_set.name, protocol, None, 50.0)


def means(found: Sequence[Trial]) -> dict[tuple[str, str], dict[tuple[str, float], float]]:
    """(family, protocol) -> (detector, rate) -> mean AUCROC over the sets"""
    areas: dict[tuple[str, str], dict[tuple[str, float], list[float]]] = {}
    for t in found:
        of_family = areas.setdefault((paper.family(t.set), t.protocol), {})
        of_family.setdefault((t.detector, t.lr), []).append(t.aucroc)
    return {key: {k: fmean(a) for k, a in own.items()} for key, own in areas.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.anomaly_rates", allow_abbrev=False)
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--sets", nargs="+", metavar="NAME")
    parser.add_argument("--protocol", nargs="+", choices=PROTOCOLS, default=PROTOCOLS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = []
    for path, protocol in itertools.product(data.find(args.data_dir, args.sets), args.protocol):
        found += trials(data.read(path), protocol, args.seed)
        print(path.stem, protocol, flush=True)
    content = {
        "environment": environment(),
        "seed": args.seed,
        "fields": list(Trial._fields),
        "trials": found,
    }
    args.json.write_text(json.dumps(content) + "\n")
    for (family, protocol), areas in means(found).items():
        for (name, lr), area in areas.items():
            print(f"{family}, {protocol}, {DETECTOR_NAMES[name]}, lr {lr:g}: AUCROC {area:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command line of the image recipes: `imbsam-fast train cifar10-lt ...` and the like."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from ..train_step import PLANS
from .arguments import UsageError, number
from .config import FULL, OPTIMIZERS, SMALL, RunConfig, resolve
from .datasets import DATASETS
from .image_data import DataError
from .image_models import MODELS
from .models import NORMS
from .presets import PRESETS
from .run_directory import RunDirectoryError
from .train_images import train_all
from .training import TrainingDivergedError

# What says which runs to make, beside the settings of each.
_NOT_SETTINGS = ("recipe", "optimizer", "seed", "seeds", "save", "resume")


def add_recipes(recipes: Any) -> None:
    """A parser for each data set. Options have no default here: config.py resolves them."""
    for name, dataset in DATASETS.items():
        parser = recipes.add_parser(
            name,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            help=dataset.help,
            description=f"Train on {dataset.help}: one run for each optimizer and seed, and a "
            "table of the test accuracy after the last epoch.",
        )
        _add_run_arguments(parser)
        _add_data_arguments(parser)
        _add_method_arguments(parser)
        _add_training_arguments(parser)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("runs").add_argument
    add("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS),
        help="one or more of %(choices)s; all by default. sgd-weighted is the control: SGD with "
        "the tail weight of the released code")  # fmt: skip
    add("--seeds", type=number(1, kind=int), default=1, metavar="N",
        help="how many seeds; a seed decides the weights, the order and the augmentation, alike "
        "for every optimizer (default: %(default)s)")  # fmt: skip
    add("--seed", type=number(0, kind=int), default=0, metavar="S",
        help="the first seed (default: %(default)s)")  # fmt: skip
    add("--save", type=Path, required=True, metavar="DIR",
        help="a directory for each run is made in it")  # fmt: skip
    add(
        "--resume",
        action="store_true",
        default=False,
        help="go on with the runs in --save from their checkpoints; complete ones are kept",
    )


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--data-dir", required=True, metavar="DIR", help="where the data set is")
    add("--images", choices=(SMALL, FULL),
        help="small: a tenth of the images")  # fmt: skip
    add("--imbalance-factor", type=number(1), metavar="IF",
        help="images of the largest class over those of the smallest")  # fmt: skip


def _add_method_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("method").add_argument
    add("--preset", choices=tuple(PRESETS),
        help="paper (default): eta 100, inclusive, tail weight 1, BatchNorm statistics updated "
        "once a step; released: 20, exclusive, 2, twice")  # fmt: skip
    add("--eta", type=number(0), metavar="N", help="a tail class has at most N images")
    add("--rho", type=number(0), metavar="R", help="radius of the perturbation")
    add("--tail-weight", type=number(0, above=True), metavar="W",
        help="factor on the loss of tail classes, for imbsam, sam and sgd-weighted")  # fmt: skip
    add("--gamma", type=number(0), metavar="G", help="exponent of Focal-SAM")
    add("--lam", type=number(0, 1), metavar="L", help="lambda of Focal-SAM")
    add("--plan", choices=PLANS, help="passes of SAM, ImbSAM and Focal-SAM (default: auto)")


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    count = number(1, kind=int)
    add("--model", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    add("--norm", choices=NORMS, help="normalisation of the residual networks (default: batch)")
    add("--epochs", type=count, metavar="N")
    add("--warmup-epochs", type=number(0, kind=int), metavar="N", help="linear warm-up")
    add("--batch-size", type=count, metavar="N")
    add("--lr", type=number(0, above=True), metavar="X")
    add("--momentum", type=number(0, 1), metavar="X")
    add("--weight-decay", type=number(0), metavar="X")
    add("--amp", choices=("off", "bf16", "fp16"), help="automatic mixed precision (default: off)")
    add("--channels-last", action=argparse.BooleanOptionalAction,
        help="memory format of images and weights (default: yes)")  # fmt: skip
    add("--threads", type=count, metavar="N", help="CPU threads of torch (default: 1)")
    add("--device", choices=("cpu", "cuda"), help="default: cpu")


def main(args: argparse.Namespace) -> int:
    given = {k: v for k, v in vars(args).items() if k not in _NOT_SETTINGS}
    try:
        train_all(configurations(args, given), args.save, args.resume, Console())
    except (DataError, RunDirectoryError, TrainingDivergedError, ValueError) as error:
        raise UsageError(str(error)) from error
    return 0


def configurations(args: argparse.Namespace, given: dict[str, Any]) -> list[RunConfig]:
    """One for each run, seeds in the outer order so that every optimizer has a first one early."""
    defaults = DATASETS[args.recipe]
    return [
        resolve(defaults, {**given, "dataset": args.recipe, "optimizer": name, "seed": seed})
        for seed in range(args.seed, args.seed + args.seeds)
        for name in OPTIMIZERS
        if name in args.optimizer
    ]

"""The command line of `imbsam-fast train`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from ..train_step import PLANS
from . import image_options
from .arguments import UsageError, check_device, number, require_extras
from .digits import ETA, MAX_PER_CLASS, NUM_CLASSES, TEST_PER_CLASS
from .models import NORMS
from .presets import PRESETS
from .train_digits import run
from .training import OPTIMIZERS, Settings, TrainingDivergedError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipes = parser.add_subparsers(dest="recipe", required=True, metavar="RECIPE")
    digits = recipes.add_parser(
        "digits",
        allow_abbrev=False,
        help="scikit-learn's handwritten digits, made long-tailed",
        description=f"Train on scikit-learn's handwritten digits, made long-tailed: "
        f"{TEST_PER_CLASS} test images a class are set aside first, then class k keeps "
        f"int({MAX_PER_CLASS} IF^(-k/{NUM_CLASSES - 1})) of the rest. Shows the test accuracy "
        "after the last epoch for Many, Medium and Few classes.",
    )
    _add_method_arguments(digits)
    _add_training_arguments(digits)
    image_options.add_recipes(recipes)


def _add_method_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    group.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS,
                       help="one or more of %(choices)s; all by default")  # fmt: skip
    group.add_argument("--preset", choices=tuple(PRESETS), default="paper",
                       help="paper: a class of exactly ETA images is tail, tail weight 1, "
                       "BatchNorm statistics updated once a step; released (the authors' code): "
                       "it is head, tail weight 2, twice (default: %(default)s)")  # fmt: skip
    group.add_argument("--eta", type=number(0), metavar="N",
                       help="a tail class has at most N images, with the released preset fewer "
                       f"than N (default: {ETA:g}, the Few classes; the paper's 100 would leave "
                       "one head class here)")  # fmt: skip
    group.add_argument("--rho", type=number(0), default=0.05, metavar="R",
                       help="radius of the perturbation (default: %(default)s)")  # fmt: skip
    group.add_argument("--tail-weight", type=number(0, above=True), metavar="W",
                       help="factor on the tail part of the loss; other than 1 adds the row of "
                       "SGD with the same class weights (default: the preset's)")  # fmt: skip
    group.add_argument("--plan", choices=PLANS, default="auto",
                       help="passes of SAM and ImbSAM; auto takes split where rows of a batch do "
                       "not influence each other (default: %(default)s)")  # fmt: skip


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    count = number(1, kind=int)
    add("--epochs", type=count, default=60, metavar="N", help="default: %(default)s")
    add("--batch-size", type=count, default=32, metavar="N", help="default: %(default)s")
    add("--lr", type=number(0, above=True), default=0.05, metavar="X",
        help="learning rate of the first step, falling to 0 by a cosine (default: "
        "%(default)s)")  # fmt: skip
    add("--momentum", type=number(0, 1), default=0.9, metavar="X", help="default: %(default)s")
    add("--weight-decay", type=number(0), default=5e-4, metavar="X", help="default: %(default)s")
    add("--norm", choices=NORMS, default="batch",
        help="BatchNorm (joint plan) or GroupNorm (split plan) (default: %(default)s)")  # fmt: skip
    add("--seeds", type=count, default=3, metavar="N",
        help="seeds 0 .. N-1 decide the images, the weights and the order of batches, alike for "
        "every optimizer (default: %(default)s)")  # fmt: skip
    add("--imbalance-factor", type=number(1, MAX_PER_CLASS), default=100.0, metavar="IF",
        help="images of the largest class over those of the smallest (default: 100)")  # fmt: skip
    add("--threads", type=count, default=1, metavar="N",
        help="CPU threads of torch; more than one rarely helps images of 8x8 (default: "
        "%(default)s)")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--save", type=Path, metavar="DIR",
        help="write results.json, per_class_accuracy.png and, for every row of the table, the "
        "checkpoint of seed 0 after the last epoch")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Run a recipe: 0, or 2 with one line on stderr where the user has to change something."""
    try:
        if args.recipe != "digits":
            return image_options.main(args)
        require_extras(["sklearn"] + (["matplotlib"] if args.save else []))
        settings = _settings(args)
        if args.save is not None:
            _prepare_directory(args.save)
        return _run(settings, args)
    except UsageError as error:
        print(f"imbsam-fast train {args.recipe}: error: {error}", file=sys.stderr)
        return 2


def _run(settings: Settings, args: argparse.Namespace) -> int:
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        run(settings, args.save, Console())
    except TrainingDivergedError as error:
        raise UsageError(str(error)) from error
    finally:
        torch.set_num_threads(threads)
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    check_device(args.device)
    preset = PRESETS[args.preset]
    return Settings(
        optimizers=tuple(o for o in OPTIMIZERS if o in args.optimizer),
        preset=preset.name,
        eta=ETA if args.eta is None else args.eta,
        inclusive=preset.inclusive,
        tail_weight=preset.tail_weight if args.tail_weight is None else args.tail_weight,
        batch_norm=preset.batch_norm,
        rho=args.rho,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        norm=args.norm,
        plan=args.plan,
        seeds=args.seeds,
        imbalance_factor=args.imbalance_factor,
        device=args.device,
    )


def _prepare_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise UsageError(f"--save is '{directory}', expected a new or an empty directory")
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"--save is '{directory}', expected a directory that can be written: {error.strerror}"
        ) from error

"""The command line of `imbsam-fast anomaly`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ...training.choices import EXACT_PLANS
from ..settings.arguments import MAX_THREADS, UsageError, number, require_extras
from .settings import BASE_NAMES, DETECTOR_NAMES, OPTIMIZERS, PROTOCOLS, Settings, methods


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on `parser`."""
    parser.description = (
        "Train DeepSAD and DevNet on ADBench's .npz sets with SGD, SAM and ImbSAM, labelled "
        "anomalies being the tail class, and show AUCROC and AUCPR beside the paper's Table 4."
    )
    _add_grid_arguments(parser)
    _add_method_arguments(parser)
    _add_run_arguments(parser)


def _add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("grid; every combination is trained")
    add = group.add_argument
    add("--data-dir", type=Path, required=True, metavar="DIR",
        help="directory of .npz sets: X (rows, features) and y (1 = anomaly)")  # fmt: skip
    add("--sets", nargs="+", metavar="NAME", help="names without .npz; all of DIR by default")
    add("--detector", nargs="+", choices=tuple(DETECTOR_NAMES), default=tuple(DETECTOR_NAMES),
        help="one or more of %(choices)s; both by default")  # fmt: skip
    add("--optimizer", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS,
        help="one or more of %(choices)s; all by default")  # fmt: skip
    add("--protocol", nargs="+", choices=PROTOCOLS, default=("clean",),
        help="clean: no test row is a training row; adbench: sets under 1,000 rows are drawn "
        "with replacement before the split, as ADBench does (default: clean)")  # fmt: skip
    add("--ratio", nargs="+", type=number(0, 1, above=True), default=(0.25,), metavar="R",
        help="share of the training anomalies that are labelled; the paper has 0.01, 0.05, 0.1, "
        "0.25 and 0.5 (default: 0.25)")  # fmt: skip
    add("--seeds", type=number(1, kind=int), default=5, metavar="N",
        help="seeds 0 .. N-1 decide the split, the labels, the weights and the order of batches, "
        "alike for every optimizer (default: %(default)s)")  # fmt: skip


def _add_method_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    add = group.add_argument
    count, positive = number(1, kind=int), number(0, above=True)
    add("--base", choices=tuple(BASE_NAMES), default="sgd",
        help="what updates the weights; sgd has momentum (default: %(default)s)")  # fmt: skip
    add("--lr", type=positive, metavar="X",
        help="learning rate, constant (default: 0.001, but 0.0001 for DeepSAD with Adam or "
        "RMSprop)")  # fmt: skip
    add("--momentum", type=number(0, 1), default=0.9, metavar="X", help="default: %(default)s")
    add("--rho", type=number(0), default=0.05, metavar="R",
        help="radius of the perturbation (default: %(default)s)")  # fmt: skip
    add("--tail-weight", nargs="+", type=positive, default=(), metavar="W",
        help="besides 1: ImbSAM with the anomalies' loss times W, and the base with the same, "
        "which is the control")  # fmt: skip
    add("--plan", choices=EXACT_PLANS, default="auto",
        help="passes of SAM and ImbSAM; auto: joint, for DeepSAD since it has BatchNorm, for "
        "DevNet since it is small (default: %(default)s)")  # fmt: skip
    add("--epochs", type=count, default=50, metavar="N", help="default: %(default)s")
    add("--batch-size", type=number(2, kind=int), default=128, metavar="N",
        help="default: %(default)s")  # fmt: skip
    add("--pretrain-epochs", type=number(0, kind=int), default=100, metavar="N",
        help="of DeepSAD's autoencoder (default: %(default)s)")  # fmt: skip


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--jobs", type=number(1, kind=int), default=1, metavar="N",
        help="processes that train at the same time (default: %(default)s)")  # fmt: skip
    add("--threads", type=number(1, MAX_THREADS, kind=int), default=1, metavar="N",
        help="CPU threads of torch in each; more than one rarely helps networks so small "
        "(default: %(default)s)")  # fmt: skip
    add("--save", type=Path, metavar="DIR",
        help="write fits.jsonl, results.json and aucpr_<protocol>.png; the same command, or one "
        "with a larger grid, goes on where an interrupted one stopped")  # fmt: skip
    add("--keep-detectors", action="store_true",
        help="with --save: write every fitted detector to DIR/detectors")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Run a grid: 0, or 2 with one line on stderr where the user has to change something."""
    try:
        require_extras(["numpy", "sklearn"] + (["matplotlib"] if args.save else []))
        return _run(args)
    except UsageError as error:
        print(f"imbsam-fast anomaly: error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    import torch  # not to be waited for by --help
    from rich.console import Console

    from . import data
    from .detector import TrainingDivergedError
    from .run import Plan, run
    from .store import StoreError

    if args.keep_detectors and args.save is None:
        raise UsageError("--keep-detectors is given without --save, expected a directory for them")
    if args.plan == "split" and "deepsad" in args.detector:
        raise UsageError(
            "--plan is 'split', expected auto or joint for DeepSAD, which has BatchNorm"
        )
    settings = Settings(
        args.base, args.lr, args.momentum, args.rho, args.plan, args.epochs,
        args.batch_size, args.pretrain_epochs,
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        paths = data.find(args.data_dir, args.sets)
        for path in paths:  # a bad file should not be found after an hour
            data.read(path)
        plan = Plan(
            paths=paths,
            detectors=tuple(dict.fromkeys(args.detector)),
            methods=tuple(dict.fromkeys(methods(args.optimizer, args.tail_weight))),
            protocols=tuple(dict.fromkeys(args.protocol)),
            ratios=tuple(dict.fromkeys(args.ratio)),
            seeds=args.seeds,
            processes=args.jobs,
            threads=args.threads,
            save=args.save,
            keep_detectors=args.keep_detectors,
        )
        run(plan, settings, Console())
    except StoreError as error:
        raise UsageError(f"--save is '{args.save}', {error}") from error
    except (data.DataError, TrainingDivergedError) as error:
        raise UsageError(str(error)) from error
    finally:
        torch.set_num_threads(threads)
    return 0

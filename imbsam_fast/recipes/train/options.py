"""The command line of `imbsam-fast train`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...training.choices import BATCH_NORM_UPDATES, PLANS
from ..models.names import MODELS, NORMS, check_norm, needs_torchvision
from ..settings.arguments import (
    MAX_SEED,
    MAX_THREADS,
    UsageError,
    check_device,
    number,
    require_extras,
)
from ..settings.config import (
    DISTRIBUTED,
    LOSSES,
    METHOD_DEFAULTS,
    METHODS,
    OPTIMIZERS,
    Dataset,
    RunConfig,
    resolve,
    unread,
)
from ..settings.config_file import read_arguments
from ..settings.datasets import DATASETS
from ..settings.presets import PRESETS

# What says which runs to make, beside the settings of each.
_NOT_SETTINGS = ("recipe", "parser", "config", "optimizer", "seed", "seeds", "save", "resume",
                 "dry_run")  # fmt: skip
_DEFAULTS: dict[str, Any] = {"optimizer": OPTIMIZERS, "seed": 0, "seeds": 1, "resume": False,
                             "dry_run": False}  # fmt: skip

_count = number(1, kind=int)
_count_or_none = number(0, kind=int)
_not_negative = number(0)
_positive = number(0, above=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A parser for each data set. Options have no default here: config.py resolves them."""
    recipes = parser.add_subparsers(dest="recipe", required=True, metavar="RECIPE")
    for name, dataset in DATASETS.items():
        parser = recipes.add_parser(
            name,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            help=dataset.help,
            description=f"Train on {dataset.help}: one run for each optimizer and seed, and a "
            "table of the test accuracy after the last epoch. Defaults are this data set's, with "
            "--method ce and --preset paper; others follow from those, see docs/recipes.md.",
        )
        parser.set_defaults(parser=parser)
        _add_run_arguments(parser)
        _add_data_arguments(parser, dataset)
        _add_method_arguments(parser)
        _add_stage_arguments(parser)
        _add_training_arguments(parser)
        _add_machine_arguments(parser)
        _add_defaults(parser, name, dataset)


def _add_defaults(parser: argparse.ArgumentParser, name: str, dataset: Dataset) -> None:
    """Say in the help of each option what it is without being given, by config.py."""
    given = {"dataset": name, "data_dir": "", "optimizer": "imbsam", "seed": 0}
    defaults = {**vars(resolve(dataset, given)), **_DEFAULTS}
    del defaults["data_dir"], defaults["optimizer"], defaults["dry_run"]
    for action in parser._actions:
        value = defaults.get(action.dest)
        if action.dest.startswith("stage2_"):
            value = ", ".join(f"{m} {METHOD_DEFAULTS[m][action.dest]:g}" for m in METHODS[1:])
        if value is None or "default:" in (action.help or ""):
            continue
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif isinstance(value, tuple):
            value = " ".join(map(str, value))
        text = f"{value:g}" if isinstance(value, float) else str(value)
        action.help = f"{action.help} (default: {text})" if action.help else f"default: {text}"


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("runs").add_argument
    add("--config", type=Path, metavar="FILE",
        help="settings from a YAML or TOML file, named as the options; options on the command "
        "line come before it. A run's own config.yaml is such a file")  # fmt: skip
    add("--optimizer", nargs="+", choices=OPTIMIZERS,
        help="one or more of %(choices)s; all by default. sgd-weighted is the control: SGD with "
        "the tail weight of the released code")  # fmt: skip
    add("--seeds", type=number(1, 10**6, kind=int), metavar="N",
        help="how many seeds; a seed decides the weights, the order and the augmentation, alike "
        "for every optimizer")  # fmt: skip
    add("--seed", type=number(0, MAX_SEED, kind=int), metavar="S",
        help="the first seed")  # fmt: skip
    add("--save", type=Path, metavar="DIR", help="a directory for each run is made in it")
    add("--dry-run", action="store_true",
        help="take a few steps of each run with the workers and on the device asked for, say what "
        "all will take of time, memory, descriptors and disk, and write nothing")  # fmt: skip
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="go on with the runs in --save from their checkpoints; complete ones are kept",
    )


def _add_data_arguments(parser: argparse.ArgumentParser, dataset: Dataset) -> None:
    add = parser.add_argument_group("data").add_argument
    if dataset.files:
        add("--data-dir", metavar="DIR", help="where the data set is; nothing is downloaded")
    add("--group-borders", nargs=2, type=_count, metavar=("LOW", "HIGH"),
        help="Few classes have fewer than LOW training images, Many more than HIGH")  # fmt: skip
    if dataset.lists:
        _add_list_arguments(add)
        return
    if not dataset.long_tailed:
        return
    if dataset.variants:
        add("--images", choices=tuple(dataset.variants), help="small: a tenth of the images")
    add("--largest-class", type=_count, metavar="N",
        help="training images of class 0; class k has N IF^(-k / (K - 1))")  # fmt: skip
    add("--imbalance-factor", type=number(1), metavar="IF",
        help="images of the largest class over those of the smallest")  # fmt: skip
    add("--validation", type=_count_or_none, metavar="N",
        help="images of each class, beside those of training, for choosing best.pt; without them "
        "only the last epoch is tested")  # fmt: skip


def _add_list_arguments(add: Any) -> None:
    formats = "`path label` lines or iNaturalist's JSON"
    add("--train-list", metavar="FILE", help=f"{formats}; relative to --data-dir")
    add("--test-list", metavar="FILE", help="the same for testing")
    add(
        "--validation-list",
        metavar="FILE",
        help="the same for choosing best.pt; without it only the last epoch is tested",
    )
    add(
        "--image-root",
        metavar="DIR",
        help="what the paths in the lists are relative to (default: --data-dir)",
    )
    add("--image-size", type=_count, metavar="N", help="pixels")
    add("--color-jitter", type=_not_negative, metavar="X", help="strength, 0 for none")
    add(
        "--skip-corrupt",
        action=argparse.BooleanOptionalAction,
        help="leave images that cannot be read out, and count them, instead of stopping",
    )
    add(
        "--check-files",
        action=argparse.BooleanOptionalAction,
        help="look for every image before the first epoch, not only for those of the tests and a "
        "thousand of the others",
    )
    add("--workers", type=_count_or_none, metavar="N",
        help="processes that read images")  # fmt: skip


def _add_method_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("method").add_argument
    add(
        "--method",
        choices=METHODS,
        help="cross-entropy, weight balancing or learnable weight scaling",
    )
    add("--loss", choices=tuple(LOSSES),
        help="cross-entropy, or of logits plus tau times the logarithm of the classes' shares "
        "(logit adjustment), which with tau = 1 is the balanced softmax")  # fmt: skip
    add("--tau", type=_not_negative, metavar="T", help="strength of --loss logit-adjust")
    add("--preset", choices=tuple(PRESETS),
        help="paper: eta 100, inclusive, tail weight 1, BatchNorm statistics updated "
        "once a step; released (the authors' code): 20, exclusive, 2, twice")  # fmt: skip
    add("--eta", type=_not_negative, metavar="N",
        help="a tail class has at most N images")  # fmt: skip
    add("--inclusive", action=argparse.BooleanOptionalAction,
        help="whether a class of exactly N images is tail")  # fmt: skip
    add("--rho", type=_not_negative, metavar="R",
        help="radius of the perturbation")  # fmt: skip
    add("--tail-weight", type=_positive, metavar="W",
        help="factor on the loss of tail classes, for imbsam, sam and sgd-weighted (default: "
        "1, but 2 for sgd-weighted)")  # fmt: skip
    add("--batch-norm", choices=BATCH_NORM_UPDATES,
        help="how often a step updates the running statistics")  # fmt: skip
    add("--gamma", type=_not_negative, metavar="G", help="exponent of Focal-SAM")
    add("--lam", type=number(0, 1), metavar="L", help="lambda of Focal-SAM")
    add("--plan", choices=PLANS, help="passes of SAM, ImbSAM and Focal-SAM")
    add("--sample", type=number(0, 1, above=True), metavar="S",
        help="share of a batch in the sample of --plan sampled")  # fmt: skip
    add("--perturb-every", type=_count, metavar="K",
        help="perturb in every K-th step with tail rows alone")  # fmt: skip


def _add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("second stage of WB and LWS").add_argument
    add("--stage1", metavar="RUN", help="start from the network of this run of --method ce")
    add("--stage2-epochs", type=_count_or_none, metavar="N")
    add("--stage2-lr", type=_not_negative, metavar="X")
    add("--stage2-weight-decay", type=_not_negative, metavar="X")
    add("--stage2-batch-size", type=_count_or_none, metavar="N")
    add("--beta", type=number(0, 1), metavar="B",
        help="of WB's class-balanced loss")  # fmt: skip


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--model", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    add("--norm", choices=NORMS,
        help="normalisation of convnet and the residual networks")  # fmt: skip
    add("--epochs", type=_count, metavar="N")
    add("--warmup-epochs", type=_count_or_none, metavar="N", help="linear")
    add("--batch-size", type=_count, metavar="N", help="images a step, of all ranks together")
    add("--lr", type=_positive, metavar="X", help="falls to 0 by a cosine")
    add("--momentum", type=number(0, 1), metavar="X")
    add("--weight-decay", type=_not_negative, metavar="X")


def _add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("cpu", "cuda"), help="where to train")
    add("--threads", type=number(1, MAX_THREADS, kind=int), metavar="N",
        help="CPU threads of torch")  # fmt: skip
    add("--amp", choices=("off", "bf16", "fp16"), help="automatic mixed precision")
    add("--channels-last", action=argparse.BooleanOptionalAction,
        help="memory format of images and weights")  # fmt: skip
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the network")
    add("--cuda-graph", action=argparse.BooleanOptionalAction,
        help="whole steps as CUDA graphs, on one GPU")  # fmt: skip
    add("--distributed", choices=DISTRIBUTED, help="under torchrun: data parallel, or sharded too")
    add("--tensorboard", action=argparse.BooleanOptionalAction,
        help="scalars of every epoch in each run's directory")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Make the runs: 0, or 130 where a signal ended them, each with its checkpoint.

    2, with one line on stderr, where the user has to change something.
    """
    try:
        return _main(args)
    except UsageError as error:
        print(f"imbsam-fast train {args.recipe}: error: {error}", file=sys.stderr)
        return 2


def _main(args: argparse.Namespace) -> int:
    # With torch, which --help and a mistyped option need not wait for.
    from .command import run_command

    require_extras([DATASETS[args.recipe].package, "yaml"])
    typed = frozenset(vars(args))
    args = _with_file(args)
    configs = configurations(args)
    for option in unread_options(args, typed):
        which = " ".join(args.optimizer)
        print(f"imbsam-fast train {args.recipe}: {option} changes nothing with {which}",
              file=sys.stderr)  # fmt: skip
    if needs_torchvision(configs[0].model):
        require_extras(["torchvision"])
    if configs[0].tensorboard:
        require_extras(["tensorboard"], "tensorboard")
    check_device(configs[0].device)
    return run_command(configs, None if args.dry_run else args.save, args.resume)


def _with_file(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with those of --config under them, and the defaults under both."""
    known = vars(args)
    from_file = {}
    if "config" in known:
        from_file = read_arguments(
            known["config"], args.parser, {**known, "dataset": known["recipe"]}
        )
    merged = {**_DEFAULTS, **from_file, **known}
    needed = ["data_dir"] if DATASETS[known["recipe"]].files else []
    if not merged["dry_run"]:
        needed.append("save")
    for name in needed:
        if name not in merged:
            raise UsageError(f"--{name.replace('_', '-')} is missing, expected a directory")
    return argparse.Namespace(**merged)


def configurations(args: argparse.Namespace) -> list[RunConfig]:
    """One for each run, seeds in the outer order so that every optimizer has a first one early."""
    dataset, given = DATASETS[args.recipe], _settings(args)
    try:
        configs = [
            resolve(dataset, {**given, "optimizer": name, "seed": seed})
            for seed in range(args.seed, args.seed + args.seeds)
            for name in _optimizers(args)
        ]
        check_norm(configs[0].model, configs[0].norm)
        return configs
    except ValueError as error:
        raise UsageError(str(error)) from error


def unread_options(args: argparse.Namespace, typed: Iterable[str]) -> list[str]:
    """Of the arguments that were `typed`, the options that no run reads; a file may have some."""
    names = unread(DATASETS[args.recipe], _settings(args), _optimizers(args), typed)
    return [f"--{name.replace('_', '-')}" for name in names]


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    given = {k: v for k, v in vars(args).items() if k not in _NOT_SETTINGS}
    return {**given, "dataset": args.recipe, "seed": args.seed}


def _optimizers(args: argparse.Namespace) -> list[str]:
    return [name for name in OPTIMIZERS if name in args.optimizer]

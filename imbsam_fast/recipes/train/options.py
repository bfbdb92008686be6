"""The command line of `imbsam-fast train`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ...training.choices import BATCH_NORM_UPDATES, PLANS
from ..models.names import MODELS, NORMS, check_norm
from ..settings.arguments import UsageError, check_device, number, require_extras
from ..settings.config import DISTRIBUTED, METHODS, OPTIMIZERS, Dataset, RunConfig, resolve
from ..settings.config_file import read_arguments
from ..settings.datasets import DATASETS
from ..settings.presets import PRESETS

# What says which runs to make, beside the settings of each.
_NOT_SETTINGS = ("recipe", "parser", "config", "optimizer", "seed", "seeds", "save", "resume")
_DEFAULTS: dict[str, Any] = {"optimizer": OPTIMIZERS, "seed": 0, "seeds": 1, "resume": False}

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
            "table of the test accuracy after the last epoch. Defaults are the data set's "
            "settings; docs/recipes.md lists them.",
        )
        parser.set_defaults(parser=parser)
        _add_run_arguments(parser)
        _add_data_arguments(parser, dataset)
        _add_method_arguments(parser)
        _add_stage_arguments(parser)
        _add_training_arguments(parser)
        _add_machine_arguments(parser)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("runs").add_argument
    add("--config", type=Path, metavar="FILE",
        help="settings from a YAML or TOML file, named as the options; options on the command "
        "line come before it. A run's own config.yaml is such a file")  # fmt: skip
    add("--optimizer", nargs="+", choices=OPTIMIZERS,
        help="one or more of %(choices)s; all by default. sgd-weighted is the control: SGD with "
        "the tail weight of the released code")  # fmt: skip
    add("--seeds", type=_count, metavar="N",
        help="how many seeds; a seed decides the weights, the order and the augmentation, alike "
        "for every optimizer (default: 1)")  # fmt: skip
    add("--seed", type=_count_or_none, metavar="S", help="the first seed (default: 0)")
    add("--save", type=Path, metavar="DIR", help="a directory for each run is made in it")
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
    if dataset.variants:
        add("--images", choices=tuple(dataset.variants), help="small: a tenth of the images")
    add("--largest-class", type=_count, metavar="N",
        help="training images of class 0; class k has N IF^(-k / (K - 1))")  # fmt: skip
    add("--imbalance-factor", type=number(1), metavar="IF",
        help="images of the largest class over those of the smallest (default: 100)")  # fmt: skip
    add("--validation", type=_count_or_none, metavar="N",
        help="images of each class, beside those of training, for choosing best.pt; without them "
        "only the last epoch is tested (default: 0)")  # fmt: skip


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
    add("--image-size", type=_count, metavar="N", help="pixels (default: 224)")
    add("--color-jitter", type=_not_negative, metavar="X", help="strength, 0 for none")
    add(
        "--skip-corrupt",
        action=argparse.BooleanOptionalAction,
        help="leave images that cannot be read out, and count them, instead of stopping",
    )
    add("--workers", type=_count_or_none, metavar="N",
        help="processes that read images (default: 4)")  # fmt: skip


def _add_method_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("method").add_argument
    add(
        "--method",
        choices=METHODS,
        help="cross-entropy (default), weight balancing or learnable weight scaling",
    )
    add("--preset", choices=tuple(PRESETS),
        help="paper (default): eta 100, inclusive, tail weight 1, BatchNorm statistics updated "
        "once a step; released (the authors' code): 20, exclusive, 2, twice")  # fmt: skip
    add("--eta", type=_not_negative, metavar="N",
        help="a tail class has at most N images (default: the data set's own, see "
        "docs/recipes.md, else the preset's)")  # fmt: skip
    add("--inclusive", action=argparse.BooleanOptionalAction,
        help="whether a class of exactly N images is tail")  # fmt: skip
    add("--rho", type=_not_negative, metavar="R",
        help="radius of the perturbation (default: 0.05)")  # fmt: skip
    add("--tail-weight", type=_positive, metavar="W",
        help="factor on the loss of tail classes, for imbsam, sam and sgd-weighted")  # fmt: skip
    add("--batch-norm", choices=BATCH_NORM_UPDATES,
        help="how often a step updates the running statistics")  # fmt: skip
    add("--gamma", type=_not_negative, metavar="G", help="exponent of Focal-SAM (default: 1)")
    add("--lam", type=number(0, 1), metavar="L", help="lambda of Focal-SAM (default: 0.8)")
    add("--plan", choices=PLANS, help="passes of SAM, ImbSAM and Focal-SAM (default: auto)")
    add("--sample", type=number(0, 1, above=True), metavar="S",
        help="share of a batch in the sample of --plan sampled (default: 0.25)")  # fmt: skip
    add("--perturb-every", type=_count, metavar="K",
        help="perturb in every K-th step with tail rows alone (default: 1)")  # fmt: skip
    add("--lagged", action=argparse.BooleanOptionalAction,
        help="experimental: perturb along the previous step's tail gradient")  # fmt: skip


def _add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("second stage of WB and LWS").add_argument
    add("--stage1", metavar="RUN", help="start from the network of this run of --method ce")
    add("--stage2-epochs", type=_count_or_none, metavar="N")
    add("--stage2-lr", type=_not_negative, metavar="X")
    add("--stage2-weight-decay", type=_not_negative, metavar="X")
    add("--stage2-batch-size", type=_count_or_none, metavar="N")
    add("--beta", type=number(0, 1), metavar="B",
        help="of WB's class-balanced loss (default: 0.9999)")  # fmt: skip


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add("--model", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    add("--norm", choices=NORMS,
        help="normalisation of convnet and the residual networks (default: batch)")  # fmt: skip
    add("--epochs", type=_count, metavar="N")
    add("--warmup-epochs", type=_count_or_none, metavar="N", help="linear (default: 0)")
    add("--batch-size", type=_count, metavar="N", help="images a step, of all ranks together")
    add("--lr", type=_positive, metavar="X", help="falls to 0 by a cosine")
    add("--momentum", type=number(0, 1), metavar="X")
    add("--weight-decay", type=_not_negative, metavar="X")


def _add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cpu")
    add("--threads", type=_count, metavar="N", help="CPU threads of torch (default: 1)")
    add("--amp", choices=("off", "bf16", "fp16"), help="automatic mixed precision (default: off)")
    add("--channels-last", action=argparse.BooleanOptionalAction,
        help="memory format of images and weights (default: yes)")  # fmt: skip
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the network")
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
    args = _with_file(args)
    configs = configurations(args)
    if configs[0].tensorboard:
        require_extras(["tensorboard"], "tensorboard")
    check_device(configs[0].device)
    return run_command(configs, args.save, args.resume)


def _with_file(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with those of --config under them, and the defaults under both."""
    known = vars(args)
    from_file = {}
    if "config" in known:
        from_file = read_arguments(
            known["config"], args.parser, {**known, "dataset": known["recipe"]}
        )
    merged = {**_DEFAULTS, **from_file, **known}
    for name in ("data_dir", "save") if DATASETS[known["recipe"]].files else ("save",):
        if name not in merged:
            raise UsageError(f"--{name.replace('_', '-')} is missing, expected a directory")
    return argparse.Namespace(**merged)


def configurations(args: argparse.Namespace) -> list[RunConfig]:
    """One for each run, seeds in the outer order so that every optimizer has a first one early."""
    given = {k: v for k, v in vars(args).items() if k not in _NOT_SETTINGS}
    dataset = DATASETS[args.recipe]
    try:
        configs = [
            resolve(dataset, {**given, "dataset": args.recipe, "optimizer": name, "seed": seed})
            for seed in range(args.seed, args.seed + args.seeds)
            for name in OPTIMIZERS
            if name in args.optimizer
        ]
        check_norm(configs[0].model, configs[0].norm)
        return configs
    except ValueError as error:
        raise UsageError(str(error)) from error

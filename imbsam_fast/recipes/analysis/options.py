"""The command line of `imbsam-fast analyze`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..settings.arguments import (
    MAX_SEED,
    MAX_THREADS,
    UsageError,
    check_device,
    number,
    require_extras,
)
from .settings import ANALYSES, BATCH_NORM_MODES, KINDS, AnalysisSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on `parser`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="run directories of `imbsam-fast train`, or directories that hold "
                        "some")  # fmt: skip
    add = parser.add_argument_group("what").add_argument
    add("--classes", default="few", metavar="CLASSES",
        help="classes of the Hessian: few, medium, many, head, tail, or a list such as 0,3,7-9 "
        "(default: %(default)s)")  # fmt: skip
    add("--only", choices=KINDS, help="one of the analyses; both by default")
    add("--checkpoint", choices=("last", "best"), default="last", help="default: %(default)s")
    add("--eta", type=number(0), metavar="N",
        help="border of head and tail classes (default: the run's own)")  # fmt: skip
    add("--data-dir", metavar="DIR", help="where the data set is (default: the run's own)")
    add("--out", type=Path, metavar="DIR",
        help=f"for a single run: where to write (default: {ANALYSES}/ in the run's directory, "
        "where `imbsam-fast report` looks)")  # fmt: skip
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """One option for each field of AnalysisSettings, and the device."""
    group = parser.add_argument_group("how")
    count = number(1, kind=int)

    def add(name: str, help: str, **kind) -> None:
        default = getattr(AnalysisSettings, name)
        group.add_argument(f"--{name.replace('_', '-')}", default=default,
                           help=f"{help} (default: %(default)s)", **kind)  # fmt: skip

    add("rows", "at most so many images of the Hessian, and of each part of the landscape, drawn "
        "at random; 0 for all", type=number(0, kind=int), metavar="N")  # fmt: skip
    add("seed", "of everything random", type=number(0, MAX_SEED, kind=int), metavar="S")
    add("batch_size", "images at a time", type=count, metavar="N")
    add("batch_norm", "BatchNorm normalises by its running statistics, as in testing, or by each "
        "batch, as in training", choices=BATCH_NORM_MODES)  # fmt: skip
    add("lanczos_steps", "products of the Hessian for the largest eigenvalue, at most, and for "
        "each probe of the density; each takes a copy of the weights", type=count,
        metavar="N")  # fmt: skip
    add("tolerance", "relative error at which the largest eigenvalue is good enough",
        type=number(0, above=True), metavar="X")  # fmt: skip
    add("trace_probes", "random vectors for the trace", type=count, metavar="N")
    add("density_probes", "random vectors for the density", type=count, metavar="N")
    add("radius", "of the landscape, in filter norms", type=number(0, above=True), metavar="X")
    add("line_points", "of the landscape along one direction, odd", type=count, metavar="N")
    add("plane_points", "of the landscape along each of two, odd", type=count, metavar="N")
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                       help="default: %(default)s")  # fmt: skip
    group.add_argument("--threads", type=number(1, MAX_THREADS, kind=int), metavar="N",
                       help="CPU threads of torch (default: as many as torch takes)")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """0; 2 with one line on stderr where the user has to change something."""
    try:
        require_extras(["yaml", "matplotlib"])
        check_device(args.device)
        _check(args)
        # With torch, which --help and a mistyped option need not wait for.
        from .command import run_command

        run_command(args)
    except (UsageError, ValueError) as error:
        print(f"imbsam-fast analyze: error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("line_points", "plane_points"):
        points = getattr(args, name)
        if points < 3 or points % 2 == 0:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is {points}, expected an odd number from 3")

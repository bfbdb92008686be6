"""The command line of `imbsam-fast analyze`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

import torch
from rich.console import Console

from .analysis import AnalysisSettings
from .analyze_runs import KINDS, Request, analyse, print_analysis, progress
from .arguments import UsageError, number, require_extras
from .compare import ANALYSES
from .image_data import DataError
from .modes import BATCH_NORM_MODES
from .run_directory import RunDirectoryError, find_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    add("seed", "of everything random", type=number(0, kind=int), metavar="S")
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
    group.add_argument("--threads", type=count, default=torch.get_num_threads(), metavar="N",
                       help="CPU threads of torch (default: %(default)s)")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """0; 2 with one line on stderr where the user has to change something."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(args.threads)
        _run(args)
    except (UsageError, RunDirectoryError, DataError, ValueError) as error:
        print(f"imbsam-fast analyze: error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    return 0


def _run(args: argparse.Namespace) -> None:
    require_extras(["yaml", "matplotlib", "torchvision"])
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device is 'cuda', expected 'cpu': torch finds no CUDA device here")
    for name in ("line_points", "plane_points"):
        points = getattr(args, name)
        if points < 3 or points % 2 == 0:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is {points}, expected an odd number from 3")
    directories = find_runs(args.runs)
    if args.out is not None and len(directories) > 1:
        raise UsageError(f"--out is '{args.out}', expected with one run only, not with several")
    settings = AnalysisSettings(**{f.name: getattr(args, f.name) for f in fields(AnalysisSettings)})
    request = Request(
        classes=args.classes,
        kinds=KINDS if args.only is None else (args.only,),
        checkpoint=args.checkpoint,
        device=args.device,
        eta=args.eta,
        data_dir=args.data_dir,
    )
    console = Console()
    for directory in directories:
        out = directory.path / ANALYSES if args.out is None else args.out
        with progress(console, str(directory.config.get("label", directory.path.name))) as ticked:
            written = analyse(directory, request, settings, out, ticked)
        for file in written:
            print_analysis(console, file)

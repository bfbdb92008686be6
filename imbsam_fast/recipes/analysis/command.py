"""`imbsam-fast analyze`: one run directory after the other."""

from __future__ import annotations

import argparse
from dataclasses import fields

import torch
from rich.console import Console

from ..data.images import DataError
from ..models.names import needs_torchvision
from ..run_directory import RunDirectory, RunDirectoryError, find_runs
from ..settings.arguments import UsageError, require_extras
from ..settings.datasets import DATASETS
from .runs import Request, analyse, print_analysis, progress
from .settings import ANALYSES, KINDS, AnalysisSettings


def run_command(args: argparse.Namespace) -> None:
    """Raises UsageError or ValueError for what the user has to change."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(args.threads or threads)
        _run(args)
    except (RunDirectoryError, DataError) as error:
        raise UsageError(str(error)) from error
    finally:
        torch.set_num_threads(threads)


def _run(args: argparse.Namespace) -> None:
    directories = find_runs(args.runs)
    require_extras(sorted({package for run in directories for package in _packages(run)}))
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


def _packages(run: RunDirectory) -> list[str]:
    """What reads the data of `run` and makes its network; what is wrong with them is said later."""
    dataset = DATASETS.get(str(run.config.get("dataset")))
    packages = [dataset.package] if dataset else []
    if needs_torchvision(str(run.config.get("model"))):
        packages.append("torchvision")
    return packages

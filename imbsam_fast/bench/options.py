"""The command line of `imbsam-fast bench`, and of the scripts in benchmarks/."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on `parser`."""
    parser.add_argument("--rounds", type=int, default=15, help="rounds to take the median over")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write everything")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes and two rounds, to see in less than a minute that it runs",
    )
    parser.add_argument(
        "--return-memory",
        action="store_true",
        help="let the C library return freed memory to the system, and count what that costs",
    )


def main(args: argparse.Namespace) -> int:
    """Run `imbsam-fast bench`; returns its exit status."""
    from .command import default_run

    return default_run(args)

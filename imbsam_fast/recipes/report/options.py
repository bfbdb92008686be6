"""The command line of `imbsam-fast report`."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on `parser`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="run directories of `imbsam-fast train`, or directories that hold "
                        "some at any depth; runs that differ in their seed alone, or in what they "
                        "do not read, are one row, mean ± standard deviation")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="also write one HTML page with the pictures, which needs no "
                        "network")  # fmt: skip
    parser.add_argument("--tables", type=Path, metavar="DIR",
                        help="also write every table as CSV and JSON, of every class and, where "
                        "it is recorded, of what was taken for what too")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """0; 1 where no run could be compared; 2 with one line on stderr for a bad argument."""
    needed = {"yaml": "pyyaml"}
    if args.out is not None:
        needed |= {"jinja2": "jinja2", "matplotlib": "matplotlib"}
    missing = [name for module, name in needed.items() if find_spec(module) is None]
    if missing:
        return _refuse(f"{' and '.join(missing)} not installed; pip install 'imbsam-fast[recipes]'")
    if args.out is not None and not args.out.parent.is_dir():
        return _refuse(f"--out is '{args.out}', expected a file in a directory that exists")
    # With torch, which --help and a mistyped option need not wait for.
    from rich.console import Console

    from .comparison import compare
    from .terminal import print_comparison

    comparison = compare(args.runs)
    console = Console()
    print_comparison(console, comparison)
    if args.tables is not None:
        from .tables import write_tables

        try:
            written = write_tables(comparison, args.tables)
        except OSError as error:
            return _refuse(
                f"--tables is '{args.tables}', which cannot be written: {error.strerror}"
            )
        console.print(f"Tables: {len(written)} files in {args.tables}", highlight=False)
    if args.out is not None and comparison.sections:
        from .page import page

        try:
            args.out.write_text(page(comparison), encoding="utf-8")
        except OSError as error:
            return _refuse(f"--out is '{args.out}', which cannot be written: {error.strerror}")
        console.print(f"Page: {args.out}", highlight=False)
    return 0 if comparison.sections else 1


def _refuse(message: str) -> int:
    print(f"imbsam-fast report: error: {message}", file=sys.stderr)
    return 2

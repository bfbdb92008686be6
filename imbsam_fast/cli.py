"""The command `imbsam-fast` and its subcommands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple


class Command(NamedTuple):
    """A subcommand; `module` has add_arguments(parser) and main(args) -> exit status."""

    help: str
    module: str


COMMANDS = {
    "train": Command(
        "train a recipe with SGD, SAM and ImbSAM", "imbsam_fast.recipes.train.options"
    ),
    "anomaly": Command(
        "train anomaly detectors with SGD, SAM and ImbSAM", "imbsam_fast.recipes.anomaly.options"
    ),
    "pack": Command(
        "pack images so that they train from memory", "imbsam_fast.recipes.data.options"
    ),
    "report": Command("compare training runs", "imbsam_fast.recipes.report.options"),
    "analyze": Command(
        "sharpness and loss landscape of a trained run", "imbsam_fast.recipes.analysis.options"
    ),
    "bench": Command("measure the operations and whole steps", "imbsam_fast.bench.options"),
    "info": Command("show versions, devices and which backend runs", "imbsam_fast.info"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: sys.argv) and return its exit status.

    Raises SystemExit as argparse does: 0 after --help and --version, 2 for a bad argument.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser, run = _parser(argv)
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # argparse would show the usage of the whole command
        getattr(args, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if run is None:
        parser.print_help()
        return 0
    try:
        return run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser(
    argv: Sequence[str],
) -> tuple[argparse.ArgumentParser, Callable[[argparse.Namespace], int] | None]:
    """The parser, and the `main` of the subcommand in `argv`, whose module alone is imported."""
    parser = argparse.ArgumentParser(
        "imbsam-fast",
        description="Class-aware sharpness-aware minimisation for long-tailed data.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=version("imbsam-fast"))
    subparsers = parser.add_subparsers(metavar="COMMAND")
    chosen = next((a for a in argv if not a.startswith("-")), None)
    run = None
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=command.help, description=f"{command.help}.", allow_abbrev=False
        )
        subparser.set_defaults(parser=subparser)
        if name == chosen:
            module: Any = import_module(command.module)
            module.add_arguments(subparser)
            run = module.main
    return parser, run


if __name__ == "__main__":
    sys.exit(main())

"""What the scripts of benchmarks/ share: options of `imbsam-fast bench`, a place for results."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .command import run
from .measure import Group
from .options import add_arguments
from .report import Report


def run_script(
    script: str,
    groups: Callable[[bool], Iterator[Group]],
    summary: Callable[[Report], list[str]],
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """`run` for one of benchmarks/: full-size results go to results/<script>.json beside it."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    args = parser.parse_args()
    path = Path(script)
    if args.json is None and not args.quick:
        args.json = path.parent / "results" / f"{path.stem}.json"
    return run(args, path.stem, groups, summary, clock)

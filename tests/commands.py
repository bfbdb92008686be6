"""The command line, called as a user would."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from imbsam_fast import cli


def refused(argv: Sequence[str], capsys) -> str:
    """The last line on stderr of a command line that must end with exit status 2."""
    try:
        status = cli.main(argv)
    except SystemExit as end:
        status = end.code
    assert status == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err.splitlines()[-1]


def forked(run: Callable[[], int], output: Path) -> int:
    """How a process ends that does this: its exit status, or the negative number of a signal.

    What it prints is in a file. A fork need not import torch, as a new process does.
    """
    child = os.fork()
    if child == 0:
        status = 1
        with output.open("w") as file, redirect_stdout(file), redirect_stderr(file):
            try:
                status = run()
            except BaseException:
                traceback.print_exc()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

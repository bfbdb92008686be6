"""The command line, called as a user would."""

from __future__ import annotations

from collections.abc import Sequence

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

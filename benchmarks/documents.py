"""Documents whose tables are made from recorded results, between markers.

A table goes between `<!-- WORD: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from benchmarks.tables import Lines

# The new text of a document, and a complaint for each table that cannot be made.
Filled = tuple[str, list[str]]


class UnfilledError(Exception):
    """A table cannot be made; the text says why."""


def marker(word: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {word}: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def fill(text: str, word: str, names: Collection[str], lines: Callable[[str], Lines]) -> Filled:
    """The document with its tables made anew; `lines` makes one by its name or raises
    UnfilledError, which leaves the old one.
    """
    complaints = []

    def make(found: re.Match[str]) -> str:
        start, name, _, end = found.groups()
        try:
            if name not in names:
                raise UnfilledError(f"no table is called {name}; there are {', '.join(names)}")
            return start + "\n".join(["", *lines(name), ""]) + "\n" + end
        except UnfilledError as error:
            complaints.append(str(error))
            return found[0]

    new = marker(word).sub(make, text)
    markers = text.count(f"<!-- {word}:")
    if markers != len(marker(word).findall(text)):
        complaints.append(f"{markers} markers start, expected an end for each")
    return new, complaints


def update(
    paths: Iterable[Path], root: Path, filled: Callable[[str], Filled], check: bool, command: str
) -> bool:
    """Write the documents, or with `check` only compare; False where anything is to complain of,
    which is printed.
    """
    fine = True
    for path in paths:
        text = path.read_text()
        new, complaints = filled(text)
        if check and new != text:
            complaints.append(f"differs from the results; run {command}")
        if not check:
            path.write_text(new)
        for complaint in complaints:
            print(f"{path.relative_to(root)}: {complaint}")
        fine = fine and not complaints
    return fine

"""The files of a grid: fits.jsonl grows by a line a fit, so that an interrupted grid goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...env import environment
from .settings import Fit, Settings

GRID_FILE = "grid.json"
FITS_FILE = "fits.jsonl"


class StoreError(Exception):
    """A directory that a grid cannot go on in; the text says why."""


class Store:
    """The fits made so far, in a directory or, without one, only in memory.

    grid.json holds the settings, which must stay the same, and the environment of every run;
    each fit carries the number of its run. Raises StoreError for a directory with other content.
    """

    def __init__(self, directory: Path | None, settings: Settings) -> None:
        self.directory = directory
        self.fits: list[Fit] = []
        self.runs: list[dict[str, Any]] = []
        if directory is not None:
            self._open(directory, settings)
        self.runs.append(environment())
        if directory is not None:
            content = {"settings": asdict(settings), "runs": self.runs}
            (directory / GRID_FILE).write_text(json.dumps(content, indent=1) + "\n")

    @property
    def run(self) -> int:
        """The number of this run."""
        return len(self.runs) - 1

    def add(self, fits: Iterable[Fit]) -> None:
        """Take in fits and, before anything else happens, write them."""
        fits = list(fits)
        if self.directory is not None:
            lines = "".join(json.dumps(fit) + "\n" for fit in fits)
            with (self.directory / FITS_FILE).open("a") as file:
                file.write(lines)
        self.fits += fits

    def _open(self, directory: Path, settings: Settings) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in directory.iterdir()}
        except OSError as error:
            raise StoreError(f"expected a directory that can be written: {error}") from error
        if not names:
            (directory / FITS_FILE).write_text(json.dumps(Fit._fields) + "\n")
            return
        if not {GRID_FILE, FITS_FILE} <= names:
            raise StoreError(f"expected a new directory or one with {GRID_FILE} and {FITS_FILE}")
        grid = _parsed(directory / GRID_FILE, (directory / GRID_FILE).read_text())
        for name, value in asdict(settings).items():
            if grid["settings"].get(name) != value:
                raise StoreError(
                    f"its fits have {name} {grid['settings'].get(name)!r}, expected {value!r} as "
                    "asked for now"
                )
        self.runs = grid["runs"]
        self.fits = _read_fits(directory / FITS_FILE)


def _read_fits(path: Path) -> list[Fit]:
    """The fits of whole lines; what an interruption left of a last one is cut off."""
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    fields, *fits = [_parsed(path, line) for line in whole.splitlines()] or [None]
    if fields != list(Fit._fields) or any(len(fit) != len(fields) for fit in fits):
        raise StoreError(f"{path} does not hold fits of this version")
    return [Fit(*fit) for fit in fits]


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise StoreError(f"{path} is damaged: {error}") from error

"""What a training run leaves behind: one directory a run, written here and read back here.

    config.yaml    every setting of the run, resolved, so that `imbsam-fast train` can repeat it:
                   dataset, method (ce, wb, lws), optimizer (sgd, sgd-weighted, sam, imbsam,
                   focal-sam), preset, eta, rho, tail_weight, plan, model, epochs, lr, seed, ...
                   Beside them `format` (1) and `label`, the run's name in tables; runs that
                   differ in `seed` alone share it.
    log.jsonl      one line of JSON an epoch: epoch (from 1), seconds, lr (at its end), loss, head,
                   tail (means over the epoch's images, before each step), train_accuracy (%, of
                   the training-mode outputs), images_per_second; with a validation set also
                   `validation`, a group dictionary as below.
    last.pt        the newest checkpoint: model, optimizer, scheduler, grad_scaler, position, random
                   states, config. Weights alone: `torch.load(..., weights_only=True)["model"]`.
    best.pt        the same after the epoch that was best on the validation set; without one there
                   is no such file.
    .holder        while a process trains the run: which one, for the message to another that would
    result.json    written when the run is complete:
                     class_counts    [training images of class 0, 1, ...]
                     class_names     [name of class 0, 1, ...] or null
                     tail_classes    [classes whose sharpness is minimised]
                     group_borders   [20, 100]: few < 20 <= medium <= 100 < many
                     train_accuracy, train_loss   those of the last epoch's log line
                     last            {"epoch": ..., "plain": GROUPS, "flip": GROUPS}, test accuracy
                                     of last.pt
                     best            the same of best.pt, or null; chosen on the validation set
                     seconds         wall time of training, interruptions left out
                     peak_bytes      the most that was allocated on the GPU while training, rank
                                     0's and since the last resume; null on a CPU
                     skipped_images  how many corrupt images were left out, 0 unless asked for
                     environment     imbsam_fast.env.environment()

GROUPS is {"per_class": [...], "many": x, "medium": x, "few": x, "all": x}, in %, null for a group
without classes; all is the mean of the per-class accuracies. "flip" averages the logits of an
image and of its mirror image, where that shows the same (digits: "flip" is "plain"). Those of a
result with at most 100 classes have "confusion" too, a text a class: of its test images "0:48 7:2",
48 taken for class 0 and 2 for class 7. Results of older versions lack it.

Every file is replaced as a whole (temporary file, fsync, os.replace), so that a reader sees
the old one or the new one; log.jsonl alone grows line by line, and a half-written last line is
not read.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

FORMAT = 1
CONFIG_FILE = "config.yaml"
LOG_FILE = "log.jsonl"
LAST_FILE = "last.pt"
BEST_FILE = "best.pt"
RESULT_FILE = "result.json"
HOLDER_FILE = ".holder"
UNFINISHED = ".new"  # how the names of files end that are being written


class RunDirectoryError(Exception):
    """A run directory cannot be made, read or written; the text names the path and the reason."""


class RunDirectory:
    """A run's files. `create` starts a run, `open` reads one, complete or not."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> RunDirectory:
        """Make `path`, new or empty, and write `config`, of plain values, into it."""
        import yaml

        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(not file.name.endswith(UNFINISHED) for file in path.iterdir()):
                raise RunDirectoryError(
                    f"'{path}' is not empty, expected a new directory; --resume goes on with the "
                    "run in it"
                )
        except OSError as error:
            raise RunDirectoryError(f"cannot write into '{path}': {error.strerror}") from error
        config = {"format": FORMAT, **config}
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        _write(path / CONFIG_FILE, lambda file: file.write(text.encode()))
        return cls(path, config)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The run in `path`. Raises RunDirectoryError where there is none."""
        import yaml

        file = path / CONFIG_FILE
        try:
            config = yaml.safe_load(file.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = getattr(error, "strerror", None) or "damaged"
            raise RunDirectoryError(
                f"'{path}' is no run directory: cannot read {CONFIG_FILE} ({reason}); expected "
                "one that `imbsam-fast train` wrote"
            ) from error
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            found = config.get("format") if isinstance(config, dict) else config
            raise RunDirectoryError(f"'{file}' has format {found!r}, expected {FORMAT}")
        return cls(path, config)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside the block no other process can train here; RunDirectoryError where one does.

        The lock is the system's, on config.yaml. It ends with this process: what it forks does
        not have it. Where the file system or the system has none, nothing is locked.
        """
        path, holder = self.path / CONFIG_FILE, self.path / HOLDER_FILE
        try:
            file = path.open("r+b")
        except OSError as error:
            raise _unwritable(path, error) from error
        with file:
            if not _flock(file):
                raise RunDirectoryError(
                    f"'{self.path}' is in use: {_named(holder)} trains this run"
                )
            _locked_files.add(file)
            try:
                name = f"process {os.getpid()} on {socket.gethostname()}"
                _write(holder, lambda file: file.write(name.encode()))
                yield
            finally:
                _locked_files.discard(file)
                _unlock(file)
                with suppress(OSError):
                    holder.unlink()

    # ------------------------------------------------------------ log

    def append_log(self, row: dict[str, Any]) -> None:
        """Add the line of one epoch."""
        path = self.path / LOG_FILE
        try:
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise _unwritable(path, error) from error

    def log(self) -> list[dict[str, Any]]:
        """One dictionary an epoch, in order; empty before the first epoch ended."""
        file = self.path / LOG_FILE
        if not file.exists():
            return []
        lines = file.read_text().split("\n")
        # What follows the last newline was cut off while it was written.
        try:
            return [json.loads(line) for line in lines[:-1]]
        except json.JSONDecodeError as error:
            raise RunDirectoryError(f"'{file}' is damaged: {error}") from error

    def keep_log(self, epochs: int) -> None:
        """Drop the lines after epoch `epochs`: a resumed run writes them again."""
        kept = [row for row in self.log() if row["epoch"] <= epochs]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        _write(self.path / LOG_FILE, lambda file: file.write(text.encode()))

    # ------------------------------------------------------------ checkpoints

    def save_checkpoint(self, state: dict[str, Any], best: bool = False) -> None:
        """Replace last.pt, or best.pt, by `state`, of tensors and plain values."""
        _write(self._checkpoint(best), lambda file: torch.save(state, file))

    def has_checkpoint(self, best: bool = False) -> bool:
        """Whether there is a last checkpoint, or a best one."""
        return self._checkpoint(best).exists()

    def load_checkpoint(self, best: bool = False) -> dict[str, Any]:
        """last.pt, or best.pt, with every tensor on the CPU."""
        file = self._checkpoint(best)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise RunDirectoryError(
                f"'{file}' does not exist: the run wrote no such checkpoint"
            ) from error
        except Exception as error:  # torch.load raises many kinds for a damaged file
            raise RunDirectoryError(
                f"'{file}' is damaged or was not written by imbsam-fast: {error}"
            ) from error

    def _checkpoint(self, best: bool) -> Path:
        return self.path / (BEST_FILE if best else LAST_FILE)

    # ------------------------------------------------------------ result

    def write_result(self, result: dict[str, Any]) -> None:
        """Replace the result as a whole."""
        text = json.dumps({"format": FORMAT, **result}, indent=2) + "\n"
        _write(self.path / RESULT_FILE, lambda file: file.write(text.encode()))

    def result(self) -> dict[str, Any] | None:
        """The content of result.json; None while the run is not complete."""
        file = self.path / RESULT_FILE
        if not file.exists():
            return None
        try:
            return json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"'{file}' is damaged: {error}") from error


def find_runs(paths: Iterable[Path]) -> list[RunDirectory]:
    """The runs in `paths`: each is a run directory or holds some, at any depth; sorted, once each.

    Raises RunDirectoryError for a path without a run.
    """
    found: dict[Path, RunDirectory] = {}
    for path in paths:
        files = [path / CONFIG_FILE] if (path / CONFIG_FILE).exists() else path.rglob(CONFIG_FILE)
        runs = sorted(file.parent for file in files)
        if not runs:
            raise RunDirectoryError(
                f"'{path}' holds no run, expected a directory that `imbsam-fast train --save` wrote"
            )
        found.update({run.resolve(): RunDirectory.open(run) for run in runs})
    return list(found.values())


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replace `path` as a whole by what `write` puts into the file it is given.

    Raises RunDirectoryError, with `path` as it was, where the system does not take it.
    """
    # Always the same name: what a killed process left there, the next one replaces.
    temporary = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError of its own over the system's error.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise _unwritable(path, cause) from error
        raise
    finally:
        with suppress(OSError):  # most often it is not there any more
            temporary.unlink()


# Locked by this process. A process that it forks would keep the locks as long as it lives.
_locked_files: set[BinaryIO] = set()


def _forget_locks() -> None:
    for file in _locked_files:
        file.close()
    _locked_files.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def _flock(file: BinaryIO) -> bool:
    """Take the lock of `file`, which ends when it is closed; False where another has it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # systems and file systems without locks
        pass
    return True


def _unlock(file: BinaryIO) -> None:
    """Give the lock back, also where a process forked a moment ago still has the file open."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)


def _named(holder: Path) -> str:
    """The process that wrote `holder`, as far as it can be told."""
    try:
        return holder.read_text() or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


def _unwritable(path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(f"cannot write '{path}': {error.strerror or error}")

"""The live display of a run: epoch, head and tail loss, images per second, time left."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .training import ImageTraining

# Losses are read from the device no more often than this, in seconds.
INTERVAL = 0.5


class RunProgress:
    """A bar for one run, inside a `with` block; call it after every step."""

    def __init__(self, training: ImageTraining, console: Console) -> None:
        config = training.config
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[state]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,  # a file gets the outcome of each run
        )
        self._task = self._bar.add_task(
            f"{config.label()}, seed {config.seed}",
            total=training.epochs,
            state="",
        )
        self._shown = 0.0

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, training: ImageTraining) -> None:
        """Show how far `training` is, at most once in INTERVAL seconds."""
        now = time.monotonic()
        if now - self._shown < INTERVAL:
            return
        self._shown = now
        done = training.epoch + training.position / training.steps_per_epoch
        self._bar.update(self._task, completed=done, state=_state(training))


def _state(training: ImageTraining) -> str:
    means = training.sums.means()
    head, tail = ("-" if means[part] is None else f"{means[part]:.3f}" for part in ("head", "tail"))
    images = training.position * training.stage.config.batch_size
    return (
        f"epoch {training.epoch + 1}/{training.epochs}  head {head}  tail {tail}  "
        f"{images / max(training.sums.seconds, 1e-9):,.0f} images/s"
    )

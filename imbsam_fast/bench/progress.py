"""What a benchmark shows while it runs: which group, how far it is, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .measure import WARM_UP_ROUNDS, Group, Operation, Ticked

REFRESH = 0.25  # seconds between two drawings, at least
LINE = 20.0  # seconds between two lines, where no bar can be drawn


@contextmanager
def progress_of(group: Group, rounds: int, console: Console | None = None) -> Iterator[Ticked]:
    """Inside the block, whose runs call what it gives, stderr shows how far `group` is.

    Only between two runs is anything drawn: a thread that draws would take time from what is
    measured. In a terminal that is a bar, elsewhere a line when it begins and every LINE seconds.
    """
    console = console or Console(stderr=True)
    contestants = sum(len(operation.contestants) for operation in group)
    runs = (WARM_UP_ROUNDS + rounds) * contestants
    names = list(dict.fromkeys(operation.name for operation in group))
    about = f"{', '.join(names)}: {contestants} contestants, {rounds} rounds"
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, auto_refresh=False, transient=True,
    )  # fmt: skip
    drawn = time.monotonic()
    done = 0

    def ticked(operation: Operation) -> None:
        nonlocal drawn, done
        done += 1
        bar.update(task, completed=done, description=operation.name)
        now = time.monotonic()
        if console.is_terminal and now - drawn >= REFRESH:
            drawn = now
            bar.refresh()
        elif not console.is_terminal and now - drawn >= LINE:
            drawn = now
            console.print(f"{done} of {runs} runs", highlight=False)

    console.print(f"Measuring {about}", soft_wrap=True, highlight=False)
    task = bar.add_task("warming up", total=runs)
    if not console.is_terminal:
        yield ticked
        return
    with bar:
        bar.refresh()
        yield ticked

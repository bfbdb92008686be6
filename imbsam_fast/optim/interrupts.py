"""Sections of code that no signal handler may break into."""

from __future__ import annotations

import _signal
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# Those whose handlers end programs, time out or save checkpoints. Windows has but the first two.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGXCPU")
_SIGNALS = tuple(int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let the handlers of signals that arrive inside the block (Ctrl-C) run only at its end.

    Between a kernel that writes weights and the note that it ran, an exception would leave
    no way to tell where the weights are.
    """
    # _signal: the functions of `signal` without enums, which take longer than a small network.
    if torch.compiler.is_compiling() or threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {s: h for s in _SIGNALS if callable(h := _signal.getsignal(s))}
    arrived: list[tuple[int, Any]] = []
    try:
        for number in handlers:
            _signal.signal(number, lambda *signal_: arrived.append(signal_))
        yield
    finally:
        with ExitStack() as last:  # every one of them, also where one raises
            last.callback(_run, arrived, handlers)
            for number, handler in handlers.items():
                last.callback(_signal.signal, number, handler)


def _run(arrived: list[tuple[int, Any]], handlers: dict[int, Any]) -> None:
    with ExitStack() as all_of_them:
        for number, frame in reversed(arrived):
            all_of_them.callback(handlers[number], number, frame)

"""Sections of code that no signal handler may break into."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Those that programs handle; the ones that a system lacks are left out.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let the handlers of signals that arrive inside the block (Ctrl-C) run only at its end.

    Between a kernel that writes weights and the note that it ran, an exception would leave
    no way to tell where the weights are.
    """
    if torch.compiler.is_compiling() or threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {s: h for s in _SIGNALS if callable(h := signal.getsignal(s))}
    arrived: list[tuple[int, Any]] = []
    for number in handlers:
        signal.signal(number, lambda *signal_: arrived.append(signal_))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in arrived:
            handlers[signal.Signals(number)](number, frame)

"""Signals that ask a training run to stop: noted, so that it stops between two steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopSignals:
    """Inside the block, SIGTERM and Ctrl-C only make `arrived()` true.

    A second signal does what it would have done without the block.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __enter__(self) -> StopSignals:
        self._arrived = False
        self._before: dict[int, Any] = {s: signal.signal(s, self._note) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def arrived(self) -> bool:
        """Whether a signal has come."""
        return self._arrived

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._arrived = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

"""The process that measures: its memory, and what else keeps the machine busy."""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# ---------------------------------------------------------------- memory


def keep_freed_memory() -> bool:
    """Make the C library keep what is freed instead of returning it to the system.

    Otherwise a freed gradient may be unmapped, and mapped and cleared again at the next
    backward, and which contestant pays for that depends on what else is on the heap. Returns
    whether it worked (glibc only).
    """
    trim_threshold, mmap_max = -1, -4  # names of mallopt's parameters
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(trim_threshold, -1)) and bool(mallopt(mmap_max, 0))


def return_freed_memory() -> None:
    """Give the system back what is free now, after `keep_freed_memory` too."""
    with suppress(AttributeError, OSError, TypeError):  # where the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(run: Callable[[], None]) -> int | None:
    """By how many bytes `run` raises the resident set above its level before, at the peak.

    None where the system does not tell (only Linux does).
    """
    return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at the present level
    except OSError:
        return None
    before = _resident_bytes("VmRSS")
    run()
    peak = _resident_bytes("VmHWM")
    return None if before is None or peak is None else max(peak - before, 0)


def _resident_bytes(field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


# ---------------------------------------------------------------- other processes


class OtherLoad:
    """How many cores other processes kept busy inside the `with` blocks, on average.

    Small operations on several threads suffer most from it, since every one of them waits for
    its slowest thread. `cores` is None where the system does not tell (only Linux does).
    """

    def __init__(self) -> None:
        self._wall = self._others = 0.0

    @property
    def cores(self) -> float | None:
        """Cores that other processes kept busy on average; None where that is not known."""
        return max(self._others, 0.0) / self._wall if self._wall else None

    def __enter__(self) -> OtherLoad:
        self._start = (time.perf_counter(), _busy_seconds(), _own_seconds())
        return self

    def __exit__(self, *exception: object) -> None:
        wall, busy, own = self._start
        busy_now = _busy_seconds()
        if busy is not None and busy_now is not None:
            self._wall += time.perf_counter() - wall
            self._others += (busy_now - busy) - (_own_seconds() - own)


def _busy_seconds() -> float | None:
    """CPU time since boot that was neither idle nor waiting for a disk."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Of this process and of those that it started, once they have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system

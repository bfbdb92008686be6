"""What the benchmarks ask of their process: memory kept or returned, peaks, other load."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from imbsam_fast.bench import command, process
from imbsam_fast.bench.process import OtherLoad, keep_freed_memory, peak_memory, return_freed_memory

MB = 1_000_000


class Library:
    """A C library that writes down what it is asked for."""

    calls: list[tuple] = []  # noqa: RUF012

    def __init__(self, name):
        pass

    def mallopt(self, parameter, value):
        self.calls.append((parameter, value))
        return 1

    def malloc_trim(self, keep):
        self.calls.append(("trim", keep))
        return 1


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setattr(Library, "calls", [])
    monkeypatch.setattr(ctypes, "CDLL", Library)
    return Library


def test_freed_memory_is_kept_where_the_c_library_can(library, monkeypatch):
    assert keep_freed_memory()
    assert library.calls == [(-1, -1), (-4, 0)]  # M_TRIM_THRESHOLD: never, M_MMAP_MAX: none
    monkeypatch.delattr(library, "mallopt")
    assert not keep_freed_memory()


def test_freed_memory_is_returned_where_the_c_library_can(library, monkeypatch):
    return_freed_memory()
    assert library.calls == [("trim", 0)]
    monkeypatch.delattr(library, "malloc_trim")
    return_freed_memory()
    assert library.calls == [("trim", 0)]


def linux_tells_the_peak() -> bool:
    status = Path("/proc/self/status")
    return sys.platform == "linux" and status.exists() and "VmHWM" in status.read_text()


@pytest.mark.skipif(not linux_tells_the_peak(), reason="this system does not tell the peak")
def test_peak_memory_is_what_was_there_at_once():
    def run() -> None:
        for _ in range(3):  # one after the other, each freed
            assert bytearray(64 * MB).count(1) == 0

    keep = bytes(32 * MB)  # there before
    peak = peak_memory(run)
    assert peak is not None and 60 * MB < peak < 90 * MB
    assert len(keep) == 32 * MB
    assert peak_memory(lambda: None) < 10 * MB


def test_peak_memory_is_unknown_where_the_system_does_not_tell(monkeypatch):
    def refuse(self, *args):
        raise PermissionError(self)

    monkeypatch.setattr(Path, "write_text", refuse)
    ran = []
    assert peak_memory(lambda: ran.append(1)) is None
    monkeypatch.undo()
    monkeypatch.setattr(Path, "write_text", lambda *args: 1)
    monkeypatch.setattr(Path, "read_text", lambda self: "Name:\tpython\n")
    assert peak_memory(lambda: ran.append(1)) is None


def test_load_of_other_processes_is_what_this_one_did_not_use(monkeypatch):
    times = {
        "perf_counter": iter([100.0, 110.0, 200.0, 210.0]),
        "busy": iter([50.0, 65.0, 100.0, 101.0]),
        "own": iter([1.0, 6.0, 9.0, 10.0]),
    }
    monkeypatch.setattr(process.time, "perf_counter", lambda: next(times["perf_counter"]))
    monkeypatch.setattr(process, "_busy_seconds", lambda: next(times["busy"]))
    monkeypatch.setattr(process, "_own_seconds", lambda: next(times["own"]))
    others = OtherLoad()
    assert others.cores is None
    with others:
        pass
    assert others.cores == pytest.approx(1.0)  # (15 - 5) CPU seconds in 10 seconds
    with others:
        pass
    assert others.cores == pytest.approx(0.5)  # none in 10 seconds more


def test_a_busy_machine_is_mentioned(monkeypatch):
    others = OtherLoad()
    assert command._warnings(False, others) == []
    assert "no result" in command._warnings(True, others)[0]
    monkeypatch.setattr(OtherLoad, "cores", 1.25)
    assert "other processes kept 1.2 cores busy" in command._warnings(False, others)[0]

"""The harness on a clock of its own, and the command `imbsam-fast bench`."""

from __future__ import annotations

import argparse
import io
import json
import time
import weakref

import pytest
import torch
from rich.console import Console

from imbsam_fast import cli
from imbsam_fast.bench import command, progress
from imbsam_fast.bench.measure import (
    LIMIT,
    WARM_UP_ROUNDS,
    Contestant,
    Operation,
    Stopwatch,
    measure,
    warm_up,
)
from imbsam_fast.bench.optimizers import AUTHORS, AUTHORS_FUSED, STEP
from imbsam_fast.bench.progress import progress_of
from imbsam_fast.bench.report import limits, load

# ---------------------------------------------------------------- the harness


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def sleeper(clock: FakeClock, *seconds: float, log: list | None = None) -> Contestant:
    """Takes the given times in turn, in two laps, with preparation that must not count."""
    runs = iter(seconds)

    def contestant(watch: Stopwatch) -> None:
        took = next(runs)
        if log is not None:
            log.append(contestant)
        clock.now += 1000
        with watch.lap("a"):
            clock.now += took
        clock.now += 1000
        for _ in range(2):
            with watch.lap("b"):
                clock.now += took

    return contestant


def test_a_lap_inside_a_lap_counts_for_itself_alone():
    clock = FakeClock()
    watch = Stopwatch(clock)
    with watch.lap("outer"):
        clock.now += 1
        for _ in range(2):
            with watch.lap("inner"):
                clock.now += 10
        clock.now += 100
    assert watch.laps == {"outer": 101, "inner": 20}


def test_medians_leave_out_warm_up_and_preparation():
    clock = FakeClock()
    times = [50.0] * WARM_UP_ROUNDS + [0.4, 0.1, 0.2]
    group = [Operation("op", "size", {"x": sleeper(clock, *times)}, calls=10)]
    warm_up(group)
    (timing,) = measure(group, rounds=3, clock=clock)
    assert timing.samples_ms == pytest.approx([120, 30, 60])  # 3 x seconds / 10 calls
    assert timing.ms == pytest.approx(60)
    assert timing.laps_ms == pytest.approx({"a": 20, "b": 40})
    assert timing.gb_per_s is None and timing.percent_of_limit is None
    assert timing.peak_bytes is None and timing.moved_bytes is None


def test_bandwidth_and_ratios_follow_from_the_medians():
    clock = FakeClock()
    steps = {"ours": sleeper(clock, 2.0), "peer": sleeper(clock, 5.0)}
    group = [
        Operation(LIMIT, "copy", {"plain": sleeper(clock, 1.0)}, bytes=30 * 10**9),
        Operation(LIMIT, "read", {"plain": sleeper(clock, 1.0)}, bytes=24 * 10**9),
        Operation("op", "", steps, bytes=15 * 10**9, moved={"peer": 45 * 10**9}),
    ]
    copy, read, ours, peer = measure(group, rounds=1, clock=clock)
    assert (copy.gb_per_s, ours.gb_per_s, peer.gb_per_s) == pytest.approx((10, 2.5, 1))
    assert (copy.percent_of_limit, read.percent_of_limit) == pytest.approx((100, 80))
    assert (ours.percent_of_limit, peer.percent_of_limit) == pytest.approx((25, 10))
    assert (copy.ratio, ours.ratio, peer.ratio) == pytest.approx((1, 1, 2.5))
    assert (ours.moved_bytes, peer.moved_bytes) == (None, 45 * 10**9)


def test_memory_is_looked_at_in_a_pass_of_its_own(monkeypatch):
    clock, runs = FakeClock(), []
    contestants = {name: sleeper(clock, *[1.0] * 3, log=runs) for name in "ab"}

    def peak(run):
        run()
        return 1000 + len(runs)

    monkeypatch.setattr("imbsam_fast.bench.measure.peak_memory", peak)
    timings = measure([Operation("op", "", contestants, memory=True)], rounds=2, clock=clock)
    assert [t.peak_bytes for t in timings] == [1005, 1006]  # after 2 x 2 timed runs
    assert runs[4:] == list(contestants.values())
    assert all(len(t.samples_ms) == 2 for t in timings)


def test_contestants_take_turns_in_changing_order():
    clock, log, rounds = FakeClock(), [], 20
    contestants = {name: sleeper(clock, *[1.0] * rounds, log=log) for name in "abc"}
    measure([Operation("op", "", contestants)], rounds, clock=clock)
    turns = [tuple(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert all(set(turn) == set(contestants.values()) for turn in turns)
    assert len(set(turns)) > 1


class Data:
    """What a group holds; weakly referenced."""


def test_a_group_is_freed_before_the_next_is_made(tmp_path):
    made = []

    def contestant(data: Data) -> Contestant:
        def run(watch: Stopwatch) -> None:
            with watch.lap("call"):
                assert data is not None

        return run

    def groups(quick: bool):
        assert quick
        for i in range(3):
            assert all(data() is None for data in made)
            data = Data()
            made.append(weakref.ref(data))
            operation = Operation("op", f"size {i}", {"x": contestant(data)})
            del data
            yield [operation]
            del operation

    args = argparse.Namespace(rounds=15, quick=True, return_memory=True, json=tmp_path / "out.json")
    assert command.run(args, "title", groups, lambda report: [f"{len(report.timings)} rows"]) == 0
    report = load(args.json)
    assert [(t.size, t.group) for t in report.timings] == [(f"size {i}", i) for i in range(3)]
    assert report.title == "title" and report.summary[0] == "3 rows"
    assert len(made) == 3


# ---------------------------------------------------------------- what is shown


def ticking(group: list[Operation], rounds: int, terminal: bool) -> str:
    """What stderr shows while `group` is measured."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100)
    with progress_of(group, rounds, console) as ticked:
        warm_up(group, ticked=ticked)
        measure(group, rounds, ticked=ticked)
    return file.getvalue()


def test_progress_is_shown_between_runs_and_never_within_one(monkeypatch):
    shown = []
    file = io.StringIO()
    monkeypatch.setattr(progress, "REFRESH", 0.0)

    def contestant(watch: Stopwatch) -> None:
        with watch.lap("call"):
            before = file.tell()
            time.sleep(0.002)
            shown.append(file.tell() - before)

    group = [Operation("squared_norm", "", {"x": contestant, "y": contestant})]
    console = Console(file=file, force_terminal=True, width=100)
    with progress_of(group, 3, console) as ticked:
        warm_up(group, ticked=ticked)
        measure(group, 3, ticked=ticked)
    text = file.getvalue()
    runs = 2 * (WARM_UP_ROUNDS + 3)
    assert shown == [0] * runs
    assert "Measuring squared_norm: 2 contestants, 3 rounds" in text
    assert f"1/{runs}" in text and f"{runs}/{runs}" in text


def test_without_a_terminal_there_are_lines(monkeypatch):
    clock = FakeClock()
    group = [Operation("op", "", {"x": sleeper(clock, *[1.0] * 9)})]
    assert ticking(group, 1, terminal=False).splitlines() == [
        "Measuring op: 1 contestants, 1 rounds"
    ]
    monkeypatch.setattr(progress, "LINE", 0.0)
    lines = ticking(group, 1, terminal=False).splitlines()
    assert lines[1:] == ["1 of 3 runs", "2 of 3 runs", "3 of 3 runs"]


def test_the_limit_is_one_line_and_more_than_it_is_explained():
    clock = FakeClock()
    limit = Operation(LIMIT, "copy, 160 MB", {"plain stores": sleeper(clock, 1.0, 2.0)},
                      bytes=30 * 10**9)  # fmt: skip
    slow, fast = (
        Operation("op", "", {"x": sleeper(clock, seconds)}, bytes=45 * 10**9)
        for seconds in (3.0, 0.5)
    )
    (line,) = limits(measure([limit, slow], 1, clock))
    assert line.startswith(
        "Machine limit, 100 %: 10.0 GB/s of memory traffic (best of copy, 160 MB"
    )
    again = measure([limit, fast], 1, clock)
    for timing in again:
        timing.group = 1
    lines = limits(again)
    assert "at worst 5.0 GB/s" in lines[0] and lines[1].startswith("1 rows are above 100 %")
    assert limits([t for t in again if t.operation != LIMIT]) == []


# ---------------------------------------------------------------- quick runs


def test_quick_run_writes_what_it_measured(tmp_path, capsys):
    path = tmp_path / "results" / "command.json"
    assert cli.main(["bench", "--quick", "--return-memory", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    printed = capsys.readouterr().out
    for line in report["summary"]:
        assert line in printed
    assert report["summary"][0].startswith("ImbSAM optimizer step")

    settings = report["settings"]
    assert settings["quick"] and settings["rounds"] == 2
    assert settings["freed_memory"] == "returned"
    assert "cores_used_by_others" in settings
    environment = settings["environment"]
    assert environment["date"] and environment["versions"]["torch"] == torch.__version__
    assert environment["machine"]["torch_threads"] == torch.get_num_threads()
    assert "git_commit" in environment

    timings = report["timings"]
    assert {t["operation"] for t in timings} == {
        LIMIT,
        "squared_norm",
        "perturb_",
        "sgd_update_",
        "merge_",
        "grad_check",
        STEP,
        "loss forward",
        "loss forward, head and tail backward",
    }
    limits, first = {}, {}
    for t in timings:
        if t["operation"] == LIMIT:
            limits[t["group"]] = max(limits.get(t["group"], 0), t["gb_per_s"])
    assert len(limits) == 3
    for t in timings:
        assert len(t["samples_ms"]) == 2
        assert t["ms"] == pytest.approx(sum(t["samples_ms"]) / 2)
        assert t["gb_per_s"] == pytest.approx(t["bytes"] / t["ms"] / 1e6)
        share = t["gb_per_s"] / limits[t["group"]]
        assert t["percent_of_limit"] == pytest.approx(100 * share)
        key = (t["operation"], t["size"], t["group"])
        assert t["ratio"] == pytest.approx(t["ms"] / first.setdefault(key, t["ms"]))
    step = [t for t in timings if t["operation"] == STEP]
    assert all(set(t["laps_ms"]) == {"first_step", "second_step", "third_step"} for t in step)
    ratios = {t["contestant"]: t["ratio"] for t in step}
    fused, default = (ratios[c] for c in (AUTHORS_FUSED, AUTHORS))
    assert f"{fused:.2f} times faster" in report["summary"][0]
    assert f"{default:.2f} times with default SGD" in report["summary"][0]


@pytest.mark.quick
def test_no_rounds_are_refused():
    with pytest.raises(SystemExit, match="--rounds is 0, expected at least 1"):
        cli.main(["bench", "--rounds", "0"])

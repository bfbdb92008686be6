"""The pieces of a day on a GPU: what is done stays done, and time that is up is no failure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_day
from benchmarks.gpu_day import Record, Task, run

PATIENT = """
import signal, sys, time
from pathlib import Path
at = Path(sys.argv[1])
def stop(*_):
    at.write_text("left a checkpoint")
    sys.exit(3)
signal.signal(signal.SIGTERM, stop)
if at.exists():
    sys.exit(0)
print("started", flush=True)
time.sleep(60)
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def statuses(record: Record) -> dict[str, str]:
    return {name: outcome.status for name, outcome in record.outcomes.items()}


@pytest.mark.slow  # starts processes
def test_a_piece_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_day, "TO_STOP", 6.0)
    log = tmp_path / "log"
    note = f"open({str(log)!r}, 'a').write(__import__('sys').argv[1])"
    checkpoint = str(tmp_path / "checkpoint")
    tasks = [
        Task("first", python(note, "1")),
        Task("not here", python(note, "x"), needs=("no_such_module",)),
        Task("patient", python(PATIENT, checkpoint), resumes=True),
        Task("last", python(note, "2"), environment={"A": "b"}),
    ]
    path = tmp_path / "out" / "record.json"
    assert run(tasks, Record(path), seconds=9, dry=False, again=False) == gpu_day.UNFINISHED
    found = Record(path)
    assert statuses(found) == {"first": "done", "not here": "left out", "patient": "unfinished"}
    assert found.outcomes["patient"].output == "started\n"
    assert found.outcomes["not here"].output == "not there: no_such_module"
    assert Path(checkpoint).read_text() == "left a checkpoint"

    assert run(tasks, Record(path), seconds=60, dry=False, again=False) == 0
    assert log.read_text() == "12"
    assert set(statuses(Record(path)).values()) == {"done", "left out"}
    assert json.loads(path.read_text())["last"]["seconds"] > 0


def test_what_fails_keeps_the_rest_from_nothing_and_is_tried_again_when_asked(
    tmp_path: Path,
) -> None:
    tasks = [
        Task("fails", python("raise SystemExit('no such kernel')")),
        Task("runs", python("print('here')")),
    ]
    record = Record(tmp_path / "record.json")
    assert run(tasks, record, 60, dry=False, again=False) == 1
    assert statuses(record) == {"fails": "failed", "runs": "done"}
    assert "no such kernel" in record.outcomes["fails"].output
    tasks[0].command = python("")
    assert run(tasks, record, 60, dry=False, again=False) == 1
    assert run(tasks, record, 60, dry=False, again=True) == 0


TESTS = """
import time
def test_fails(): assert False
def test_waits(): time.sleep(60)
"""


@pytest.mark.slow  # starts processes
def test_tests_that_are_stopped_name_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_day, "TO_STOP", 10.0)
    (tmp_path / "test_it.py").write_text(TESTS)
    (task,) = (t for t in gpu_day.suite(False) if t.name == "tests/test_split.py")
    task.command = [*task.command[:-1], "--rootdir", str(tmp_path), str(tmp_path / "test_it.py")]
    record = Record(tmp_path / "record.json")
    assert run([task], record, 25, dry=False, again=False) == gpu_day.UNFINISHED
    (outcome,) = record.outcomes.values()
    assert outcome.status == "unfinished" and "test_it.py::test_fails" in outcome.output


def test_what_did_not_end_goes_on_in_parts(tmp_path: Path) -> None:
    parts = [Task("a", python("")), Task("b", python(""))]
    record = Record(tmp_path / "record.json")
    record.note("both", gpu_day.Outcome("unfinished"))
    tasks = [
        Task("both", python("1/0"), parts=parts),
        Task("done at once", python(""), parts=parts),
    ]
    assert run(tasks, record, 60, dry=False, again=False) == 0
    ended = {"a": "done", "b": "done", "done at once": "done"}
    assert statuses(record) == {"both": "unfinished", **ended}


def test_the_suite_is_whole_in_files_and_in_directories() -> None:
    def files(tasks: list[Task]) -> list[str]:
        return sorted(word for t in tasks for word in t.command if word.endswith(".py"))

    alone, together = gpu_day.suite(False), gpu_day.suite(True)
    assert files(alone) == files(together) == sorted(t.name for t in alone)
    assert len(together) < len(alone) / 5
    parts = sorted(part.name for task in together for part in task.parts or [task])
    assert parts == sorted(task.name for task in alone)


def test_a_dry_run_takes_the_dry_command(tmp_path: Path) -> None:
    tasks = [Task("both", python("raise SystemExit(1)"), python("")), Task("one", python("1/0"))]
    record = Record(tmp_path / "record.json")
    assert run(tasks, record, 60, dry=True, again=False) == 0
    assert statuses(record) == {"both": "done", "one": "left out"}


def test_what_ends_well_without_its_last_words_has_failed(tmp_path: Path) -> None:
    tasks = [
        Task("silent", python(""), says="agrees"),
        Task("says it", python("print('all agrees')"), says="agrees"),
        Task("without tests", python("raise SystemExit(5)"), codes=(0, 5)),
    ]
    record = Record(tmp_path / "record.json")
    assert run(tasks, record, 60, dry=False, again=False) == 1
    assert statuses(record) == {"silent": "failed", "says it": "done", "without tests": "done"}


def test_a_dry_run_does_without_what_only_a_gpu_needs(tmp_path: Path) -> None:
    tasks = [Task("a", python(""), python(""), on_gpu=("no_such_sanitizer",))]
    for dry, status in ((True, "done"), (False, "left out")):
        record = Record(tmp_path / f"{dry}.json")
        run(tasks, record, 60, dry=dry, again=False)
        assert statuses(record) == {"a": status}


@pytest.mark.slow  # trains
def test_the_dry_run_of_a_training_leaves_a_run(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    task = gpu_day.train(tmp_path / "no data", tmp_path)[0]
    assert task.dry is not None
    task.dry += ["--model", "resnet8", "--epochs", "1"]
    record = Record(tmp_path / "record.json")
    assert run([gpu_day.tiny_images(tmp_path), task], record, 100, dry=True, again=False) == 0
    (directory,) = (tmp_path / "cifar100_lt" / "SGD").iterdir()
    assert (directory / "result.json").exists()


def test_the_pieces(tmp_path: Path) -> None:
    pieces = {name: make() for name, make in gpu_day.pieces(tmp_path, tmp_path).items()}
    assert list(pieces) == ["a", "b", "c", "d", "e"]
    for tasks in pieces.values():
        assert tasks and len({task.name for task in tasks}) == len(tasks)
    assert {"build", "every operation"} <= {t.name for t in pieces["a"]}
    assert any("tests/bench/test_gpu_day.py" in t.command for t in pieces["a"])
    assert len(pieces["b"]) == 8
    assert len(pieces["e"]) == 3 * len(gpu_day.RUNS)
    for task in pieces["e"]:
        assert "--resume" in task.command and "--save" in task.command
    saved = {task.command[task.command.index("--save") + 1] for task in pieces["e"]}
    assert len(saved) == len(gpu_day.RUNS)  # a directory for each kind of run, seeds inside


def test_results_of_another_machine_are_not_added_to(tmp_path: Path) -> None:
    from benchmarks import gpu_timing

    path = tmp_path / "bench_gpu.json"
    assert gpu_timing._begun(path, 5, False) is None
    now = gpu_timing.environment()
    report = gpu_timing.GpuReport(now, 5, 100.0, [])
    gpu_timing.save(report, path)
    assert gpu_timing._begun(path, 5, False) == gpu_timing.load(path)
    another = {**now, "git_commit": "another"}
    for changed, rounds, dry in ((now, 6, False), (another, 5, False), (now, 5, True)):
        gpu_timing.save(gpu_timing.GpuReport(changed, 5, 100.0, []), path)
        with pytest.raises(SystemExit, match="is of another machine, version or number of rounds"):
            gpu_timing._begun(path, rounds, dry)

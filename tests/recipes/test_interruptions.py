"""Runs with worker processes that are cut anywhere, and what is left of them."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")

from imbsam_fast import cli
from imbsam_fast.recipes.data import workers as workers_module
from imbsam_fast.recipes.data.files import FileImages, FileOptions
from imbsam_fast.recipes.data.images import CPU, DataError
from imbsam_fast.recipes.data.lists import ImageList, read
from imbsam_fast.recipes.run_directory import RunDirectory, RunDirectoryError, find_runs
from imbsam_fast.recipes.train.ranks import Ranks
from tests import commands, recipe_data

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked at in /proc")

LISTS = ("iNaturalist18_train.txt", "iNaturalist18_val.txt")
ARGUMENTS = [
    "inaturalist2018", "--model", "convnet", "--image-size", "16", "--epochs", "3",
    "--batch-size", "8", "--lr", "0.05", "--eta", "8", "--group-borders", "5", "7",
    "--optimizer", "imbsam", "--workers", "2", "--validation-list", LISTS[1],
]  # fmt: skip

STEP = "imbsam_fast.recipes.train.training.generator"  # called once or twice a step
TEST = "imbsam_fast.recipes.train.evaluation.in_eval_mode"
REPLACE = "os.replace"  # the last thing that happens to a file: what is written is not there yet


def run_and_cut(argv: list[str], where: str, at: int, number: str) -> int:
    """Runs a command line in which one thing happens at the `at`-th call of a function: the process
    group gets a SIGTERM, or this process a SIGKILL.
    """
    os.setsid()
    module, _, name = where.rpartition(".")
    original, calls = getattr(importlib.import_module(module), name), itertools.count(1)

    def called(*arguments, **named):
        if next(calls) == at:
            if number == "SIGTERM":
                os.killpg(os.getpgid(0), signal.SIGTERM)
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(sys.modules[module], name, called)
    return cli.main(argv)


@pytest.fixture
def data_dir(tmp_path) -> Path:
    return recipe_data.image_files(tmp_path / "data", [8, 8, 8], LISTS, ".")


def command(data_dir: Path, save: Path) -> list[str]:
    return ["train", *ARGUMENTS, "--data-dir", str(data_dir), "--save", str(save)]


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> RunDirectory:
    """A run that nothing cut."""
    path = tmp_path_factory.mktemp("whole")
    data_dir = recipe_data.image_files(path / "data", [8, 8, 8], LISTS, ".")
    assert cli.main(command(data_dir, path / "runs")) == 0
    return find_runs([path / "runs"])[0]


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize(
    ("where", "at", "number", "reached"),
    [
        (STEP, 8, "SIGTERM", "training"),
        (STEP, 8, "SIGKILL", "training"),
        (TEST, 2, "SIGTERM", "validation"),
        (TEST, 4, "SIGTERM", "test"),
        (TEST, 4, "SIGKILL", "test"),
        (REPLACE, 6, "SIGTERM", "checkpoint"),
        (REPLACE, 6, "SIGKILL", "checkpoint"),
    ],
    ids=lambda value: str(value).rsplit(".", 1)[-1],
)
def test_a_run_with_workers_that_is_cut_ends_bit_for_bit_the_same(
    where, at, number, reached, whole, data_dir, tmp_path
):
    argv = command(data_dir, tmp_path / "runs")
    output = tmp_path / "output"
    status = commands.forked(lambda: run_and_cut(argv, where, at, number), output)
    assert status == (130 if number == "SIGTERM" else -signal.SIGKILL), output.read_text()
    (run,) = find_runs([tmp_path / "runs"])
    assert run.result() is None
    if number == "SIGTERM":
        assert "goes on with --resume" in output.read_text()
        assert run.has_checkpoint() and not (run.path / ".holder").exists()
    assert cli.main([*argv, "--resume"]) == 0
    one, other = whole.load_checkpoint(), run.load_checkpoint()
    assert all(torch.equal(w, other["model"][name]) for name, w in one["model"].items())
    assert run.result()["last"] == whole.result()["last"]
    assert run.result()["best"] == whole.result()["best"]
    assert [r["loss"] for r in run.log()] == [r["loss"] for r in whole.log()]


@pytest.mark.slow  # starts processes
def test_workers_end_with_the_training_process_and_hold_no_lock(data_dir, tmp_path, capsys):
    argv = [*command(data_dir, tmp_path / "runs"), "--epochs", "1000"]
    process = subprocess.Popen([sys.executable, "-m", "imbsam_fast", *argv])
    try:
        wait_until(lambda: list((tmp_path / "runs").rglob("last.pt")) and children(process.pid))
        found = children(process.pid)
        message = commands.refused([*argv, "--resume"], capsys)
        assert f"is in use: process {process.pid} on " in message
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not any(map(alive, found)), seconds=5)
    (run,) = find_runs([tmp_path / "runs"])
    with run.in_use():
        pass


def test_a_forked_process_does_not_keep_a_lock(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {"seed": 0})
    with run.in_use():
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with run.in_use():
            pass
        refused = pytest.raises(RunDirectoryError, match=f"process {os.getpid()} on")
        with run.in_use(), refused, run.in_use():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# ---------------------------------------------------------------- what cannot be read


def test_an_unreadable_image_leaves_a_checkpoint_and_the_run_goes_on(
    whole, data_dir, tmp_path, capsys, monkeypatch
):
    argv = command(data_dir, tmp_path / "runs")
    bad = sorted(data_dir.rglob("*.jpg"))[3]
    content = bad.read_bytes()
    bad.write_bytes(b"")
    message = commands.refused(argv, capsys)
    assert f"'{bad}' cannot be read" in message and "goes on with --resume" in message
    (run,) = find_runs([tmp_path / "runs"])
    state = run.load_checkpoint()
    assert state["epoch"] == 0 and 0 <= state["position"] < 3
    bad.write_bytes(content)
    assert cli.main([*argv, "--resume"]) == 0
    assert run.result()["last"] == whole.result()["last"]


@pytest.fixture
def listed(data_dir) -> ImageList:
    return read(data_dir / LISTS[0], data_dir)


def images(listed: ImageList, **changes) -> FileImages:
    statistics = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return FileImages(listed, FileOptions(16, statistics, 0.0, False, 2)._replace(**changes))


@pytest.mark.slow  # waits for the workers
def test_a_dead_worker_is_an_error_at_the_next_batch_and_not_in_between(listed):
    source = images(listed)
    batches = source.batches([torch.arange(8)] * 200, (0,))
    next(batches)
    assert source._workers is not None
    for process in source._workers._processes:
        os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.2)  # a handler of SIGCHLD would raise here
    with pytest.raises(DataError, match=r"a process that reads images died .*--workers"):
        list(batches)
    source.close()


@pytest.mark.parametrize("fails_here", [True, False])
def test_a_rank_that_cannot_read_stops_all_ranks(fails_here):
    class OneOfTwo(Ranks):
        """The other rank fails where this one does not."""

        def any(self, flag: bool) -> bool:
            asked.append(flag)
            return flag or (not fails_here and len(asked) == 2)

    def batches():
        yield 0
        if fails_here:
            raise DataError("here")
        yield 1

    asked: list[bool] = []
    found = []
    with pytest.raises(DataError, match="here" if fails_here else "another of the processes"):
        for batch in OneOfTwo("ddp", 0, 2).agreed(batches()):
            found.append(batch)
    assert found == [0] and len(asked) == 2


def test_processes_are_kept_for_the_next_epoch_and_left_out_batches_do_not_matter(listed):
    source = images(listed)
    rows = list(torch.arange(24).split(5))
    expected = list(images(listed, workers=0).batches(rows, (1,)))
    first = source.batches(rows, (0,))
    next(first)
    del first
    processes = list(source._workers._processes)
    found = list(source.batches(rows, (1,)))
    assert source._workers._processes == processes and len(processes) == 2
    for (x, y), (other_x, other_y) in zip(found, expected, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)
    source.close()
    assert not any(alive(p.pid) for p in processes)


def test_batches_that_memory_cannot_hold_are_refused_before_they_are_read(listed, monkeypatch):
    monkeypatch.setattr(workers_module, "free_memory", lambda: 10_000)
    with pytest.raises(DataError, match=r"from 2 workers take .*fewer --workers, a smaller"):
        next(images(listed).batches([torch.arange(8)], (0,), device=CPU))


# ---------------------------------------------------------------- a small machine

LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))
from imbsam_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def in_small_machine(argv: list[str]) -> subprocess.CompletedProcess[str]:
    """A command line under 96 descriptors and, where that can be had, 1 MB of /dev/shm."""
    words = [sys.executable, "-c", LIMITED, *argv]
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    tried = subprocess.run(["unshare", "-m", "true"], capture_output=True)
    if tried.returncode == 0:
        words = ["unshare", "-m", "sh", "-c", mount, "sh", *words]
    return subprocess.run(words, capture_output=True, text=True, timeout=900)


def test_few_descriptors_and_little_shared_memory_are_enough(data_dir, tmp_path):
    """In proportion to 512 images, 1,024 descriptors and 64 MB: a batch is larger than /dev/shm."""
    argv = command(data_dir, tmp_path / "runs")
    larger = ["--batch-size", "24", "--image-size", "128", "--epochs", "1", "--optimizer", "sgd"]
    repeated = (data_dir / LISTS[0]).read_text() * 8  # 192 images, more than there are descriptors
    (data_dir / "long.txt").write_text(repeated)
    argv += [*larger, "--batch-size", "120", "--workers", "4", "--train-list", "long.txt"]
    ended = in_small_machine(argv)
    assert ended.returncode == 0, ended.stderr
    (run,) = find_runs([tmp_path / "runs"])
    assert run.result() is not None

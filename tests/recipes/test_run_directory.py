"""The files of a run while a process that writes them is killed."""

from __future__ import annotations

import os
import signal

import pytest
import torch

pytest.importorskip("yaml")

from imbsam_fast.recipes import run_directory
from imbsam_fast.recipes.run_directory import RunDirectory
from tests import commands

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")

write = run_directory._write


def write_half(path, put):
    """Half of a file, and no more of this process."""

    def put_half(file):
        put(file)
        file.truncate(file.tell() // 2)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    write(path, put_half)


def killed(path, what):
    """Writes a checkpoint, and is killed in the middle of the next one, or of the first file."""

    def run():
        if what == "checkpoint":
            run = RunDirectory.create(path, {})
            run.save_checkpoint({"epoch": 1, "weights": torch.arange(100_000)})
        run_directory._write = write_half  # in the fork alone
        if what == "checkpoint":
            run.save_checkpoint({"epoch": 2, "weights": torch.zeros(100_000)})
        RunDirectory.create(path, {})
        return 0

    output = path.parent / "output"
    assert commands.forked(run, output) == -signal.SIGKILL, output.read_text()


def test_a_kill_while_a_checkpoint_is_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "run"
    killed(path, "checkpoint")
    assert {file.name for file in path.iterdir()} == {"config.yaml", "last.pt", ".last.pt.new"}
    run = RunDirectory.open(path)
    checkpoint = run.load_checkpoint()
    assert checkpoint["epoch"] == 1 and torch.equal(checkpoint["weights"], torch.arange(100_000))
    run.save_checkpoint({"epoch": 2})
    assert run.load_checkpoint() == {"epoch": 2}
    assert {file.name for file in path.iterdir()} == {"config.yaml", "last.pt"}


def test_a_kill_while_a_run_is_made_leaves_room_for_the_next(tmp_path):
    path = tmp_path / "run"
    killed(path, "config")
    assert [file.name for file in path.iterdir()] == [".config.yaml.new"]
    RunDirectory.create(path, {"seed": 1})
    assert RunDirectory.open(path).config["seed"] == 1


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {})
    with pytest.raises(Exception, match=r"pickle|local object"):
        run.save_checkpoint({"code": lambda: None})
    assert [file.name for file in run.path.iterdir()] == ["config.yaml"]

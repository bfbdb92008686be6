"""The examples, each run as a user would: the loss falls, and the end is an accuracy."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parent.parent / "examples"
LIBRARIES = {"lightning_module.py": "lightning", "accelerate_loop.py": "accelerate"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")

# Every command that is tried, without the interpreter, by a name for it.
COMMANDS: dict[str, tuple[str, ...]] = {
    "plain": ("plain_loop.py",),
    "closure": ("closure_loop.py",),
    "lightning": ("lightning_module.py", "--precision", "bf16-mixed", "--accelerator", "cpu"),
    "lightning on ranks": ("lightning_module.py", "--accelerator", "cpu", "--devices", "2"),
    "accelerate": (*TORCHRUN, "accelerate_loop.py", "--cpu", "--micro-batch-size", "24"),
}


def missing(command: Sequence[str]) -> list[str]:
    """Libraries that the example of a command needs and that are not there."""
    needed = [LIBRARIES[word] for word in command if word in LIBRARIES]
    return [library for library in needed if importlib.util.find_spec(library) is None]


def started(command: Sequence[str], epochs: int = 4) -> subprocess.Popen[str]:
    words = [str(EXAMPLES / word) if word.endswith(".py") else word for word in command]
    return subprocess.Popen(
        [sys.executable, *words, "--epochs", str(epochs)],
        env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def output(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out


@pytest.fixture(scope="module")
def output_of() -> Callable[[str], str]:
    """What a command prints; all are started at once, most of the time going into imports."""
    running = {name: started(words) for name, words in COMMANDS.items() if not missing(words)}
    return functools.cache(lambda name: output(running[name]))


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.slow
def test_the_loss_falls_and_the_accuracy_is_told(output_of, name):
    if missing(COMMANDS[name]):
        pytest.skip(f"{', '.join(missing(COMMANDS[name]))} is not installed")
    out = output_of(name)
    losses = re.findall(r"^epoch \d+: loss (\S+)$", out, re.MULTILINE)
    assert len(losses) == 4 and float(losses[-1]) < 0.8 * float(losses[0])
    (accuracy,) = re.findall(r"accuracy (\S+)$", out.rstrip())
    assert 0.1 < float(accuracy) <= 1  # better than chance
    # 342 images in batches of 64 are six steps an epoch, and Lightning counts them.
    told = {"accelerate": "2 processes, "}.get(name, "24 steps, " if "lightning" in name else "")
    assert f"{told}accuracy" in out


@pytest.mark.slow
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(output_of, tmp_path):
    command = ("plain_loop.py", "--checkpoint", str(tmp_path / "run.pt"))
    first, second = (output(started(command, epochs)).splitlines() for epochs in (2, 4))
    assert [*first[:2], *second] == output_of("plain").splitlines()


def test_every_example_is_run():
    tried = {word for command in COMMANDS.values() for word in command if word.endswith(".py")}
    assert tried == {path.name for path in EXAMPLES.glob("*.py")}

"""The examples, each run as a user would: they learn, tell what they see, and can be resumed."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
EPOCHS = 4

# What an example imports takes longer than its runs, which are therefore made in one process.
RUNS = """
import importlib.util, sys
path, *runs = sys.argv[1:]
spec = importlib.util.spec_from_file_location("example", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for run in runs:
    sys.argv = [path, *run.split()]
    module.main()
    print("-- end", flush=True)
"""
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")


class Example(NamedTuple):
    """A command that is tried, by the words after the interpreter."""

    file: str
    options: str = ""
    library: str | None = None  # that it needs
    told: str = ""  # before the accuracy
    resumes: bool = True
    launcher: tuple[str, ...] = ()


# 342 images in batches of 64 are six steps an epoch, and Lightning counts them.
COMMANDS = {
    "plain": Example("plain_loop.py"),
    "closure": Example("closure_loop.py", resumes=False),
    "lightning": Example(
        "lightning_module.py", "--precision bf16-mixed --accelerator cpu", "lightning", "24 steps, "
    ),
    "lightning on ranks": Example(
        "lightning_module.py", "--accelerator cpu --devices 2", "lightning", "24 steps, ", False
    ),
    "accelerate": Example(
        "accelerate_loop.py", "--cpu --accumulate 2", "accelerate", "1 processes, "
    ),
    "accelerate on ranks": Example(
        "accelerate_loop.py", "--cpu --accumulate 2", "accelerate", "2 processes, ", False, TORCHRUN
    ),
    "transformers": Example(
        "transformers_trainer.py", "--accumulate 2", "transformers", "40 steps, "
    ),
    "timm": Example("timm_train.py", "", "timm"),
    "torchvision": Example("torchvision_train.py", "", "torchvision"),
}


def is_missing(example: Example) -> bool:
    return example.library is not None and importlib.util.find_spec(example.library) is None


def started(example: Example, checkpoint: Path) -> subprocess.Popen[str]:
    """All epochs, and where it resumes half of them and then the others."""
    runs = [f"{example.options} --epochs {EPOCHS}"]
    if example.resumes:
        halves = (EPOCHS // 2, EPOCHS)
        runs += [f"{example.options} --epochs {n} --checkpoint {checkpoint}" for n in halves]
    path = str(EXAMPLES / example.file)
    own_process = (*example.launcher, path, *runs[0].split())  # is copied, or starts others
    words = ("-c", RUNS, path, *runs) if example.resumes else own_process
    return subprocess.Popen(
        [sys.executable, *words], cwd=checkpoint.parent, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def outputs(process: subprocess.Popen[str]) -> list[str]:
    """What each of the runs prints."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out.split("-- end\n")


@pytest.fixture(scope="module")
def outputs_of(request, tmp_path_factory) -> Callable[[str], list[str]]:
    """By the name of a command; all that are tested are started at once."""
    folder = tmp_path_factory.mktemp("examples")
    tests = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    names = {params["name"] for params in tests if params.get("name") in COMMANDS}
    running = {
        name: started(COMMANDS[name], folder / name)
        for name in sorted(names)
        if not is_missing(COMMANDS[name])
    }
    return functools.cache(lambda name: outputs(running[name]))


def epochs_in(output: str) -> list[str]:
    return re.findall(r"^epoch .*$", output, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.slow
def test_the_loss_falls_and_what_is_seen_is_told(outputs_of, name):
    example = COMMANDS[name]
    if is_missing(example):
        pytest.skip(f"{example.library} is not installed")
    out = outputs_of(name)[0]
    told = re.findall(r"^epoch \d+: loss ([\d.]+)(?:, grad norm ([\d.]+))?$", out, re.MULTILINE)
    losses = [float(loss) for loss, _ in told]
    assert len(losses) == EPOCHS and losses[-1] < 0.8 * losses[0]
    if example.library is not None:
        assert all(float(norm) > 0 for _, norm in told)
    (accuracy,) = re.findall(rf"^{example.told}accuracy (\S+)$", out, re.MULTILINE)
    assert 0.1 < float(accuracy) <= 1  # better than chance


@pytest.mark.parametrize("name", [name for name, example in COMMANDS.items() if example.resumes])
@pytest.mark.slow
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(outputs_of, name):
    if is_missing(COMMANDS[name]):
        pytest.skip(f"{COMMANDS[name].library} is not installed")
    whole, first, second, _ = outputs_of(name)
    assert [*epochs_in(first), *epochs_in(second)] == epochs_in(whole)
    assert second.splitlines()[-1] == whole.splitlines()[-1]


def test_every_example_is_run():
    assert {example.file for example in COMMANDS.values()} == {
        p.name for p in EXAMPLES.glob("*.py")
    }

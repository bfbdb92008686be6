"""The day on a GPU in pieces, each of which ends within minutes and goes on where it stopped.

    python -m benchmarks.gpu_day PIECE [--dry-run] [--minutes M] [--data DIR] [--out DIR] [--again]

a: build, every operation once, the suite, with pytest-xdist a directory at a time, else a file.
b: bad addresses and races, by compute-sanitizer. c: operations beside their peers. d: whole
training steps. e: CIFAR100-LT in full, a run at a time, from packed archives in --data.

What became of each task is written to OUT/gpu_day_PIECE.json as soon as it is known. Exits 0 where
all is done, 1 where something failed, 75 where time was up: the same command goes on. A dry run
takes each task small and on the CPU, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
DRY_RUN = ROOT / "build" / "gpu_dry_run"
PYTHON = sys.executable
WHEELS = ROOT / "build" / "gpu_wheels"  # what `make gpu-wheels` fetched where there is a network

MINUTES = 7.5
TO_STOP = 20.0  # seconds that a task gets to leave a checkpoint
UNFINISHED = 75
TAIL = 20_000  # characters of a task's output that are kept: also the names of many tests

NO_TESTS = 5  # what pytest exits with where it has none to run
AGREES = "and agrees with the reference"  # the last words of tests/gpu_small_run.py
TOOLS = ("memcheck", "racecheck")
DTYPES = ("float32", "float64", "bfloat16", "float16")

# The runs of piece e, and what each adds to a command of `imbsam-fast train cifar100-lt`.
RUNS = {
    "SGD": ["--optimizer", "sgd"],
    "SGD, tail weight 2": ["--optimizer", "sgd-weighted", "--preset", "released"],
    "SAM": ["--optimizer", "sam"],
    "ImbSAM, paper": ["--optimizer", "imbsam"],
    "ImbSAM, released": ["--optimizer", "imbsam", "--preset", "released"],
    "ImbSAM, sampled": ["--optimizer", "imbsam", "--plan", "sampled", "--sample", "0.25"],
    "ImbSAM, every 4th": ["--optimizer", "imbsam", "--perturb-every", "4"],
}
# 500 images of class 0: the packed training images are long-tailed already.
CIFAR100_LT = ["cifar100-lt", "--imbalance-factor", "50", "--model", "resnet32"]
# Of the images that tiny_cifar.py makes: from 4 of the first classes to 1 of the last.
TINY_IMAGES = "tiny_cifar100"
TINY = ["--imbalance-factor", "4", "--largest-class", "4", "--eta", "2", "--batch-size", "50"]


@dataclass
class Task:
    """A command that takes part in a piece; one that goes on where it stopped `resumes`.

    It is done where it exits with one of `codes` and `says`, if anything, is in its output: tools
    that run a program may end well though the program did not.
    """

    name: str
    command: list[str]
    dry: list[str] | None = None  # None: nothing that could run without a GPU
    needs: tuple[str, ...] = ()  # modules and programs
    on_gpu: tuple[str, ...] = ()  # that a dry run does without
    environment: dict[str, str] = field(default_factory=dict)
    resumes: bool = False
    says: str = ""
    codes: tuple[int, ...] = (0,)
    stop: signal.Signals = signal.SIGTERM  # that it is asked to end by
    parts: list[Task] = field(default_factory=list)  # what is done instead, where it did not end

    def missing(self, dry: bool) -> list[str]:
        needs = self.needs if dry else (*self.needs, *self.on_gpu)
        return [n for n in needs if find_spec(n) is None and shutil.which(n) is None]


@dataclass
class Outcome:
    """What became of a task: done, failed, left out or unfinished."""

    status: str
    seconds: float = 0.0
    output: str = ""


def pieces(data: Path, out: Path) -> dict[str, Callable[[], list[Task]]]:
    return {
        "a": build_and_test,
        "b": sanitize,
        "c": lambda: [_script("bench_gpu", out)],
        "d": lambda: [_script("bench_gpu_steps", out)],
        "e": lambda: train(data, out),
    }


def build_and_test() -> list[Task]:
    install = [PYTHON, "-m", "pip", "install", "--no-deps"]
    tasks = []
    if WHEELS.is_dir():
        names = sorted(str(path) for path in WHEELS.glob("*.whl"))
        tasks.append(Task("wheels", [*install, "--no-index", *names]))
    build = [*install, "--no-build-isolation", "--editable", "."]
    needs = ("nvcc", "cmake", "ninja", "pybind11", "setuptools")
    tasks.append(Task("build", build, build, needs, environment={"IMBSAM_CUDA": "ON"}))
    small = [PYTHON, "-m", "tests.gpu_small_run"]
    tasks.append(Task("every operation", small, [*small, "--dry-run"], says=AGREES))
    return [*tasks, *suite(find_spec("xdist") is not None)]


def suite(on_all_cores: bool) -> list[Task]:
    """The tests: a directory at a time on all cores, else a file.

    On Ctrl-C pytest names what has failed by then.
    """
    # The names of what failed are the last words, which are kept.
    pytest = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "-q", "-rfE"]
    pytest += ["--tb=short"]
    together = ["--numprocesses", "auto", "--dist", "loadfile"]

    def task(name: str, words: list[str], needs: list[str], parts: Sequence[Task] = ()) -> Task:
        command = [*pytest, *words]
        return Task(
            name, command, [*command, "-m", "quick"], ("pytest", *needs), parts=list(parts),
            codes=(0, NO_TESTS),  # of some files no test is quick
            stop=signal.SIGINT,
        )  # fmt: skip

    groups: dict[str, list[Task]] = {}
    tasks = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name, needs = str(path.relative_to(ROOT)), _imports(path)
        alone = task(name, [name], needs)
        if on_all_cores and all(find_spec(need) for need in needs):
            groups.setdefault(str(path.parent.relative_to(ROOT)), []).append(alone)
        else:
            tasks.append(alone)
    for group, parts in groups.items():
        tasks.append(task(group, [*together, *(part.name for part in parts)], [], parts))
    return tasks


def _imports(path: Path) -> list[str]:
    """What a test file cannot do without, of the packages that a bare machine may lack."""
    text = path.read_text()
    found = [name for name in ("grimp", "hypothesis", "lightning") if f"import {name}" in text]
    return found + [n for n in ("hypothesis",) if f"from {n} import" in text and n not in found]


def sanitize() -> list[Task]:
    tasks = []
    for tool in TOOLS:
        for dtype in DTYPES:
            small = [PYTHON, "-m", "tests.gpu_small_run", "--dtype", dtype]
            sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--tool", tool]
            sanitizer += ["--kernel-name", "kns=imbsam"]  # torch's own kernels take hours
            name = f"{tool}, {dtype}"
            # So that memcheck sees where each tensor ends.
            alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            dry = [*small, "--dry-run"]
            needs = ("compute-sanitizer",)
            tasks.append(
                Task(name, sanitizer + small, dry, (), needs, environment=alone, says=AGREES)
            )
    return tasks


def _script(name: str, out: Path) -> Task:
    command = [PYTHON, "-m", f"benchmarks.{name}", "--resume", "--json", str(out / f"{name}.json")]
    needs = ("rich", "torchvision") if name == "bench_gpu_steps" else ("rich",)
    return Task(name, command, [*command, "--dry-run"], needs, resumes=True)


def train(data: Path, out: Path, seeds: int = 3) -> list[Task]:
    tasks = []
    for seed in range(seeds):
        for name, options in RUNS.items():
            command = [PYTHON, "-m", "imbsam_fast", "train", *CIFAR100_LT, *options]
            command += ["--seed", str(seed), "--resume"]
            folder = name.replace(",", "").replace(" ", "_")
            command += ["--save", str(out / "cifar100_lt" / folder)]
            whole = ["--data-dir", str(data), "--epochs", "200", "--device", "cuda"]
            tiny = str(out / TINY_IMAGES)
            small = ["--data-dir", tiny, *TINY, "--epochs", "2", "--device", "cpu"]
            dry = command + small if seed == 0 else None
            needs = ("rich", "numpy")
            tasks.append(Task(f"{name}, seed {seed}", command + whole, dry, needs, resumes=True))
    return tasks


def tiny_images(out: Path) -> Task:
    """What the dry run of `train` needs."""
    command = [PYTHON, "-m", "benchmarks.tiny_cifar", str(out / TINY_IMAGES)]
    return Task("tiny images", command, command, ("numpy", "PIL"))


# ---------------------------------------------------------------- running them


class Record:
    """The outcomes of a piece, in a file that is never half written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, Outcome] = {}
        if path.exists():
            found = json.loads(path.read_text())
            self.outcomes = {name: Outcome(**outcome) for name, outcome in found.items()}

    def note(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        found = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
        unfinished.write_text(json.dumps(found, indent=1) + "\n")
        unfinished.replace(self.path)
        print(f"{outcome.status:10} {outcome.seconds:6.0f} s  {name}", flush=True)

    def as_parts(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """With the parts of a task that did not end in its place: it would begin anew."""
        for task in tasks:
            known = self.outcomes.get(task.name)
            if task.parts and known is not None and known.status == "unfinished":
                yield from task.parts
            else:
                yield task

    def is_open(self, name: str, again: bool) -> bool:
        status = self.outcomes[name].status if name in self.outcomes else "unfinished"
        return status == "unfinished" or (again and status == "failed")


def run(tasks: Sequence[Task], record: Record, seconds: float, dry: bool, again: bool) -> int:
    """Run what is open, in order, as long as there is time."""
    end = time.monotonic() + seconds
    tasks = list(record.as_parts(tasks))
    for task in tasks:
        if not record.is_open(task.name, again):
            continue
        command = task.dry if dry else task.command
        missing = task.missing(dry)
        if command is None or missing:
            why = f"not there: {', '.join(missing)}" if missing else "nothing to run without a GPU"
            record.note(task.name, Outcome("left out", output=why))
            continue
        if end - time.monotonic() < TO_STOP:
            break
        record.note(task.name, _outcome(task, command, end - TO_STOP))
    names = [task.name for task in tasks]
    if any(record.is_open(name, False) for name in names):
        print("time is up: the same command goes on from here")
        return UNFINISHED
    return int(any(record.outcomes[name].status == "failed" for name in names))


def _outcome(task: Task, command: list[str], end: float) -> Outcome:
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **task.environment}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    stopped = False
    try:
        output, _ = process.communicate(timeout=max(1.0, end - start))
    except subprocess.TimeoutExpired:
        stopped = True
        output = _stop(process, task.stop)
    except BaseException:
        _stop(process, task.stop)
        raise
    if stopped:
        status = "unfinished"
    else:
        done = process.returncode in task.codes and task.says in output
        status = "done" if done else "failed"
    return Outcome(status, time.monotonic() - start, output[-TAIL:])


def _stop(process: subprocess.Popen, how: signal.Signals) -> str:
    """A signal upon which a training leaves a checkpoint; what has not ended by then is killed."""
    os.killpg(process.pid, how)
    try:
        return process.communicate(timeout=TO_STOP - 5)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_day",
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("piece", choices="abcde")
    parser.add_argument("--dry-run", action="store_true", help="small, on the CPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="default: %(default)s")
    parser.add_argument("--data", type=Path, default=Path("data"), help="packed CIFAR-100")
    parser.add_argument("--out", type=Path, help="where results are written")
    parser.add_argument("--again", action="store_true", help="also what has failed")
    args: Any = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes is {args.minutes}, expected more than 0")
    out: Path = (args.out or (DRY_RUN if args.dry_run else RESULTS)).resolve()
    tasks = pieces(args.data.resolve(), out)[args.piece]()
    if args.dry_run and args.piece == "e":
        tasks.insert(0, tiny_images(out))
    kind = "dry_run_" if args.dry_run else ""
    record = Record(out / f"gpu_day_{kind}{args.piece}.json")
    code = run(tasks, record, 60 * args.minutes, args.dry_run, args.again)
    if args.dry_run:
        print(f"dry run of piece {args.piece}: without a GPU, and nothing was measured")
    return code


if __name__ == "__main__":
    sys.exit(main())

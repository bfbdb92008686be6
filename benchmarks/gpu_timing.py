"""Fair timings on an NVIDIA GPU, for benchmarks/bench_gpu*.py.

Times are of the device, between CUDA events, so that waiting for the host counts where a
contestant is launched slower than it runs. In every round each contestant runs once, in a new
order; medians are compared. A contestant that fails is noted and left out. A dry run, for machines
without a GPU, goes the same way with small contests on the CPU, and measures nothing: every figure
that it writes is not a number.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from imbsam_fast.env import environment
from imbsam_fast.ops import dispatch

WARM_UP = 3
Call = Callable[[], object]


@dataclass
class Phase:
    """A call that is timed, and what comes before it and is not."""

    call: Call
    prepare: Call = lambda: None


@dataclass
class Contest:
    """Contestants that do the same, each in one or more phases; made when it is their turn."""

    contestants: dict[str, Callable[[], list[Phase]]]
    bytes: int | None = None  # that cannot be avoided
    images: int | None = None  # in one batch


@dataclass
class Result:
    contest: str
    contestant: str
    ms: float  # median
    launches: int  # kernels and copies on the device; of a graph, those inside it
    peak_bytes: int  # of device memory, above the level before
    gb_per_s: float | None
    percent_of_copy: float | None
    images_per_s: float | None
    samples_ms: list[float] = field(repr=False)


@dataclass
class Failure:
    contest: str
    contestant: str  # empty: the contest could not be made
    error: str


@dataclass
class GpuReport:
    """What one run measured; a dry run, nothing."""

    environment: dict[str, Any]
    rounds: int
    copy_gb_per_s: float
    results: list[Result]
    failures: list[Failure] = field(default_factory=list)
    dry_run: bool = False
    note: str = ""  # what a reader has to know besides


Contests = Callable[[str], Iterator[tuple[str, Callable[[], Contest]]]]  # device -> by name


def save(report: GpuReport, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(asdict(report), indent=1) + "\n")
    unfinished.replace(path)


def load(path: Path) -> GpuReport:
    """What `save` wrote."""
    found = json.loads(path.read_text())
    found["results"] = [Result(**result) for result in found["results"]]
    found["failures"] = [Failure(**failure) for failure in found["failures"]]
    return GpuReport(**found)


def once(phases: list[Phase]) -> None:
    for phase in phases:
        phase.prepare()
        phase.call()


class Gpu:
    """What is measured on."""

    name = "cuda"
    warm_up = WARM_UP

    def ms(self, phases: list[Phase]) -> float:
        total = 0.0
        for phase in phases:
            phase.prepare()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            phase.call()
            end.record()
            torch.cuda.synchronize()
            total += start.elapsed_time(end)
        return total

    def launches(self, phases: list[Phase]) -> int:
        """What the profiler sees on the device."""
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            once(phases)
            torch.cuda.synchronize()
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())

    def peak_bytes(self, phases: list[Phase]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(phases)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def copy_gb_per_s(self, rounds: int, size: int = 2**29) -> float:
        """bytes: size read, size written"""
        source, destination = (torch.ones(size // 4, device=self.name) for _ in range(2))
        copy = [Phase(lambda: destination.copy_(source))]
        samples = [self.ms(copy) for _ in range(self.warm_up + rounds)]
        return 2 * size / statistics.median(samples[self.warm_up :]) / 1e6

    def free_memory(self) -> None:
        torch.cuda.empty_cache()


class NoGpu(Gpu):
    """Runs on the CPU what would be measured, and tells no figure."""

    name = "cpu"
    warm_up = 0

    def ms(self, phases: list[Phase]) -> float:
        once(phases)
        return math.nan

    def launches(self, phases: list[Phase]) -> int:
        once(phases)
        return 0

    def peak_bytes(self, phases: list[Phase]) -> int:
        return self.launches(phases)

    def copy_gb_per_s(self, rounds: int, size: int = 2**10) -> float:
        return super().copy_gb_per_s(rounds, size)

    def free_memory(self) -> None:
        pass


def ready(name: str, contest: Contest) -> tuple[dict[str, list[Phase]], list[Failure]]:
    """The contestants that could be made and ran once, and why the others did not."""
    made, failures = {}, []
    for contestant, make in contest.contestants.items():
        try:
            phases = make()
            once(phases)
        except Exception as error:
            failures.append(_failure(name, contestant, error))
        else:
            made[contestant] = phases
    return made, failures


def _failure(contest: str, contestant: str, error: Exception) -> Failure:
    traceback.print_exception(error)
    return Failure(contest, contestant, f"{type(error).__name__}: {error}")


def measure(
    name: str, contest: Contest, made: dict[str, list[Phase]], on: Gpu, rounds: int, limit: float
) -> Iterator[Result]:
    samples: dict[str, list[float]] = {contestant: [] for contestant in made}
    order = random.Random(0)
    for number in range(-on.warm_up, rounds):
        for contestant in order.sample(list(samples), len(samples)):
            ms = on.ms(made[contestant])
            if number >= 0:
                samples[contestant].append(ms)
    for contestant, phases in made.items():
        ms = statistics.median(samples[contestant])
        rate = None if contest.bytes is None else contest.bytes / ms / 1e6
        yield Result(
            name, contestant, ms, on.launches(phases), on.peak_bytes(phases), rate,
            None if rate is None else 100 * rate / limit,
            None if contest.images is None else 1e3 * contest.images / ms,
            samples[contestant],
        )  # fmt: skip


def show(result: Result) -> None:
    if math.isnan(result.ms):
        print(f"  {result.contestant:36} ran")
        return
    columns = [f"{result.ms:9.3f} ms {result.launches:5} launches"]
    if result.gb_per_s is not None:
        columns.append(f"{result.gb_per_s:7.0f} GB/s {result.percent_of_copy:5.1f} % of the copy")
    if result.images_per_s is not None:
        columns.append(f"{result.images_per_s:7.0f} images/s")
    print(f"  {result.contestant:36}", *columns, f"{result.peak_bytes / 1e6:8.0f} MB")


def run_script(
    description: str, contests: Contests, rounds: int, argv: Sequence[str] | None = None
) -> int:
    """The command line of a GPU benchmark; `contests` is called with the device.

    Returns 1 where a contestant failed, else 0.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")
    parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    parser.add_argument(
        "--resume", action="store_true", help="keep the contests that --json has, and go on"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="small, on the CPU, one round: to see that it runs"
    )
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise SystemExit(f"--rounds is {args.rounds}, expected at least 1")
    if args.json is None:
        raise SystemExit("--json is missing, expected a file for the results")
    reason = None if args.dry_run else dispatch.available("cuda")["native"]
    if reason is not None:
        raise SystemExit(f"no GPU to measure on: {reason}")
    on, rounds = (NoGpu(), 1) if args.dry_run else (Gpu(), args.rounds)
    report = _begun(args.json, rounds, args.dry_run) if args.resume else None
    if report is None:
        copy = on.copy_gb_per_s(rounds)
        report = GpuReport(environment(), rounds, copy, [], dry_run=args.dry_run)
    if not args.dry_run:
        print(f"device copy: {report.copy_gb_per_s:.0f} GB/s")
    known = {entry.contest for entry in (*report.results, *report.failures)}
    for name, make in contests(on.name):
        if name not in known:
            print(name, flush=True)
            _hold(name, make, on, report)
            save(report, args.json)  # whatever comes next, this is known
            on.free_memory()
    for failure in report.failures:
        print(f"failed: {failure.contest}: {failure.contestant}: {failure.error}")
    if args.dry_run:
        print("dry run: nothing was measured")
    return int(bool(report.failures))


def _hold(name: str, make: Callable[[], Contest], on: Gpu, report: GpuReport) -> None:
    """Hold a contest, and add what it shows to the report."""
    try:
        contest = make()
        made, failures = ready(name, contest)
        results = [*measure(name, contest, made, on, report.rounds, report.copy_gb_per_s)]
    except Exception as error:
        results, failures = [], [_failure(name, "", error)]
    for result in results:
        show(result)
    report.results += results
    report.failures += failures


def _begun(path: Path, rounds: int, dry_run: bool) -> GpuReport | None:
    """What an earlier run on this device and from this commit has measured."""
    if not path.exists():
        return None
    report, now = load(path), environment()
    same = all(report.environment[key] == now[key] for key in ("devices", "versions", "git_commit"))
    if not same or report.rounds != rounds or report.dry_run != dry_run:
        raise SystemExit(f"{path} is of another machine, version or number of rounds: move it away")
    return report

"""Fair timings on an NVIDIA GPU, for benchmarks/bench_gpu*.py.

Times are of the device, between CUDA events, so that waiting for the host counts where a
contestant is launched slower than it runs. In every round each contestant runs once, in a new
order; medians are compared. A dry run, for machines without a GPU, runs every contestant that
the CPU can run once, at a small size, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
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
    """Contestants that do the same, each in one or more phases."""

    name: str
    contestants: dict[str, list[Phase]]
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
class GpuReport:
    """What one run measured."""

    environment: dict[str, Any]
    rounds: int
    copy_gb_per_s: float
    results: list[Result]


def save(report: GpuReport, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(asdict(report), indent=1) + "\n")
    unfinished.replace(path)


def load(path: Path) -> GpuReport:
    """What `save` wrote."""
    found = json.loads(path.read_text())
    return GpuReport(**{**found, "results": [Result(**result) for result in found["results"]]})


def device_ms(phases: list[Phase]) -> float:
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


def once(phases: list[Phase]) -> None:
    for phase in phases:
        phase.prepare()
        phase.call()


def launches(phases: list[Phase]) -> int:
    """What the profiler sees on the device."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        once(phases)
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


def peak_bytes(phases: list[Phase]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once(phases)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_gb_per_s(rounds: int, size: int = 2**29) -> float:
    """bytes: size read, size written"""
    source, destination = (torch.ones(size // 4, device="cuda") for _ in range(2))
    copy = [Phase(lambda: destination.copy_(source))]
    samples = [device_ms(copy) for _ in range(WARM_UP + rounds)]
    return 2 * size / statistics.median(samples[WARM_UP:]) / 1e6


def measure(contest: Contest, rounds: int, limit: float) -> Iterator[Result]:
    samples: dict[str, list[float]] = {name: [] for name in contest.contestants}
    order = random.Random(0)
    for number in range(-WARM_UP, rounds):
        for name in order.sample(list(samples), len(samples)):
            ms = device_ms(contest.contestants[name])
            if number >= 0:
                samples[name].append(ms)
    for name, phases in contest.contestants.items():
        ms = statistics.median(samples[name])
        rate = None if contest.bytes is None else contest.bytes / ms / 1e6
        yield Result(
            contest.name, name, ms, launches(phases), peak_bytes(phases), rate,
            None if rate is None else 100 * rate / limit,
            None if contest.images is None else 1e3 * contest.images / ms,
            samples[name],
        )  # fmt: skip


def show(result: Result) -> None:
    columns = [f"{result.ms:9.3f} ms {result.launches:5} launches"]
    if result.gb_per_s is not None:
        columns.append(f"{result.gb_per_s:7.0f} GB/s {result.percent_of_copy:5.1f} % of the copy")
    if result.images_per_s is not None:
        columns.append(f"{result.images_per_s:7.0f} images/s")
    print(f"  {result.contestant:36}", *columns, f"{result.peak_bytes / 1e6:8.0f} MB")


def run_script(
    description: str,
    contests: Callable[[str], Iterator[Contest]],
    rounds: int,
    argv: Sequence[str] | None = None,
) -> None:
    """The command line of a GPU benchmark; `contests` is called with the device."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")
    parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    parser.add_argument(
        "--resume", action="store_true", help="keep the contests that --json has, and go on"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="once, small, on the CPU: to see that it runs"
    )
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise SystemExit(f"--rounds is {args.rounds}, expected at least 1")
    if args.dry_run:
        _dry_run(contests)
        return
    if args.json is None:
        raise SystemExit("--json is missing, expected a file for the results")
    reason = dispatch.available("cuda")["native"]
    if reason is not None:
        raise SystemExit(f"no GPU to measure on: {reason}")
    report = _begun(args.json, args.rounds) if args.resume else None
    if report is None:
        report = GpuReport(environment(), args.rounds, copy_gb_per_s(args.rounds), [])
    print(f"device copy: {report.copy_gb_per_s:.0f} GB/s")
    measured = {result.contest for result in report.results}
    for contest in contests("cuda"):
        if contest.name not in measured:
            print(contest.name)
            results = [*measure(contest, args.rounds, report.copy_gb_per_s)]
            for result in results:
                show(result)
            report.results += results
            save(report, args.json)  # whatever comes next, this is measured
        del contest
        torch.cuda.empty_cache()


def _begun(path: Path, rounds: int) -> GpuReport | None:
    """What an earlier run on this device and from this commit has measured."""
    if not path.exists():
        return None
    report, now = load(path), environment()
    same = all(report.environment[key] == now[key] for key in ("devices", "versions", "git_commit"))
    if not same or report.rounds != rounds:
        raise SystemExit(f"{path} is of another machine, version or number of rounds: move it away")
    return report


def _dry_run(contests: Callable[[str], Iterator[Contest]]) -> None:
    for contest in contests("cpu"):
        print(contest.name)
        for name, phases in contest.contestants.items():
            once(phases)
            print(f"  {name:36} ran")
    print("dry run: nothing was measured")

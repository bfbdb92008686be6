"""The scripts of benchmarks/: each runs, and what it derives from its numbers is right."""

from __future__ import annotations

import json
import time
from copy import deepcopy

import pytest
import torch
from torch import nn

from benchmarks import (
    bench_growth,
    bench_host,
    bench_memory,
    bench_optimizer,
    bench_split_cross_entropy,
    bench_step,
    tables,
)
from imbsam_fast import ImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.bench.cases import long_tail_batch
from imbsam_fast.bench.measure import LIMIT, Stopwatch, Timing
from imbsam_fast.bench.report import Report, load
from imbsam_fast.bench.script import run_script
from imbsam_fast.bench.shapes import elements

SCRIPTS = [
    pytest.param(bench_optimizer, marks=pytest.mark.slow),  # compiles, as the next and the last
    pytest.param(bench_split_cross_entropy, marks=pytest.mark.slow),
    pytest.param(bench_step, marks=pytest.mark.slow),  # trains
    pytest.param(bench_growth, marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_scripts_run_on_the_shared_harness(script, tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["x", "--quick", "--return-memory", "--json", str(path)])
    summary = getattr(script, "summary", lambda report: ["as in imbsam_fast"])
    assert run_script(script.__file__, script.groups, summary) == 0
    report = load(path)
    assert report.title == script.__name__.partition(".")[2] and report.summary
    assert all(t.ms > 0 for t in report.timings)
    if script is bench_step:
        assert all(set(t.laps_ms) == {"passes", "optimizer"} for t in report.timings)
        assert all(0 < t.laps_ms["optimizer"] < t.ms for t in report.timings)
    else:
        assert all(t.percent_of_limit is not None for t in report.timings)
        with_limits = {t.group for t in report.timings if t.operation == LIMIT}
        assert with_limits == {t.group for t in report.timings}
    assert json.loads(path.read_text())["settings"]["environment"]["versions"]["torch"]


@pytest.mark.quick
def test_the_optimizers_are_timed_in_phases_and_in_steps():
    phases, steps = bench_optimizer.groups(quick=True)
    names, of_steps = ([operation.name for operation in group] for group in (phases, steps))
    assert names[3:] == ["squared_norm", "perturb_", "sgd_update_", "merge_", "grad_check"]
    assert names[:3] == of_steps[:3] == [LIMIT] * 3
    assert of_steps[3:5] == ["ImbSAM optimizer step", "SAM optimizer step"]


# ---------------------------------------------------------------- the host's side


@pytest.mark.quick
def test_the_hosts_side_is_measured_in_processor_time(tmp_path, monkeypatch, capsys):
    path = tmp_path / "bench_host.json"
    monkeypatch.setattr("sys.argv", ["x", "--quick", "--json", str(path)])
    clocks = []
    thread_time = time.thread_time
    monkeypatch.setattr(time, "thread_time", lambda: clocks.append(thread_time()) or clocks[-1])
    assert bench_host.main() == 0
    assert clocks == sorted(clocks) and len(clocks) > 20
    report = load(path)
    assert capsys.readouterr().out.splitlines()[-1].startswith("host: 5 tensors ")
    (line,) = [line for line in report.summary if line.startswith("host: ")]
    whole = report.ms(bench_host.IMBSAM.name, bench_host.ours())
    assert line == f"host: 5 tensors {1e3 * whole:.0f} us"
    calls = {"first_step", "second_step", "third_step"}
    assert all(set(t.laps_ms) <= calls for t in report.timings)
    table = "\n".join(tables.host(report))
    assert "SGD(foreach=True)" in table and "davda54-style SAM" in table
    assert f"| {1e3 * whole:.0f} (" in table


# ---------------------------------------------------------------- growth


def test_growth_shapes_have_the_size_asked_for():
    for size in bench_growth.SIZES[bench_growth.ELEMENTS]:
        shapes = bench_growth.shapes_of(bench_growth.ELEMENTS, size)
        assert (len(shapes), elements(shapes)) == (100, size)
    for size in bench_growth.SIZES[bench_growth.TENSORS]:
        shapes = bench_growth.shapes_of(bench_growth.TENSORS, size)
        assert (len(shapes), elements(shapes)) == (size, 1000 * size)


def test_a_line_through_points_on_a_line_is_that_line():
    sizes = [1, 10, 1000, 100_000]
    line = bench_growth.fit(sizes, [0.25 + 0.5 * n for n in sizes])
    assert line == pytest.approx((0.25, 0.5))


def test_the_fit_weighs_relative_errors():
    # Between 1 + n at small sizes and 10 % more at the largest, the small ones win.
    sizes = [1, 2, 3, 4, 1_000_000]
    line = bench_growth.fit(sizes, [1 + n for n in sizes[:-1]] + [1_100_000])
    assert line.fixed_ms == pytest.approx(1, abs=0.2)
    assert line.ms_each == pytest.approx(1.05, abs=0.06)


def test_one_size_has_no_line():
    with pytest.raises(ValueError, match=r"^sizes is \[5, 5\], expected two or more that differ$"):
        bench_growth.fit([5, 5], [1.0, 2.0])


def test_growth_summary_names_the_fixed_cost_and_the_cost_of_one():
    def timing(axis: str, size: int, ms: float) -> Timing:
        label = bench_growth.label(axis, size)
        return Timing("step", label, "x", ms, {}, [ms], None, None)

    timings = [timing("elements", n, 0.5 + 3e-6 * n) for n in (100_000, 400_000_000)]
    timings += [timing("tensors", n, 0.25 + 2e-3 * n) for n in (1, 10_000)]
    assert bench_growth.summary(Report("", timings)) == [
        "step, x: 500 us and 3 ns for each of the elements",
        "step, x: 250 us and 2 us for each of the tensors",
    ]


# ---------------------------------------------------------------- training steps


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8)).double()


@pytest.mark.quick
@pytest.mark.parametrize("plan", ["joint", "split"])
def test_passes_by_hand_are_those_of_the_plan(plan):
    planned = small_network()
    by_hand = deepcopy(planned)
    split, targets = long_tail_batch(32, 8)
    batch = (torch.randn(32, 6, dtype=torch.float64), targets)
    criterion = SplitCrossEntropy(split)
    optimizers = [ImbSAM(torch.optim.SGD(m.parameters(), 0.1), 0.5) for m in (planned, by_hand)]
    step = TrainStep(planned, criterion, optimizers[0], plan)
    if plan == "joint":
        passes = bench_step.joint_by_hand(by_hand, criterion, optimizers[1])
    else:
        passes = bench_step.split_by_hand(by_hand, criterion, optimizers[1], batch)
    start = deepcopy(list(planned.parameters()))
    for _ in range(3):
        step(*batch)
        passes(*batch)
    for p, q, before in zip(planned.parameters(), by_hand.parameters(), start):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        assert (p - before).abs().max() > 1e-3


def test_every_contestant_trains_a_network_of_its_own():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, bench_step.CLASSES))
    operation = bench_step.operation("x", network, 8, 0.25, split_is_exact=True)
    assert list(operation.contestants) == [
        bench_step.SGD, bench_step.SAM, bench_step.AUTHORS, bench_step.JOINT,
        bench_step.JOINT_BY_HAND, bench_step.SPLIT, bench_step.SPLIT_BY_HAND,
    ]  # fmt: skip
    assert operation.memory
    before = [p.clone() for p in network.parameters()]
    for contestant in operation.contestants.values():
        watch = Stopwatch()
        contestant(watch)
        assert set(watch.laps) == {bench_step.PASSES, bench_step.OPTIMIZER}
    assert all(map(torch.equal, before, network.parameters()))


def test_split_contestants_are_left_out_where_the_plan_is_another_algorithm():
    operation = bench_step.operation("x", small_network(), 8, 0.25, split_is_exact=False)
    assert not {bench_step.SPLIT, bench_step.SPLIT_BY_HAND} & set(operation.contestants)
    cheaper = {*bench_step.SAMPLED.values(), bench_step.EVERY_4TH}
    assert cheaper < set(operation.contestants)


def test_where_steps_differ_a_contestant_takes_the_mean_of_several():
    operation = bench_step.operation("x", small_network(), 8, 0.25, split_is_exact=False)
    contestant = operation.contestants[bench_step.EVERY_4TH]
    calls: list[None] = []
    contestant.step = lambda *batch: calls.append(None)
    ticks = iter([0.0, 8.0])
    watch = Stopwatch(lambda: next(ticks))
    contestant(watch)
    assert len(calls) == 4 and watch.laps == {bench_step.PASSES: 2.0}


# ---------------------------------------------------------------- memory


def test_live_bytes_are_those_of_the_tensors_that_are_alive():
    kept = torch.zeros(1000)  # 4,000 bytes
    with bench_memory.LiveBytes(kept) as count:
        assert count.live == 4000
        view = kept[:10].view(2, 5)  # of memory that is counted
        first = kept + 1
        assert count.live == count.peak == 8000
        del first
        second = [torch.ones(500), kept.double()]
        assert count.live == count.peak == 4000 + 2000 + 8000
        del second, view
        assert count.live == 4000
        weight = torch.ones(1000, requires_grad=True)
        (weight * kept).sum().backward()  # the product, then the gradient: 4,000 each, and scalars
        assert 12000 <= count.live < 12020
        assert count.peak < 16020
    kept + 1
    assert 12000 <= count.live < 12020


def test_memory_is_counted_for_every_contestant(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert bench_memory.main(["--quick", "--json", str(path)]) == 0
    report = load(path)
    assert [m.contestant for m in report.memory] == list(bench_memory.CONTESTANTS)
    found = {m.contestant: m for m in report.memory}
    for m in report.memory:
        assert 2 * m.weight_bytes < m.kept_bytes < m.peak_bytes < 7 * m.weight_bytes
    n = found[bench_step.SGD].weight_bytes
    kept = {who: round(m.kept_bytes / n) for who, m in found.items()}
    assert kept == {who: 4 if who == bench_step.AUTHORS else 2 for who in found}
    assert found[bench_memory.LEAN_SPLIT].peak_bytes < 4.1 * n < found[bench_step.SPLIT].peak_bytes
    assert capsys.readouterr().out.splitlines() == report.summary
    again = bench_memory.main(["--quick", "--json", str(path)])
    assert again == 0 and load(path).memory == report.memory

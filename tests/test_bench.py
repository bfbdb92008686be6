"""The harness on a clock of its own, the peers against ours, and quick runs of everything."""

from __future__ import annotations

import ctypes
import importlib.util
import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from imbsam_fast import (
    ClassSplit,
    ImbSAM,
    SplitCrossEntropy,
    TrainStep,
    bench,
    bench_cases,
    bench_measure,
    cli,
)
from imbsam_fast.bench_measure import (
    COPY,
    WARM_UP_ROUNDS,
    Contestant,
    Operation,
    OtherLoad,
    Stopwatch,
    keep_freed_memory,
    measure,
)
from imbsam_fast.peers import (
    AuthorsSequence,
    BooleanMasking,
    RowWeights,
    authors_training_step,
    plain_training_step,
)

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


# ---------------------------------------------------------------- parameter shapes


def test_resnet50_with_8142_classes_has_161_tensors_of_40_million_elements():
    shapes = bench_cases.resnet50_shapes(8142)
    assert len(shapes) == 161
    assert bench_cases.elements(shapes) == 40_190_990
    assert shapes[0] == (64, 3, 7, 7) and shapes[-2:] == [(8142, 2048), (8142,)]


def test_shapes_have_the_published_number_of_parameters():
    assert bench_cases.elements(bench_cases.resnet50_shapes(1000)) == 25_557_032
    assert bench_cases.elements(bench_cases.resnet32_shapes(10)) == 464_154


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


def test_medians_leave_out_warm_up_and_preparation():
    clock = FakeClock()
    times = [50.0] * WARM_UP_ROUNDS + [0.4, 0.1, 0.2]
    operation = Operation("op", "size", {"x": sleeper(clock, *times)}, calls=10)
    (timing,) = measure([operation], rounds=3, clock=clock)
    assert timing.samples_ms == pytest.approx([120, 30, 60])  # 3 x seconds / 10 calls
    assert timing.ms == pytest.approx(60)
    assert timing.laps_ms == pytest.approx({"a": 20, "b": 40})
    assert timing.gb_per_s is None and timing.percent_of_copy is None


def test_bandwidth_and_ratios_follow_from_the_medians():
    clock = FakeClock()
    n = WARM_UP_ROUNDS + 1
    operations = [
        Operation(COPY, "", {"copy": sleeper(clock, *[1.0] * n)}, bytes=30 * 10**9),
        Operation(
            "op",
            "",
            {"ours": sleeper(clock, *[2.0] * n), "peer": sleeper(clock, *[5.0] * n)},
            bytes=15 * 10**9,
        ),
    ]
    copy, ours, peer = measure(operations, rounds=1, clock=clock)
    assert (copy.gb_per_s, ours.gb_per_s, peer.gb_per_s) == pytest.approx((10, 2.5, 1))
    assert (copy.percent_of_copy, ours.percent_of_copy) == pytest.approx((100, 25))
    assert (copy.ratio, ours.ratio, peer.ratio) == pytest.approx((1, 1, 2.5))


def test_contestants_take_turns_in_changing_order():
    clock, log, rounds = FakeClock(), [], 20
    times = [1.0] * (WARM_UP_ROUNDS + rounds)
    contestants = {name: sleeper(clock, *times, log=log) for name in "abc"}
    measure([Operation("op", "", contestants)], rounds, clock=clock)
    turns = [tuple(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert all(set(turn) == set(contestants.values()) for turn in turns)
    assert len(set(turns)) > 1


def test_freed_memory_is_kept_where_the_c_library_can(monkeypatch):
    calls = []

    class Library:
        def __init__(self, name):
            pass

        def mallopt(self, parameter, value):
            calls.append((parameter, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert keep_freed_memory()
    assert calls == [(-1, -1), (-4, 0)]  # M_TRIM_THRESHOLD: never, M_MMAP_MAX: none
    monkeypatch.delattr(Library, "mallopt")
    assert not keep_freed_memory()


def test_load_of_other_processes_is_what_this_one_did_not_use(monkeypatch):
    times = {
        "perf_counter": iter([100.0, 110.0]),
        "busy": iter([50.0, 65.0]),
        "own": iter([1.0, 6.0]),
    }
    monkeypatch.setattr(bench_measure.time, "perf_counter", lambda: next(times["perf_counter"]))
    monkeypatch.setattr(bench_measure, "_busy_seconds", lambda: next(times["busy"]))
    monkeypatch.setattr(bench_measure, "_own_seconds", lambda: next(times["own"]))
    with OtherLoad() as others:
        pass
    assert others.cores == pytest.approx(1.0)  # (15 - 5) CPU seconds in 10 seconds


def test_a_busy_machine_is_mentioned():
    others = OtherLoad()
    assert bench._warnings(others) == []
    others.cores = 1.25
    assert "other processes kept 1.2 cores busy" in bench._warnings(others)[0]


# ---------------------------------------------------------------- the contestants


def test_every_call_of_a_step_finds_gradients(monkeypatch):
    seen = []

    class Recorder:
        def __init__(self, base, rho):
            self.params = base.param_groups[0]["params"]

        def record(self):
            seen.append([p.grad is not None for p in self.params])
            for p in self.params:
                p.grad = None

        first_step = second_step = third_step = record

    monkeypatch.setattr(bench_cases, "ImbSAM", Recorder)
    operation = bench_cases.step_operation([(2, 3), (4,)], calls=2)
    operation.contestants[bench_cases.ours()](Stopwatch())
    assert seen == [[True, True]] * 6


def test_targets_have_the_share_of_tail_rows_asked_for():
    split, targets = bench_cases.long_tail_batch(200, 31, tail_fraction=0.43)
    assert int(split.tail_mask(targets).sum()) == 86
    assert int(targets.min()) >= 0 and int(targets.max()) < 31


@pytest.mark.parametrize("peer", [BooleanMasking, RowWeights])
def test_losses_of_peers_equal_ours(peer):
    torch.manual_seed(0)
    split, targets = bench_cases.long_tail_batch(16, 10)
    logits = torch.randn(16, 10, dtype=torch.float64, requires_grad=True)
    ours, theirs = SplitCrossEntropy(split)(logits, targets), peer(split)(logits, targets)
    for part, expected in zip(ours, theirs):
        torch.testing.assert_close(part, expected)
        gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (part, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("fused", [None, True])
def test_authors_training_step_gives_our_weights(fused):
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    theirs, plain = deepcopy(ours), deepcopy(ours)
    split, targets = bench_cases.long_tail_batch(32, 8)
    batches = [torch.randn(32, 6, dtype=torch.float64) for _ in range(6)]

    base = bench_cases.sgd(list(theirs.parameters()), fused)
    authors = authors_training_step(theirs, BooleanMasking(split), AuthorsSequence(base, rho=0.5))
    optimizer = ImbSAM(bench_cases.sgd(list(ours.parameters())), rho=0.5)
    step = TrainStep(ours, SplitCrossEntropy(split), optimizer, plan="joint")
    sgd_step = plain_training_step(plain, bench_cases.sgd(list(plain.parameters())))
    for inputs in batches:
        step(inputs, targets)
        authors(inputs, targets)
        sgd_step(inputs, targets)
    for p, q, r in zip(ours.parameters(), theirs.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        assert (p - r).abs().max() > 1e-4  # the perturbation made a difference


def test_plain_training_step_is_ours_without_tail_classes():
    torch.manual_seed(0)
    ours = nn.Linear(6, 8).double()
    plain = deepcopy(ours)
    targets, optimizer = torch.randint(0, 8, (32,)), ImbSAM(bench_cases.sgd([*ours.parameters()]))
    step = TrainStep(ours, SplitCrossEntropy(ClassSplit.none()), optimizer)
    sgd_step = plain_training_step(plain, bench_cases.sgd([*plain.parameters()]))
    for _ in range(3):
        inputs = torch.randn(32, 6, dtype=torch.float64)
        step(inputs, targets)
        sgd_step(inputs, targets)
    torch.testing.assert_close(ours.weight, plain.weight, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------- quick runs


def test_quick_run_writes_what_it_measured(tmp_path, capsys):
    path = tmp_path / "results" / "bench.json"
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
        COPY,
        "squared_norm",
        "perturb_",
        "sgd_update_",
        bench_cases.STEP,
        "loss forward",
        "loss forward, head and tail backward",
    }
    limit = timings[0]["gb_per_s"]
    first = {}
    for t in timings:
        assert len(t["samples_ms"]) == 2
        assert t["ms"] == pytest.approx(sum(t["samples_ms"]) / 2)
        assert t["gb_per_s"] == pytest.approx(t["bytes"] / t["ms"] / 1e6)
        assert t["percent_of_copy"] == pytest.approx(100 * t["gb_per_s"] / limit)
        assert t["ratio"] == pytest.approx(t["ms"] / first.setdefault(t["operation"], t["ms"]))
    step = [t for t in timings if t["operation"] == bench_cases.STEP]
    assert all(set(t["laps_ms"]) == {"first_step", "second_step", "third_step"} for t in step)
    ratios = {t["contestant"]: t["ratio"] for t in step}
    fused, default = (ratios[c] for c in (bench_cases.AUTHORS_FUSED, bench_cases.AUTHORS))
    assert f"{fused:.2f} times faster" in report["summary"][0]
    assert f"{default:.2f} times with default SGD" in report["summary"][0]


def test_no_rounds_are_refused():
    with pytest.raises(SystemExit, match="--rounds is 0, expected at least 1"):
        cli.main(["bench", "--rounds", "0"])


@pytest.mark.skipif(not SCRIPTS.exists(), reason="benchmarks/ is not part of the package")
@pytest.mark.parametrize("name", ["bench_optimizer", "bench_split_cross_entropy", "bench_step"])
def test_scripts_run_on_the_shared_harness(name, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", [name, "--quick", "--return-memory", "--json", str(path)])
    summary = script.summary if name == "bench_step" else bench_cases.default_summary
    assert bench.run_script(script.__file__, script.operations, summary) == 0
    report = json.loads(path.read_text())
    assert report["title"] == name and report["summary"]
    assert all(t["ms"] > 0 for t in report["timings"])

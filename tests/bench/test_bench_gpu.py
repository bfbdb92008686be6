"""benchmarks/bench_gpu.py as far as it runs without a GPU: its contestants do the same work."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checks import TOLERANCE
from conftest import INTERPRETER_ERROR
from torch import Tensor, nn

from benchmarks import bench_gpu, bench_gpu_steps, gpu_tables, gpu_timing
from benchmarks import report as documents

SHAPES = [(30, 4), (5,), (2, 3, 3)]
needs_what_is_there = pytest.mark.skipif(
    INTERPRETER_ERROR is not None, reason="Triton's interpreter does not run here"
)


def after(step: Callable[[bench_gpu.Optimizer], None]) -> list[Tensor]:
    torch.manual_seed(0)
    x = bench_gpu.Optimizer(SHAPES, "cpu")
    step(x)
    return [*x.theta, *x.m]


def compiled_step(x: bench_gpu.Optimizer) -> None:
    x.perturb_for_compile()
    x.update_for_compile()


@pytest.mark.parametrize("step", [bench_gpu.Optimizer.foreach, compiled_step])
def test_peers_step_like_ours(step: Callable[[bench_gpu.Optimizer], None]) -> None:
    tolerance = 10 * TOLERANCE[torch.float32]
    expected = after(bench_gpu.Optimizer.fused_kernels)
    torch.testing.assert_close(after(step), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fused", [False, True])
def test_the_authors_phases(fused: bool) -> None:
    x = bench_gpu.Optimizer(SHAPES, "cpu")
    phases = x.authors(fused)
    for _ in range(2):  # every phase finds the gradients that it needs
        for phase in phases:
            phase.prepare()
            phase.call()
    assert len(phases) == 3


@needs_what_is_there
def test_every_optimizer_runs() -> None:
    contest = bench_gpu.optimizer_contest(SHAPES, "cpu")
    assert contest.bytes == 11 * 4 * (120 + 5 + 18)
    del contest.contestants["compiled, reduce-overhead"]  # seconds; below
    made, failures = gpu_timing.ready("optimizer", contest)
    assert len(made) >= 6 and not failures


@needs_what_is_there
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_loss_runs(dtype: torch.dtype) -> None:
    of_labels = bench_gpu.loss_contest(8, 32, dtype, "cpu")
    of_distributions = bench_gpu.soft_loss_contest(8, 32, dtype, "cpu")
    assert of_labels.bytes == 4 * 8 * 32 * dtype.itemsize
    assert of_distributions.bytes == 8 * 32 * (5 * dtype.itemsize + 3 * 4)
    for contest in (of_labels, of_distributions):
        made, failures = gpu_timing.ready("loss", contest)
        assert len(made) >= 3 and not failures


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match=r"^no GPU to measure on: "):
        gpu_timing.run_script("", bench_gpu.contests, 1, ["--json", "x.json"])


# ---------------------------------------------------------------- whole steps


def test_the_networks_of_a_gpu_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    memory = SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    found = list(bench_gpu_steps.networks("cuda"))
    names = ["ResNet-32", "ResNet-50", "ConvNeXt-T", "ViT-B/16"]
    assert [network.name for network in found] == names
    for network in found:
        with torch.device("meta"):
            assert sum(p.numel() for p in network.make().parameters()) > 4e5


@needs_what_is_there
@pytest.mark.slow  # traces for torch.compile
def test_everything_runs_dry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mlp() -> nn.Module:
        hidden = [nn.Linear(3 * 8 * 8, 16), nn.LayerNorm(16)]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(16, 10))

    # Quickly traced; `make gpu-dry-run` takes small networks of the families that are measured.
    tiny = bench_gpu_steps.Network("tiny", mlp, 8, 10, 8, True)
    monkeypatch.setattr(bench_gpu_steps, "small_networks", lambda: [tiny])
    for module in (bench_gpu, bench_gpu_steps):
        path = tmp_path / f"{module.__name__}.json"
        command = ["--dry-run", "--resume", "--json", str(path)]
        assert gpu_timing.run_script("", module.contests, 1, command) == 0
        written = gpu_timing.load(path)
        assert written.dry_run and all(math.isnan(result.ms) for result in written.results)
        held = [name for name, _ in module.contests("cpu")]
        assert list(dict.fromkeys(result.contest for result in written.results)) == held
    printed = capsys.readouterr().out
    assert "authors' loop" in printed and "TrainStep split" in printed
    assert printed.count("nothing was measured") == 2


def contest(log: list[str], *names: str) -> gpu_timing.Contest:
    """Whose contestants say that they run, but for `broken`, which fails."""

    def make(name: str) -> list[gpu_timing.Phase]:
        if name == "broken":
            raise RuntimeError("no such kernel")
        return [gpu_timing.Phase(lambda: log.append(name))]

    return gpu_timing.Contest({name: partial(make, name) for name in names}, bytes=8)


def test_a_benchmark_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    log: list[str] = []
    stopped = True

    def second() -> gpu_timing.Contest:
        if stopped:
            raise KeyboardInterrupt
        return contest(log, "b")

    def contests(device: str) -> Iterator[tuple[str, Callable[[], gpu_timing.Contest]]]:
        yield "first", partial(contest, log, "a")
        yield "second", second

    command = ["--dry-run", "--resume", "--json", str(tmp_path / "x.json")]
    with pytest.raises(KeyboardInterrupt):
        gpu_timing.run_script("", contests, 1, command)
    assert set(log) == {"a"}
    stopped = False
    log.clear()
    assert gpu_timing.run_script("", contests, 1, command) == 0
    assert set(log) == {"b"}
    found = gpu_timing.load(tmp_path / "x.json").results
    assert [(r.contest, r.contestant) for r in found] == [("first", "a"), ("second", "b")]


def test_a_contestant_that_fails_keeps_the_others_from_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[str] = []

    def contests(device: str) -> Iterator[tuple[str, Callable[[], gpu_timing.Contest]]]:
        yield "no memory", lambda: contest(log, "broken").contestants["broken"]()  # type: ignore
        yield "two", partial(contest, log, "broken", "runs")

    path = tmp_path / "x.json"
    assert gpu_timing.run_script("", contests, 1, ["--dry-run", "--json", str(path)]) == 1
    assert "failed: two: broken: RuntimeError: no such kernel" in capsys.readouterr().out
    found = gpu_timing.load(path)
    assert [result.contestant for result in found.results] == ["runs"]
    assert [(f.contest, f.contestant) for f in found.failures] == [
        ("no memory", ""),
        ("two", "broken"),
    ]


# ---------------------------------------------------------------- tables


def report(**more: float) -> gpu_timing.GpuReport:
    environment = {
        "devices": [{"type": "cpu", "name": "Abacus"}, {"type": "cuda", "name": "Loom 9"}],
        "versions": {"imbsam-fast": "1.2.3", "torch": "9.9", "python": "3.14", "cuda": "15.0"},
        "git_commit": "0123456789abcdef",
        "date": "2031-02-03T04:05:06+00:00",
    }
    results = [
        gpu_timing.Result(
            contest=f"net: {kind}", contestant=who, ms=ms, launches=7, peak_bytes=3_210_000_000,
            gb_per_s=2000.4, percent_of_copy=88.6, images_per_s=1234.5, samples_ms=[ms],
        )
        for kind, who, ms in (
            ("eager", "SGD", 100.0), ("eager", "ours", 150.0),
            ("CUDA graph", "SGD", 50.0), ("CUDA graph", "ours", 120.0),
        )
    ]  # fmt: skip
    return gpu_timing.GpuReport(environment, 50, 2300.0, results)


def test_a_saved_report_fills_the_tables(tmp_path: Path) -> None:
    for name in ("bench_gpu", "bench_gpu_steps"):
        gpu_timing.save(report(), tmp_path / "gpu" / f"{name}.json")
    tables = ("gpu-operations", "gpu-steps", "gpu-summary")
    text = "".join(f"<!-- results: {name} -->\n<!-- end -->\n" for name in tables)
    filled, complaints = documents.filled(text, documents.load_results(tmp_path))
    assert complaints == []
    for row in (
        "**net: eager** |  |  |  |  |  |\n| SGD | 100 | 1.00 | 7 | 2000 | 89 % |",
        "| ours | 150 | 1.50 | 7 | 2000 | 89 % |",
        "| ours | 150 | 1.50 | 1234 | 3.21 | 7 |",
        "| SGD | 50 | 0.50 | 1234 | - | 7 |",  # in steps of the eager SGD
        "| ours | 120 | 1.20 | 1234 | - | 7 |",
    ):
        assert row in filled
    assert "Measured (bench_gpu_steps): Loom 9; copy 2300 GB/s; imbsam-fast 1.2.3" in filled


def test_the_summary_compares_ours_with_the_others() -> None:
    def measured(contest: str, **ms: float) -> gpu_timing.GpuReport:
        (known, *_) = report().results
        names = {
            "ours": "imbsam-fast",
            "authors": "authors' sequence",
            "foreach": "foreach and fused SGD",
            "joint": "ImbSAM, TrainStep joint",
            "loop": "authors' loop",
        }
        results = [
            dataclasses.replace(known, contest=contest, contestant=names[name], ms=value)
            for name, value in ms.items()
        ]
        return dataclasses.replace(report(), results=results)

    operations = measured("optimizer, 3 tensors", ours=2.0, authors=41.0, foreach=5.0)
    steps = measured("ResNet-50, b: eager", joint=100.0, loop=107.0)
    steps.results += measured("ResNet-50, b: CUDA graph", joint=90.0).results
    assert gpu_tables.summary(operations, steps)[2:] == [
        "| optimizer, 3 tensors | 2 ms, 89 % | 20.50 | - | 2.50 |",
        "| ResNet-50, b: ImbSAM, TrainStep joint | 100 ms, 89 % | 1.07 | - | - |",
    ]


def test_a_dry_run_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "gpu" / "bench_gpu.json"
    gpu_timing.save(dataclasses.replace(report(), dry_run=True), path)
    with pytest.raises(SystemExit, match="of a dry run, which measured nothing"):
        documents.load_results(tmp_path)


@pytest.mark.quick
def test_without_results_the_tables_say_so() -> None:
    text = "<!-- results: gpu-steps -->\n9000 images/s\n<!-- end -->\n"
    filled, complaints = documents.filled(text, {})
    assert complaints == []
    assert documents.NOT_MEASURED in filled and "9000" not in filled

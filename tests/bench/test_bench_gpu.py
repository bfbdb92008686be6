"""benchmarks/bench_gpu.py as far as it runs without a GPU: its contestants do the same work."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checks import TOLERANCE
from conftest import INTERPRETER_ERROR
from torch import Tensor

from benchmarks import bench_gpu, bench_gpu_steps, gpu_timing
from benchmarks import report as documents
from benchmarks.networks import batch_norm_resnet
from imbsam_fast import ImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.bench import peers
from imbsam_fast.bench.cases import long_tail_batch

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
    contest = bench_gpu.optimizer_contest(SHAPES, "cpu", graphs=False)
    assert contest.name == "optimizer, 3 tensors, 143 elements"
    assert contest.bytes == 11 * 4 * (120 + 5 + 18)
    for phases in contest.contestants.values():
        for phase in phases:
            phase.prepare()
            phase.call()


@needs_what_is_there
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_loss_runs(dtype: torch.dtype) -> None:
    of_labels = bench_gpu.loss_contest(8, 32, dtype, "cpu", graphs=False)
    of_distributions = bench_gpu.soft_loss_contest(8, 32, dtype, "cpu")
    assert of_labels.bytes == 4 * 8 * 32 * dtype.itemsize
    assert of_distributions.bytes == 8 * 32 * (5 * dtype.itemsize + 3 * 4)
    for phases in (*of_labels.contestants.values(), *of_distributions.contestants.values()):
        for phase in phases:
            phase.call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match=r"^no GPU to measure on: "):
        gpu_timing.run_script("", bench_gpu.contests, 1, ["--json", "x.json"])


# ---------------------------------------------------------------- whole steps


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_one_batched_backward_steps_like_the_joint_plan(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = batch_norm_resnet(4).to(dtype)
    split, targets = long_tail_batch(6, 4)
    images = torch.randn(6, 3, 8, 8, dtype=dtype)
    stepped = []
    for batched in (True, False):
        copy = deepcopy(model)
        optimizer = ImbSAM(torch.optim.SGD(copy.parameters(), 0.1, 0.9))
        if batched:
            step = bench_gpu_steps.batched_joint_step(copy, peers.RowWeights(split), optimizer)
        else:
            step = TrainStep(copy, SplitCrossEntropy(split), optimizer, "joint", "twice")
        for _ in range(3):
            step(images, targets)
        stepped.append(list(copy.state_dict().values()))
    torch.testing.assert_close(*stepped)


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
@pytest.mark.slow
def test_everything_runs_dry(capsys: pytest.CaptureFixture[str]) -> None:
    for contests in (bench_gpu.contests, bench_gpu_steps.contests):
        gpu_timing.run_script("", contests, 1, ["--dry-run"])
    printed = capsys.readouterr().out
    assert "authors' loop" in printed and "TrainStep split" in printed
    assert printed.count("nothing was measured") == 2


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
            contest="net: eager", contestant=who, ms=ms, launches=7, peak_bytes=3_210_000_000,
            gb_per_s=2000.4, percent_of_copy=88.6, images_per_s=1234.5, samples_ms=[ms],
        )
        for who, ms in (("SGD", 100.0), ("ours", 150.0))
    ]  # fmt: skip
    return gpu_timing.GpuReport(environment, 50, 2300.0, results)


def test_a_saved_report_fills_the_tables(tmp_path: Path) -> None:
    for name in ("bench_gpu", "bench_gpu_steps"):
        gpu_timing.save(report(), tmp_path / "gpu" / f"{name}.json")
    text = "".join(
        f"<!-- results: {name} -->\n<!-- end -->\n" for name in ("gpu-operations", "gpu-steps")
    )
    filled, complaints = documents.filled(text, documents.load_results(tmp_path))
    assert complaints == []
    assert "| net: eager: ours | 150 | 7 | 2000 | 89 % |" in filled
    assert "| net: eager: ours | 150 | 1.50 | 1234 | 3.21 | 7 |" in filled
    assert "Measured: Loom 9; copy 2300 GB/s; imbsam-fast 1.2.3" in filled


@pytest.mark.quick
def test_without_results_the_tables_say_so() -> None:
    text = "<!-- results: gpu-steps -->\n9000 images/s\n<!-- end -->\n"
    filled, complaints = documents.filled(text, {})
    assert complaints == []
    assert documents.NOT_MEASURED in filled and "9000" not in filled

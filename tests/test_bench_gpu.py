"""benchmarks/bench_gpu.py as far as it runs without a GPU: its contestants do the same work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checks import TOLERANCE
from torch import Tensor

bench_gpu = pytest.importorskip("benchmarks.bench_gpu", reason="only in the checkout")

SHAPES = [(30, 4), (5,), (2, 3, 3)]


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


def test_every_optimizer_runs() -> None:
    contest = bench_gpu.optimizer_contest(SHAPES, "cpu", graphs=False)
    assert contest.name == "optimizer, 3 tensors, 143 elements"
    assert contest.bytes == 11 * 4 * (120 + 5 + 18)
    for phases in contest.contestants.values():
        for phase in phases:
            phase.prepare()
            phase.call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_loss_runs(dtype: torch.dtype) -> None:
    contest = bench_gpu.loss_contest(8, 32, dtype, "cpu", graphs=False)
    assert contest.bytes == 4 * 8 * 32 * dtype.itemsize
    for phases in contest.contestants.values():
        for phase in phases:
            phase.call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench_gpu", "--json", "x.json"])
    with pytest.raises(SystemExit, match=r"^no GPU to measure on: "):
        bench_gpu.main()

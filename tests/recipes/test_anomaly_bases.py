"""The base optimizers of the detectors, and numbers too small to compute with at full speed."""

from __future__ import annotations

from threading import Thread

import pytest
import torch

pytest.importorskip("sklearn")

from imbsam_fast.recipes.anomaly import grid
from imbsam_fast.recipes.anomaly.training import Method, denormals_flushed, make_base

RATE, RHO, EPSILON = 0.01, 0.9, 1e-7  # the last two are Keras's


def flushes(numbers: int = 3) -> bool:
    """Whether any of the threads that halve `numbers` small ones does."""
    halves = torch.full((numbers,), torch.finfo(torch.float32).tiny) / 2
    return halves.count_nonzero().item() < numbers


@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_rmsprop_is_that_of_keras_up_to_2_10(decay):
    """Since 2.11 epsilon is under the root. torch's mean is over ten times as many steps."""
    random = torch.Generator().manual_seed(0)
    start = torch.randn(7, dtype=torch.float64, generator=random)
    gradients = torch.randn(20, 7, dtype=torch.float64, generator=random)
    gradients *= torch.logspace(-9, 0, 7, dtype=torch.float64)  # small ones tell epsilons apart
    weight = torch.nn.Parameter(start.clone())
    method = Method("sgd", "rmsprop", RATE, 0.0, 0.05, 1.0, "auto")
    base = make_base(method, [{"params": [weight], "weight_decay": decay}])
    expected = {"2.10": start.clone(), "2.11": start.clone()}
    means = {name: torch.zeros(7, dtype=torch.float64) for name in expected}
    for gradient in gradients:
        weight.grad = gradient.clone()
        base.step()
        for name, w in expected.items():
            g = gradient + decay * w
            v = means[name].mul_(RHO).add_((1 - RHO) * g * g)
            root = v.sqrt() + EPSILON if name == "2.10" else (v + EPSILON).sqrt()
            w -= RATE * g / root
    torch.testing.assert_close(weight.detach(), expected["2.10"], rtol=1e-12, atol=0)
    assert decay or not torch.allclose(weight, expected["2.11"], rtol=1e-3)


def test_denormals_are_flushed_in_a_block_and_the_thread_is_left_as_it_was():
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot flush denormal numbers")
    with denormals_flushed():
        assert flushes()
        # The backward runs in this thread too.
        small = torch.full((3,), 1e-20, requires_grad=True)
        (small * small * 1e-19).sum().backward()
        assert not small.grad.any()
        with denormals_flushed():
            pass
        assert flushes()
    with pytest.raises(RuntimeError, match="inside"), denormals_flushed():
        raise RuntimeError("inside")
    assert not flushes()


def test_torchs_other_threads_stay_as_they_were():
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot flush denormal numbers")
    seen = []

    def work() -> None:  # in a thread, which has torch's other threads for itself
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        with denormals_flushed():
            seen.append(flushes(2**20))
        seen.append(flushes(2**20))
        torch.set_num_threads(before)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True, False]


def test_the_grid_flushes_them_and_leaves_the_process_as_it_was(monkeypatch):
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot flush denormal numbers")
    seen = []
    monkeypatch.setattr(grid, "_fits", lambda job: seen.append(flushes()))
    grid.run_job(None)
    assert seen == [True] and not flushes()

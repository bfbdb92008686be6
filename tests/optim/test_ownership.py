"""Unperturbed weights and the head gradient are kept in memory that nobody else reaches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy
import pytest
import torch
import torch.distributed as dist
from phases import classifier, equal, fill, gradients, one_step, parameters
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from imbsam_fast import ImbSAM, LeanImbSAM
from imbsam_fast.optim.ownership import owned

pytestmark = pytest.mark.usefixtures("one_thread")

# Ways in which somebody else reaches a gradient: each takes p.grad and returns what it keeps.
REACHED: dict[str, Callable[[nn.Parameter], object]] = {
    "the tensor itself": lambda p: p.grad,
    "a detached alias": lambda p: p.grad.detach(),
    "a slice": lambda p: p.grad[:1],
    "NumPy's view": lambda p: p.grad.numpy(),
}


def _zero(kept: object) -> None:
    if isinstance(kept, numpy.ndarray):
        kept[...] = 0
    else:
        kept.zero_()  # type: ignore[attr-defined]


def _steps(params: list[nn.Parameter], optimizer: ImbSAM, between: Callable[[], None]) -> None:
    """Two steps; `between` runs when a gradient came, after the call before."""
    for step in range(2):
        for phase, call in enumerate(
            (optimizer.first_step, optimizer.second_step, optimizer.third_step)
        ):
            fill(params, gradients(3 * step + phase))
            between()
            call()


@pytest.mark.parametrize("optimizer", [ImbSAM, LeanImbSAM])
@pytest.mark.parametrize("reach", REACHED.values(), ids=REACHED)
def test_a_gradient_that_is_kept_and_zeroed_elsewhere(optimizer, reach):
    """As a logger may do, as late as during the last backward."""
    params, expected = parameters(), parameters()
    logged: list[tuple[object, Tensor]] = []

    def log_and_check() -> None:
        for kept, value in logged:  # what a call took is as it was: never weights
            assert numpy.array_equal(numpy.asarray(kept), value.numpy())
            _zero(kept)
        logged.clear()
        for p in params:
            kept = reach(p)
            logged.append((kept, torch.as_tensor(kept).clone()))

    _steps(params, optimizer(torch.optim.SGD(params, lr=0.1, momentum=0.9)), log_and_check)
    _steps(expected, optimizer(torch.optim.SGD(expected, lr=0.1, momentum=0.9)), lambda: None)
    assert equal(params, expected)


@pytest.mark.parametrize("optimizer", [ImbSAM, LeanImbSAM])
@pytest.mark.parametrize("memory", ["torch", "NumPy", "shared"])
def test_a_flat_buffer_that_every_backward_writes_to(optimizer, memory):
    params, expected = parameters(), parameters()
    size = sum(p.numel() for p in params)
    flat = torch.zeros(size, dtype=torch.float64)
    if memory == "NumPy":
        flat = torch.from_numpy(numpy.zeros(size))
    elif memory == "shared":
        flat.share_memory_()
    wrapped = optimizer(torch.optim.SGD(params, lr=0.1, momentum=0.9))
    for step in range(2):
        for phase, call in enumerate((wrapped.first_step, wrapped.second_step, wrapped.third_step)):
            at = 0
            for p, g in zip(params, gradients(3 * step + phase)):
                p.grad = flat[at : at + p.numel()].view_as(p).copy_(g)
                at += p.numel()
            call()
    other = optimizer(torch.optim.SGD(expected, lr=0.1, momentum=0.9))
    for step in range(2):
        one_step(other, expected, step)
    assert equal(params, expected)


def test_two_parameters_may_be_given_one_gradient():
    params, expected = [parameters()[1] for _ in range(2)], [parameters()[1] for _ in range(2)]
    params[1].data += 1
    expected[1].data += 1
    for list_, shared in ((params, True), (expected, False)):
        optimizer = ImbSAM(torch.optim.SGD(list_, lr=0.1))
        g = gradients(0)[1]
        list_[0].grad, list_[1].grad = g, (g if shared else g.clone())
        optimizer.second_step()
        fill(list_, [gradients(1)[1], gradients(2)[1]])
        optimizer.third_step()
    assert equal(params, expected)


@pytest.fixture
def one_rank(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("bias", [True, False], ids=["one bucket", "a bucket of one gradient"])
def test_the_three_calls_over_bucket_views(bias):
    _, criterion, x, y = classifier()
    model = nn.Linear(6, 4, bias=bias).double()
    alone = copy.deepcopy(model)
    ends = []
    for wrap in (lambda m: m, lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True)):
        inner = alone if not ends else model
        forward = wrap(inner)
        optimizer = ImbSAM(torch.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9), rho=0.5)
        for _ in range(3):
            criterion(forward(x), y).head.backward()
            optimizer.first_step()
            criterion(forward(x), y).tail.backward()
            optimizer.second_step()
            criterion(forward(x), y).tail.backward()
            optimizer.third_step()
        ends.append(list(inner.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-13)


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    attention = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    image = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    return {
        "attention": (attention, torch.randn(2, 5, 16)),
        "image": (image, torch.randn(4, 3, 9, 9)),
        "channels_last": (copy.deepcopy(image).to(memory_format=torch.channels_last),
                          torch.randn(4, 3, 9, 9).to(memory_format=torch.channels_last)),
        "recurrent": (nn.LSTM(4, 6), torch.randn(3, 2, 4)),
        "embedding": (nn.Embedding(7, 5), torch.arange(6)),
    }  # fmt: skip


@pytest.mark.parametrize("name", networks())
def test_gradients_as_autograd_makes_them_are_not_copied(name):
    model, x = networks()[name]
    for _ in range(2):
        out = model(x)
        out = out[0] if isinstance(out, tuple) else out
        out.square().sum().backward(retain_graph=True)
        taken = [p.grad for p in model.parameters()]
        model.zero_grad()
        assert owned(taken) is taken, [p for p, _ in model.named_parameters()]


def test_none_stays_none_and_only_what_others_reach_is_copied():
    kept = torch.ones(3)
    given = [torch.zeros(2), None, kept, torch.zeros(4)]
    addresses = [None if g is None else g.data_ptr() for g in given]
    found = [None if g is None else g.data_ptr() for g in owned(given)]
    assert [a == b for a, b in zip(addresses, found)] == [True, True, False, True]
    assert owned([None, None]) == [None, None] and owned([]) == []

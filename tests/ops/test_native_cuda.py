"""The compiled backend on CUDA: why it is unavailable, what it refuses, streams and graphs.

What it computes is tested with every other backend (`backend` fixture) where there is a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from checks import assert_same_bits
from samples import DTYPES, KEEPING, RHO, SGD, SHAPES, UPDATES, lists, scalar, with_master
from torch import Tensor

from imbsam_fast import ops
from imbsam_fast.ops import dispatch, native

has_cuda = pytest.mark.skipif(
    native._C is None or not native._C.has_cuda, reason="the module was built without CUDA"
)
on_gpu = pytest.mark.skipif(
    native.reason_unavailable("cuda") is not None, reason=str(native.reason_unavailable("cuda"))
)


# ---------------------------------------------------------------- without a GPU


@has_cuda
def test_built_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native._C, "has_cuda", False)
    reason = dispatch.available("cuda")["native"]
    assert reason == "imbsam_fast.ops._C was built without CUDA (no nvcc there, or IMBSAM_CUDA=OFF)"


@has_cuda
def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert dispatch.available("cuda")["native"] == "this torch was built without CUDA"


@has_cuda
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_the_error_says_so() -> None:
    reason = native.reason_unavailable("cuda")
    assert reason
    with dispatch.use_backend("native"), pytest.raises(RuntimeError) as caught:
        dispatch.select(torch.device("cuda"))
    assert str(caught.value).endswith(f"cannot be used: {reason}")


MEMORY = torch.zeros(64)
A, B = (MEMORY.data_ptr() + offset for offset in (0, 16))
LAST = (0, 0)  # device, stream


@pytest.mark.quick
@has_cuda
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.cuda_squared_norm(0, [4], [0], [], A, *LAST), r"squared_norm: g_t\[0\] is a"),
        (lambda c: c.cuda_squared_norm(0, [4], [A], [], 0, *LAST), "squared_norm: partials is a"),
        (lambda c: c.cuda_squared_norm(9, [4], [A], [], A, *LAST), "squared_norm: dtype is 9"),
        (lambda c: c.cuda_squared_norm(0, [-1], [A], [], A, *LAST), r"squared_norm: numel\[0\] is"),
        (
            lambda c: c.cuda_perturb_(0, [5], [A], [B], [], [], A, 1, 0.1, False, *LAST),
            r"perturb_: theta\[0\] and g_t\[0\] overlap",
        ),
        (
            lambda c: c.cuda_perturb_(0, [4], [A], [B, B], [], [], A, 1, 0.1, False, *LAST),
            "perturb_: g_t has 2 tensors, expected 1",
        ),
        (
            lambda c: c.cuda_merge_(0, [5], [A], [], [], [B], *LAST),
            r"merge_: theta\[0\] and g_p\[0\] overlap",
        ),
        (lambda c: c.cuda_grad_check(0, [4], [], [A], A, 0, *LAST), "grad_check: found_inf is a"),
    ],
)  # fmt: skip
def test_refusals_before_the_device_is_touched(call, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call(native._C)


# ---------------------------------------------------------------- with a GPU


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("name", UPDATES)
def test_updates_have_the_bits_of_the_cpu_kernels(name: str, case: str, dtype: torch.dtype) -> None:
    with dispatch.use_backend("native"):
        expected = UPDATES[name](lists(case, dtype))
        actual = UPDATES[name](lists(case, dtype, "cuda"))
    assert_same_bits([t.cpu() for t in actual], expected)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("name", KEEPING)
def test_master_weights_have_the_bits_of_the_cpu_kernels(
    name: str, case: str, dtype: torch.dtype
) -> None:
    with dispatch.use_backend("native"):
        expected = UPDATES[name](with_master(lists(case, dtype)))
        actual = UPDATES[name](with_master(lists(case, dtype, "cuda")))
    assert_same_bits([t.cpu() for t in actual], expected)


def step(x: SimpleNamespace, lr: Tensor) -> None:
    """The three operations of a step; the gradients stay, but g_p becomes the saved weights."""
    partials = ops.squared_norm(x.g_p)
    ops.perturb_(x.theta, x.g_p, partials, RHO)
    ops.sgd_update_(x.theta, x.g_p, x.g_h, x.saved, x.m, lr, **SGD)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_step_replays(dtype: torch.dtype) -> None:
    captured, eager = (lists("beyond a chunk", dtype, "cuda") for _ in range(2))
    lr = scalar(0.1, "cuda").to(torch.float32)
    with dispatch.use_backend("native"):
        step(lists("beyond a chunk", dtype, "cuda"), lr)  # loads the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(captured, lr)
        for value in (0.1, 0.01):  # the learning rate is read at each replay
            lr.fill_(value)
            graph.replay()
            step(eager, lr)
    for name in ("theta", "g_p", "m"):
        assert_same_bits(getattr(captured, name), getattr(eager, name))


@on_gpu
def test_operations_run_on_the_current_stream() -> None:
    x, expected = (lists("beyond a chunk", torch.float32, "cuda") for _ in range(2))
    lr = scalar(0.1, "cuda")
    stream = torch.cuda.Stream()
    with dispatch.use_backend("native"):
        step(expected, lr)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for t in x.g_p:
                t.mul_(2)  # what comes first on this stream must be seen
            for t in x.g_p:
                t.div_(2)
            step(x, lr)
        stream.synchronize()
    assert_same_bits(x.theta, expected.theta)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_tensors_on_a_device_that_is_not_current() -> None:
    first, second = (lists("odd", torch.float32, f"cuda:{i}") for i in range(2))
    with dispatch.use_backend("native"):
        for x in (first, second):
            step(x, scalar(0.1, x.theta[0].device))
    assert torch.cuda.current_device() == 0
    assert_same_bits([t.cpu() for t in second.theta], [t.cpu() for t in first.theta])

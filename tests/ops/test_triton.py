"""What is particular to the Triton kernels: tables, alignment, many classes, availability."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import assert_same_bits
from conftest import Backend, backends
from samples import (
    DTYPES,
    KEEPING,
    RHO,
    SHAPES,
    SUMS,
    UPDATES,
    class_weights,
    cross_entropy_outputs,
    lists,
    logits_and_targets,
    misaligned,
    scalar,
    tensors,
    with_master,
)
from test_split_cross_entropy import check

import imbsam_fast
from imbsam_fast import ops
from imbsam_fast.ops import dispatch, native
from imbsam_fast.ops.dispatch import use_backend

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_case = pytest.mark.parametrize("case", [case for case in SHAPES if case != "many"])


# ---------------------------------------------------------------- bits


@each_dtype
@each_case
@pytest.mark.parametrize("name", UPDATES)
def test_updates_equal_the_cpu_kernels(
    triton_kernels: Backend, name: str, case: str, dtype: torch.dtype
) -> None:
    """No multiply-add is fused, and divisions and roots are exact."""
    with use_backend("native"):
        expected = UPDATES[name](lists(case, dtype))
    actual = UPDATES[name](lists(case, dtype, triton_kernels.device))
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["odd", "channels_last", "beyond a chunk"])
@pytest.mark.parametrize("name", KEEPING)
def test_updates_with_master_weights_equal_the_cpu_kernels(
    triton_kernels: Backend, name: str, case: str, dtype: torch.dtype
) -> None:
    with use_backend("native"):
        expected = UPDATES[name](with_master(lists(case, dtype)))
    actual = UPDATES[name](with_master(lists(case, dtype, triton_kernels.device)))
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SUMS)
def test_sums_have_the_same_bits_every_time(
    triton_kernels: Backend, name: str, dtype: torch.dtype
) -> None:
    x = lists("beyond a chunk", dtype, triton_kernels.device)
    first = SUMS[name](x)
    for _ in range(3):
        assert_same_bits(SUMS[name](x), first)


def test_losses_have_the_same_bits_every_time(triton_kernels: Backend) -> None:
    first, *others = (
        cross_entropy_outputs(13, 1003, torch.float32, triton_kernels.device) for _ in range(4)
    )
    for outputs in others:
        assert_same_bits(outputs, first)


# ---------------------------------------------------------------- the table of tensors


@pytest.fixture
def uploads(triton_kernels: Backend, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tables that were uploaded since the test began, over empty caches."""
    from imbsam_fast.kernels import launch

    uploaded: list[torch.Tensor] = []
    upload = launch._uploaded

    def recorded(words: torch.Tensor, device: torch.device) -> Any:
        uploaded.append(words)
        return upload(words, device)

    monkeypatch.setattr(launch, "_uploaded", recorded)
    launch._table.cache_clear()
    launch._spans.cache_clear()
    return uploaded


def test_the_table_is_uploaded_once(triton_kernels: Backend, uploads: list[torch.Tensor]) -> None:
    x = lists("odd", torch.float32, triton_kernels.device)
    for _ in range(3):
        ops.merge_(x.theta, x.saved, x.g_h, x.g_p)
    assert [tuple(words.shape) for words in uploads] == [(4, 3), (6, 5)]
    x.g_p[0] = x.g_p[0].clone()
    ops.merge_(x.theta, x.saved, x.g_h, x.g_p)
    assert len(uploads) == 3 and uploads[2][0, 4] == x.g_p[0].data_ptr()
    ops.merge_(x.theta, [], x.g_h, x.g_p)
    assert len(uploads) == 4 and not uploads[3][:, 2].any()


def test_the_same_addresses_with_other_sizes(
    triton_kernels: Backend, uploads: list[torch.Tensor]
) -> None:
    memory = torch.ones(70_000, device=triton_kernels.device)
    for n in (70_000, 3, 40_000):
        assert ops.squared_norm([memory[:n]]).sum().item() == n
    assert len(uploads) == 6


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in ("theta", "saved", "g_h", "m")),
        *(("g_p", d) for d in DTYPES),
    ],
    ids=str,
)
def test_one_misaligned_tensor(triton_kernels: Backend, name: str, dtype: torch.dtype) -> None:
    """Whose records alone say that 16-byte accesses would fail."""

    def run(device: str) -> list[torch.Tensor]:
        x = SimpleNamespace(
            **{
                list_: [torch.cat(tensors("beyond a chunk", dtype, seed)) for _ in range(2)]
                for seed, list_ in enumerate(("theta", "saved", "g_h", "g_p", "m"))
            }
        )
        for list_, tensors_ in vars(x).items():
            offset = 3 if list_ == name else 16
            x.__dict__[list_] = [tensors_[0].to(device), misaligned(tensors_[1], offset).to(device)]
        return UPDATES["sgd_update_"](x)

    with use_backend("reference"):
        expected = run("cpu")
    assert_same_bits(run(triton_kernels.device), expected)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("lr_as", ["number", "tensor"])
def test_lr_as_number_and_tensor(
    triton_kernels: Backend, lr_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lr on the CPU is a number, on a GPU a tensor; without one, the tensor by force."""
    lr = torch.tensor([1 / 3], dtype=torch.float64)
    if lr_as == "tensor":
        lr = lr.to(triton_kernels.device)
        arguments = "imbsam_fast.kernels.updates.lr_arguments"
        monkeypatch.setattr(arguments, lambda lr, device: (0.0, lr))

    def stepped(backend: str) -> list[torch.Tensor]:
        x = lists("odd", torch.float64, triton_kernels.device)
        with use_backend(backend):
            ops.sgd_update_(x.theta, x.saved, x.g_h, x.g_p, x.m, lr, 0.9, 0.0, 0.0, False, False)
        return x.theta

    assert_same_bits(stepped("triton"), stepped("reference"))


def test_perturb_by_no_partial_sums(triton_kernels: Backend) -> None:
    theta, g_t = ([torch.zeros(3, device=triton_kernels.device)] for _ in range(2))
    partials = scalar(0, triton_kernels.device).reshape(1)[:0]
    ops.perturb_(theta, g_t, partials, RHO)
    assert theta[0].eq(0).all()


# ---------------------------------------------------------------- the loss


def test_262144_classes(triton_kernels: Backend) -> None:
    dtype = torch.float32
    logits, targets = logits_and_targets(2, 262_144, dtype, triton_kernels.device)
    plain, sharp, class_weight = class_weights(262_144, dtype, triton_kernels.device)
    targets[0] = 262_143
    check(logits, targets, plain, sharp, class_weight, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shift", range(8))
@pytest.mark.parametrize("classes", [1016, 1024, 2500])
def test_rows_at_every_alignment(
    triton_kernels: Backend, classes: int, shift: int, dtype: torch.dtype
) -> None:
    """Blocks at the edges of a row and inside it, also where the gradient is aligned otherwise."""
    logits, targets = logits_and_targets(2, classes, dtype, triton_kernels.device)
    memory = torch.full((2, classes + 16), float("nan"), dtype=dtype, device=logits.device)
    row = memory[:, shift : shift + classes].copy_(logits)
    check(row, targets, *class_weights(classes, dtype, triton_kernels.device))


@pytest.mark.parametrize("target", [10, 11, -1, 2**40])
def test_target_out_of_range_is_not_hidden(triton_kernels: Backend, target: int) -> None:
    """Raising an error would synchronise the device."""
    logits, targets = logits_and_targets(6, 10, torch.float32, triton_kernels.device)
    targets[4] = target
    weights = class_weights(10, torch.float32, triton_kernels.device)
    head, tail = ops.split_cross_entropy(logits.requires_grad_(), targets, *weights)
    assert head.isnan() and tail.isnan()
    (gradient,) = torch.autograd.grad(head + tail, logits)
    assert gradient.isnan().all(dim=1).tolist() == [i == 4 for i in range(6)]


# ---------------------------------------------------------------- availability


def run_python(code: str, **environment: str) -> list[str]:
    """The lines that `code` prints in a process of its own, without the tests' interpreter."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = str(Path(imbsam_fast.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**inherited, "PYTHONPATH": path, **environment},
    )  # fmt: skip
    return done.stdout.splitlines()


needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or "or newer" in (dispatch.available("cpu")["triton"] or ""),
    reason="a new enough triton is not installed here",
)

WITHOUT_A_GPU = """
import os, sys, torch
before = "triton" in sys.modules
import imbsam_fast
from imbsam_fast.ops import dispatch, native
from imbsam_fast import ops
print(dispatch.available("cpu")["triton"])
print(("triton" in sys.modules) == before)
try:
    with dispatch.use_backend("triton"):
        ops.squared_norm([torch.ones(3)])
except RuntimeError as error:
    print(error)
import imbsam_fast.kernels.operations
os.environ["TRITON_INTERPRET"] = "1"  # too late: the kernels are not made for the interpreter
print(dispatch.available("cpu")["triton"])
"""


@needs_triton
def test_on_the_cpu_only_when_asked_for() -> None:
    reason, not_imported, refused, late = run_python(WITHOUT_A_GPU)
    assert reason.endswith("set TRITON_INTERPRET=1 before triton is imported")
    assert not_imported == "True"
    assert refused == f"backend 'triton' was asked for but cannot be used: {reason}"
    assert late == reason


INTERPRETED = """
import torch
from imbsam_fast.ops import dispatch, native
from imbsam_fast import ops
print(dispatch.available("cpu")["triton"])
print(dispatch.available("cuda")["triton"])
print(ops.squared_norm([torch.ones(3)]).item())
native._C, native._load_error = None, "taken away"
del __import__("os").environ["IMBSAM_BACKEND"]
print(dispatch.backend_name("cpu"))
"""


@pytest.mark.skipif(not backends("triton"), reason="the Triton kernels do not run here")
def test_in_the_interpreter() -> None:
    on_cpu, on_gpu, norm, automatic = run_python(
        INTERPRETED, TRITON_INTERPRET="1", IMBSAM_BACKEND="triton"
    )
    assert on_cpu == "None" and norm == "3.0"
    assert on_gpu.startswith("TRITON_INTERPRET is set")
    assert automatic == "reference"  # never the interpreter


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imbsam_fast.kernels._installed", lambda: False)
    for device in ("cpu", "cuda"):
        assert "triton is not installed" in str(dispatch.available(device)["triton"])
    with use_backend("triton"), pytest.raises(RuntimeError, match="triton is not installed"):
        ops.squared_norm([torch.ones(3)])


def test_automatic_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the compiled module has no kernels for it."""
    monkeypatch.delenv("IMBSAM_BACKEND", raising=False)
    monkeypatch.setattr(native, "reason_unavailable", lambda device_type: "not built for it")
    reasons = {"cuda": None, "mps": "not for mps"}
    monkeypatch.setattr("imbsam_fast.kernels.reason_unavailable", reasons.__getitem__)
    assert dispatch.backend_name("cuda") == "triton"
    assert dispatch.backend_name("mps") == "reference"

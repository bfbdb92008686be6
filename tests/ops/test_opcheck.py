"""torch.library.opcheck of every operator: schema, fake, autograd registration, tracing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import BASES
from conftest import Backend
from samples import (
    DTYPES,
    RHO,
    arguments_of,
    class_weights,
    distributions,
    lists,
    logits_and_targets,
    scalar,
    with_master,
)

from imbsam_fast import ops

OPERATORS = torch.ops.imbsam_fast
Samples = dict[str, Callable[[torch.dtype, str], tuple[Any, ...]]]


def few(dtype: torch.dtype, device: str) -> Any:
    """Two tensors a list, in a layout that is not contiguous."""
    x = lists("channels_last", dtype, device)
    for name, list_ in vars(x).items():
        setattr(x, name, list_[:2])
    return x


def update(
    op: str, dtype: torch.dtype, device: str, few_lists: bool = False, master: bool = False
) -> tuple:
    """The arguments of a fused base, without what may be absent, or with master weights."""
    x = few(dtype, device)
    if master and dtype in (torch.bfloat16, torch.float16):
        with_master(x)
    arguments = {**arguments_of(op, x), "grad_scale": None, "found_inf": None}
    if few_lists:
        base = BASES[op]
        arguments |= {name: [] for name in ("saved", "g_h", *base.optional)}
        if "momentum" in base.settings:
            arguments["momentum"] = 0.0
    else:
        flags = torch.ones(1, device=device), torch.zeros(1, device=device)
        arguments["grad_scale"], arguments["found_inf"] = flags
    names = inspect.signature(getattr(ops, op)).parameters
    return tuple(arguments[name] for name in names)


def perturb_master(dtype: torch.dtype, device: str) -> tuple:
    """With master weights where the dtype allows them."""
    half = dtype in (torch.bfloat16, torch.float16)
    x = with_master(few(dtype, device)) if half else few(dtype, device)
    return x.theta, x.g_p, scalar(2.0, device).reshape(1), RHO, False, x.master if half else [], []


def cross_entropy(dtype: torch.dtype, device: str, options: tuple, rows: int = 6) -> tuple:
    logits, targets = logits_and_targets(rows, 5, dtype, device)
    targets[:2] = -100
    plain, sharp, class_weight = class_weights(5, dtype, device)
    weighted, *rest = options
    return logits, targets, plain, sharp, class_weight if weighted else None, *rest


def backward(dtype: torch.dtype, device: str, parts: tuple[bool, bool], options: tuple) -> tuple:
    logits, targets, *weights = cross_entropy(dtype, device, options)
    b, lse = OPERATORS.split_cross_entropy(logits, targets, *weights)[2:]
    grads = [torch.ones_like(b) if part else None for part in parts]
    return *grads, logits, targets, lse, b, *weights[:-1]


def soft(dtype: torch.dtype, device: str, options: tuple, rows: int = 6) -> tuple:
    logits, q = distributions(rows, 5, dtype, device)
    plain, sharp, class_weight = class_weights(5, dtype, device)
    weighted, *rest = options
    return logits, q, plain, sharp, class_weight if weighted else None, *rest


def soft_backward(
    dtype: torch.dtype, device: str, parts: tuple[bool, bool], options: tuple
) -> tuple:
    logits, q, *weights = soft(dtype, device, options)
    b, numbers = OPERATORS.split_soft_cross_entropy(logits, q, *weights)[2:]
    grads = [torch.ones_like(b) if part else None for part in parts]
    return *grads, logits, q, numbers, b, *weights[:-1]


def adaptive(op: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    x = few(dtype, device)
    if op == "squared_norm":
        return x.g_p, x.theta
    return x.theta, x.g_p, scalar(2.0, device).reshape(1), RHO, True, [], []


SAMPLES: dict[str, Samples] = {
    "squared_norm": {
        "plain": lambda *on: (few(*on).g_p, []),
        "adaptive": lambda *on: adaptive("squared_norm", *on),
    },
    "perturb_": {
        "adaptive": lambda *on: adaptive("perturb_", *on),
        "master": perturb_master,
        "held": lambda *on: (*adaptive("perturb_", *on)[:-1], few(*on).g_h),
    },
    **{
        op: {
            "all": functools.partial(update, op),
            "few": functools.partial(update, op, few_lists=True),
            "master": functools.partial(update, op, master=True),
        }
        for op in BASES
    },
    "merge_": {
        "all": lambda *on: (few(*on).theta, few(*on).saved, few(*on).g_h, few(*on).g_p),
        "few": lambda *on: (few(*on).theta, [], [], few(*on).g_p),
    },
    "grad_check": {
        "all": lambda *on: (few(*on).g_h, few(*on).g_p),
        "tail": lambda *on: ([], few(*on).g_p),
    },
    "split_cross_entropy": {
        "all": lambda *on: cross_entropy(*on, (True, 0.1, -100, 8.0)),
        "few": lambda *on: cross_entropy(*on, (False, 0.0, -100, None)),
        "no rows": lambda *on: cross_entropy(*on, (False, 0.0, -100, None), rows=0),
    },
    "split_cross_entropy_backward": {
        "both": lambda *on: backward(*on, (True, True), (True, 0.1, -100, None)),
        "tail": lambda *on: backward(*on, (False, True), (False, 0.0, -100, None)),
    },
}

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

SAMPLES |= {
    "split_soft_cross_entropy": {
        "all": lambda *on: soft(*on, (True, 0.1, 8.0)),
        "few": lambda *on: soft(*on, (False, 0.0, None)),
        "no rows": lambda *on: soft(*on, (False, 0.0, None), rows=0),
    },
    "split_soft_cross_entropy_backward": {
        "both": lambda *on: soft_backward(*on, (True, True), (True, 0.1, None)),
        "tail": lambda *on: soft_backward(*on, (False, True), (False, 0.0, None)),
    },
}

CASES = [
    pytest.param(op, sample, id=f"{op}-{name}")
    for op, samples in SAMPLES.items()
    for name, sample in samples.items()
]


def test_every_operator_has_samples() -> None:
    schemas = torch._C._jit_get_all_schemas()
    names = {s.name for s in schemas if s.name.startswith("imbsam_fast::")}
    assert {name.partition("::")[2] for name in names} == set(SAMPLES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_opcheck(device: str, op: str, sample: Callable[..., tuple[Any, ...]]) -> None:
    """With the backend of the device; `test_fakes_match` looks at every backend."""
    arguments = sample(torch.float32, device)
    torch.library.opcheck(getattr(OPERATORS, op).default, arguments)


def with_gradients(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    logits, *rest = arguments
    return logits.requires_grad_(), *rest


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["all", "few"])
@pytest.mark.parametrize("op", ["split_cross_entropy", "split_soft_cross_entropy"])
def test_opcheck_of_the_differentiable_operators(device: str, op: str, name: str) -> None:
    arguments = with_gradients(SAMPLES[op][name](torch.float32, device))
    torch.library.opcheck(getattr(OPERATORS, op).default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_fakes_match(
    backend_once: Backend, op: str, sample: Callable[..., tuple[Any, ...]], dtype: torch.dtype
) -> None:
    torch.library.opcheck(
        getattr(OPERATORS, op).default,
        sample(dtype, backend_once.device),
        test_utils=("test_schema", "test_faketensor"),
    )

"""Checks of what TrainStep is given: the optimizer, the autocast context, a batch."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..optim import ImbSAM
from ..optim.around_base import wraps_imbsam
from ..validation import check_whole_number
from .choices import BATCH_NORM_UPDATES, PERTURBATIONS, PLANS
from .wrappers import kind_of


def unwrapped(optimizer: object) -> ImbSAM:
    """The ImbSAM itself; the wrappers of Accelerate and Lightning hold it as `optimizer`.

    Anything else around it would expect its own `step()` to be called.
    """
    inner: Any = optimizer
    while kind_of(inner) is not None:
        inner = inner.optimizer
    if isinstance(inner, ImbSAM):
        return inner
    name = type(inner).__name__
    if wraps_imbsam(inner):
        raise TypeError(
            f"optimizer is {name} around an ImbSAM, whose step() would never run, expected it the "
            f"other way round: ImbSAM({name}(base))"
        )
    raise TypeError(f"optimizer is {name}, expected an ImbSAM")


def check_choices(
    plan: str, batch_norm: str, perturbation: str, micro_batch_size: int | None
) -> None:
    """Refuse what is not one of training.choices, and micro-batches without rows."""
    for name, value, choices in (
        ("plan", plan, PLANS),
        ("batch_norm", batch_norm, BATCH_NORM_UPDATES),
        ("perturbation", perturbation, PERTURBATIONS),
    ):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
    if micro_batch_size is not None:
        check_whole_number("micro_batch_size", micro_batch_size, "an integer >= 1", 1)


def check_autocast(autocast: object) -> None:
    """Refuse what is no context, or one that can be entered once only."""
    if autocast is not None and not isinstance(autocast, AbstractContextManager):
        raise TypeError(f"autocast is {autocast!r}, expected a context manager")
    if isinstance(autocast, contextlib._GeneratorContextManager):
        raise TypeError(
            f"autocast is {autocast!r}, expected one that can be entered for every pass, such "
            "as torch.autocast"
        )


def check_holds_some(optimizer: ImbSAM, model: nn.Module) -> None:
    """Refuse an optimizer that holds no parameter of `model`."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, model.parameters())):
        raise ValueError("optimizer holds no parameter of model, expected those that are trained")


def check_batch(inputs: Any, targets: Tensor) -> None:
    """Refuse targets that are no labels (N,) and inputs without N rows."""
    if not isinstance(targets, Tensor):
        raise ValueError(f"targets is {type(targets).__name__}, expected int64 labels (N,)")
    if targets.dim() != 1 or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {targets.dtype} {tuple(targets.shape)}, expected int64 labels (N,)"
        )
    if targets.shape[0] == 0:
        raise ValueError("targets is empty, expected at least one row")
    tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    if not tensors:
        raise ValueError(
            f"inputs is {type(inputs).__name__}, expected a tensor or a pytree of them"
        )
    for x in tensors:
        if x.dim() == 0 or x.shape[0] != targets.shape[0]:
            raise ValueError(
                f"inputs holds a tensor of shape {tuple(x.shape)}, expected {len(targets)} rows "
                "as in targets"
            )

"""Checks of what TrainStep is given: the optimizer, the autocast context, a batch."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..optim import ImbSAM
from ..optim.imbsam import wraps_imbsam

# Lightning's classes become subclasses of what they wrap.
_WRAPPERS = {
    ("accelerate", "AcceleratedOptimizer"),
    ("lightning", "LightningOptimizer"),
    ("lightning", "_FabricOptimizer"),
    ("pytorch_lightning", "LightningOptimizer"),
    ("lightning_fabric", "_FabricOptimizer"),
}


def unwrapped(optimizer: object) -> ImbSAM:
    """The ImbSAM itself; the wrappers of Accelerate and Lightning hold it as `optimizer`.

    Anything else around it would expect its own `step()` to be called.
    """
    inner: Any = optimizer
    while any((c.__module__.partition(".")[0], c.__name__) in _WRAPPERS for c in type(inner).mro()):
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

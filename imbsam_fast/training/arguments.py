"""Checks of what TrainStep is given: the optimizer, the autocast context, a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import LABELS, is_labels
from ..optim import ImbSAM
from ..optim.around_base import wraps_imbsam
from ..optim.lean import check_whole_gradient
from ..split import ClassSplit
from ..validation import check_bool, check_whole_number
from .choices import BATCH_NORM_UPDATES, PERTURBATIONS, PLANS
from .trees import tensors
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


def check_criterion(criterion: object) -> None:
    """Refuse what has no ClassSplit, or cannot be called."""
    if not callable(criterion) or not isinstance(getattr(criterion, "split", None), ClassSplit):
        raise TypeError(
            f"criterion is {type(criterion).__name__}, expected one with a ClassSplit "
            "as .split, such as SplitCrossEntropy or what split_loss returns"
        )


def check_lean(
    grad_scaler: torch.amp.GradScaler | None, max_norm: float | None, group: object, **used: bool
) -> None:
    """Refuse what a LeanImbSAM cannot do."""
    check_whole_gradient(grad_scaler, max_norm)
    if group is not None:
        raise ValueError(
            "model is DistributedDataParallel, expected a model of one process with a "
            "LeanImbSAM: ranks exchange whole gradients"
        )
    for name, value in used.items():
        if value:
            raise ValueError(f"{name} is True, expected False with a LeanImbSAM")


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


def check_switches(**switches: object) -> None:
    """Refuse what is neither True nor False."""
    for name, value in switches.items():
        check_bool(name, value)


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


def check_batch(inputs: Any, targets: Tensor, criterion: object) -> None:
    """Refuse targets that are no tensor with rows, and inputs without as many.

    The criterion says which targets it takes; one that does not takes labels (N,).
    """
    any_kind = hasattr(criterion, "parts")
    if not isinstance(targets, Tensor):
        raise ValueError(f"targets is {type(targets).__name__}, expected {LABELS}")
    if targets.dim() == 0 or not (any_kind or is_labels(targets)):
        raise ValueError(f"targets is {targets.dtype} {tuple(targets.shape)}, expected {LABELS}")
    if targets.shape[0] == 0:
        raise ValueError("targets is empty, expected at least one row")
    given = tensors(inputs)
    if not given:
        instead = "; take dict(inputs)" if isinstance(inputs, Mapping) else ""
        raise ValueError(
            f"inputs is {type(inputs).__name__}, expected a tensor or a pytree of them{instead}"
        )
    for x in given:
        if x.dim() == 0 or x.shape[0] != targets.shape[0]:
            raise ValueError(
                f"inputs holds a tensor of shape {tuple(x.shape)}, expected {len(targets)} rows "
                "as in targets"
            )

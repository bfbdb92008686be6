"""Normalising layers: which use statistics of the batch, and when running ones change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether a layer of `model` uses batch statistics in its present mode.

    That is a BatchNorm that normalises by them, or a layer that updates running ones.
    """
    return any(
        (isinstance(m, _BatchNorm) and (m.training or m.running_mean is None))
        or _updates_statistics(m)
        for m in model.modules()
        if isinstance(m, _NormBase)
    )


@contextmanager
def frozen_batch_norm_statistics(model: nn.Module) -> Iterator[None]:
    """Inside the block, forward passes leave the running statistics of `model` as they are.

    Training-mode layers still normalise by the batch. Nests, and restores after exceptions.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, expected an nn.Module")
    tracking = _tracking(model)
    # InstanceNorm, unlike BatchNorm, updates what it has whatever the flag says.
    hidden = [(m, m.running_mean, m.running_var) for m in tracking if isinstance(m, _InstanceNorm)]
    try:
        for m in tracking:
            m.track_running_stats = False
        for m, _, _ in hidden:
            m.running_mean = m.running_var = None
        yield
    finally:
        for m in tracking:
            m.track_running_stats = True
        for m, mean, var in hidden:
            m.running_mean, m.running_var = mean, var


@contextmanager
def statistics_where(
    finite: Tensor, model: nn.Module, others: Sequence[Tensor] = ()
) -> Iterator[None]:
    """Undo changes of running statistics inside the block unless `finite`.

    These are the statistics of `model` and `others`, further buffers that it writes to.
    """
    buffers = [*(b for m in _tracking(model) for b in m.buffers(recurse=False)), *others]
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        for b, kept in zip(buffers, before):
            b.copy_(torch.where(finite.to(b.device), b, kept))


def _tracking(model: nn.Module) -> list[_NormBase]:
    """The layers that update running statistics in a forward pass, in their present mode."""
    return [m for m in model.modules() if isinstance(m, _NormBase) and _updates_statistics(m)]


def _updates_statistics(m: _NormBase) -> bool:
    # In eval mode the flag decides which statistics normalise, so it must be left alone.
    return m.training and m.track_running_stats and m.running_mean is not None


def check_batch_norm_is_visible(model: nn.Module) -> None:
    """Raise an error for BatchNorm inside TorchScript, which cannot be seen."""
    for m in model.modules():
        if isinstance(m, torch.jit.ScriptModule) and "BatchNorm" in m.original_name:
            raise TypeError(
                f"model has a {m.original_name} inside TorchScript, where its statistics cannot be "
                "looked after, expected a plain nn.Module"
            )

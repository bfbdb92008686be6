"""The mode in which a trained model is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...training.batch_norm import frozen_batch_norm_statistics
from .settings import BATCH_NORM_MODES


@contextmanager
def looked_at(model: nn.Module, batch_norm: str) -> Iterator[None]:
    """Eval mode inside the block, with BatchNorm by `batch_norm`; everything as before after it.

    "running" normalises by the running statistics, so that rows do not influence each other and
    no result depends on how they are batched. "batch" normalises by the statistics of each
    batch, as training does, without updating the running ones; dropout stays off.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        if batch_norm == "batch":
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.train()
        with frozen_batch_norm_statistics(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_batch_norm(batch_norm: str) -> None:
    """Raise ValueError for anything but one of BATCH_NORM_MODES."""
    if batch_norm not in BATCH_NORM_MODES:
        raise ValueError(
            f"batch_norm is {batch_norm!r}, expected one of {', '.join(BATCH_NORM_MODES)}"
        )

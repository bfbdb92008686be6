"""The work of Lightning's and Accelerate's optimizer wrappers around a step.

TrainStep calls the `ImbSAM` inside the wrapper and not `wrapper.step()`, so it does the rest of
wrapper.step() itself. The classes are known by name, since neither library is needed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_LIGHTNING, _FABRIC, _ACCELERATE = "LightningOptimizer", "_FabricOptimizer", "AcceleratedOptimizer"
_PACKAGES = ("lightning", "pytorch_lightning", "lightning_fabric", "accelerate")


def kind_of(wrapper: object) -> str | None:
    """Which of the known wrappers `optimizer` is; None for an ImbSAM itself."""
    for cls in type(wrapper).__mro__:
        if cls.__module__.partition(".")[0] in _PACKAGES and cls.__name__ in (
            _LIGHTNING, _FABRIC, _ACCELERATE
        ):  # fmt: skip
            return cls.__name__
    return None


class Wrapper:
    """An optimizer as TrainStep was given it; `optimizer` is the ImbSAM inside."""

    def __init__(self, given: Any, optimizer: torch.optim.Optimizer) -> None:
        self.given = given
        self.optimizer = optimizer
        self.kind = kind_of(given)

    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler that the wrapper's own step would use."""
        if self.kind == _ACCELERATE:
            return self.given.scaler
        if self.kind == _LIGHTNING and self.given._strategy is not None:
            return getattr(self.given._strategy.precision_plugin, "scaler", None)
        return None

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """Do what the wrapper does before a step, and after one that succeeds."""
        if self.kind is None:
            yield
            return
        if self.kind == _LIGHTNING:
            yield from self._lightning_step()
        elif self.kind == _FABRIC:
            yield
            for callback in self.given._callbacks:
                if callable(hook := getattr(callback, "on_after_optimizer_step", None)):
                    hook(strategy=self.given._strategy, optimizer=self.optimizer)
        else:
            _check_not_accumulating(self.given)
            yield
        self.given._opt_called = True  # of which a scheduler made for the wrapper asks

    def _lightning_step(self) -> Iterator[None]:
        self.given._on_before_step()  # counts, and starts the profiler
        handle = self.optimizer.register_step_pre_hook(lambda *_: self._before_lightning_update())
        try:
            yield
        finally:
            handle.remove()
        self.given._on_after_step()

    def _before_lightning_update(self) -> None:
        """The hooks `on_before_optimizer_step` of callbacks and of the module."""
        strategy = self.given._strategy
        if strategy is not None:
            strategy.precision_plugin._after_closure(strategy.lightning_module, self.optimizer)

    def note_skipped(self, found_inf: Tensor | None) -> None:
        """Accelerate's schedulers do not step where the optimizer did not."""
        if self.kind == _ACCELERATE and found_inf is not None:
            self.given._is_overflow = bool(found_inf.item())


def _check_not_accumulating(wrapper: Any) -> None:
    if not wrapper.gradient_state.sync_gradients:
        raise RuntimeError(
            "the training step is inside accelerator.accumulate, in a batch that is to be "
            "accumulated only, expected it outside: the perturbation is that of the whole batch; "
            "load larger batches and use TrainStep(micro_batch_size=...)"
        )

"""Hugging Face Accelerate: steps inside `accelerator.accumulate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..losses import SplitLoss
from ..training.plans import StepResult
from ..training.train_step import TrainStep
from .batches import Gathered

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer


class AccumulatedStep:
    """A `TrainStep` for `with accelerator.accumulate(model): result = step(inputs, targets)`.

    The batches that are to be accumulated wait, and the last of them makes one step with all
    their rows: the result is that step's, and None before. Nothing else of a usual loop is left
    but `scheduler.step()`: no `accelerator.backward`, `clip_grad_norm_` or `zero_grad`.

    `accelerator.save_state` and `load_state` include the number of steps. Between the batches of
    one step `save_state` is refused: the batches that wait would be missing after `load_state`.

    Args:
        accelerator: the one that prepared `model` and `optimizer`; its mixed precision, gradient
            scaler and number of accumulated batches are used.
        model: as `accelerator.prepare` returned it.
        criterion: as for TrainStep.
        optimizer: an `ImbSAM`, as `accelerator.prepare` returned it.
        options: further arguments of TrainStep. `max_norm` is the place of
            `accelerator.clip_grad_norm_`, and infinity only measures the norm.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        criterion: Callable[..., SplitLoss],
        optimizer: AcceleratedOptimizer,
        **options: Any,
    ) -> None:
        self.accelerator = accelerator
        self.train_step = TrainStep(model, criterion, optimizer, **options)  # type: ignore[arg-type]
        self.gathered = Gathered()
        accelerator.register_for_checkpointing(self)

    def __call__(self, inputs: Any, targets: Tensor) -> StepResult | None:
        """One batch; the step's result where this was the last one of it."""
        self.gathered.add(inputs, targets)
        return self.gathered.step(self.train_step) if self.accelerator.sync_gradients else None

    def state_dict(self) -> dict[str, int]:
        """That of the TrainStep. RuntimeError between the batches of one step."""
        if len(self.gathered):
            raise RuntimeError(
                f"save_state while {len(self.gathered)} batches wait for their step, expected it "
                "after a step, where accelerator.sync_gradients is True"
            )
        return self.train_step.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where `state_dict` was taken, without the batches that waited here."""
        self.train_step.load_state_dict(state_dict)
        self.gathered.clear()

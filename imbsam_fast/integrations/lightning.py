"""Lightning: a mixin for modules that train by ImbSAM steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..training.plans import StepResult
from ..training.train_step import TrainStep
from .batches import scalars

try:
    import lightning.pytorch as pl
except ModuleNotFoundError:  # its other name
    import pytorch_lightning as pl  # type: ignore[no-redef]


class ImbSAMMixin:
    """To stand before `LightningModule` among the bases: manual optimisation, taken care of.

    A module writes `configure_step` and, in `training_step`, calls `imbsam_step`. Lightning then
    counts the steps (`max_steps`, `global_step`), and profiles, checkpoints and resumes as with
    automatic optimisation. The learning rate schedules of `configure_optimizers` are stepped by
    their interval and frequency, which Lightning leaves to a module with manual optimisation;
    the number of the TrainStep's steps is in checkpoints. Only `ReduceLROnPlateau` stays yours,
    since Lightning drops what it monitors: `self.lr_schedulers().step(metric)`.

    The Trainer's `precision` is that of the passes. In place of its `gradient_clip_val` and
    `accumulate_grad_batches`, which it refuses here, are TrainStep's `max_norm` and
    `micro_batch_size`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self._around_steps = _AroundSteps()

    def configure_step(self) -> TrainStep:
        """The TrainStep of a fit, with `self.optimizers()`; to be written by the module."""
        raise NotImplementedError(
            f"{type(self).__name__} has no configure_step, expected one that returns "
            "TrainStep(self.model, criterion, self.optimizers())"
        )

    def imbsam_step(self, inputs: Any, targets: Tensor, **log_settings: Any) -> StepResult:
        """One step on a batch, for `training_step`, which returns None; its numbers are logged.

        Their names are those of StepResult: loss, head, tail, and of grad_norm and the others
        what the step knows.

        Args:
            inputs: N rows, as for TrainStep.
            targets: of these rows.
            log_settings: those of Lightning's `log_dict`, such as on_epoch, prog_bar, sync_dist.
        """
        result = self._train_step()(inputs, targets)
        self.log_dict(  # type: ignore[attr-defined]
            scalars(result), **{"batch_size": len(targets), **log_settings}
        )
        return result

    def configure_callbacks(self) -> Sequence[Any]:
        """Lightning's hook, with the callback that this mixin needs; add to it by `super()`."""
        return [*super().configure_callbacks(), self._around_steps]  # type: ignore[misc]

    def _train_step(self) -> TrainStep:
        """Made in the first step of a fit, which has optimizers of its own."""
        around = getattr(self, "_around_steps", None)
        if around is None or around not in self.trainer.callbacks:  # type: ignore[attr-defined]
            raise RuntimeError(
                f"{type(self).__name__} did not run __init__ and configure_callbacks of "
                "ImbSAMMixin, expected the mixin before LightningModule among its bases, and "
                "super() where it has its own"
            )
        step = around.step
        if step is None or step.wrapper.given is not self.optimizers():  # type: ignore[attr-defined]
            around.step = step = self.configure_step()
            if around.loaded is not None:
                step.load_state_dict(around.loaded)
                around.loaded = None
        return step


class _AroundSteps(pl.Callback):
    """What Lightning does around steps of automatic optimisation only."""

    def __init__(self) -> None:
        self.step: TrainStep | None = None
        self.loaded: dict[str, int] | None = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _step_schedules(trainer, "step", batch_idx + 1)
        if trainer.is_last_batch:  # before the validation, which may save a checkpoint
            _step_schedules(trainer, "epoch", trainer.current_epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        return self.step.state_dict() if self.step is not None else self.loaded or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict or None


def _step_schedules(trainer: Any, interval: str, number: int) -> None:
    """The schedules of `interval` whose turn it is after so many batches or epochs."""
    for config in trainer.lr_scheduler_configs:
        monitors = isinstance(config.scheduler, ReduceLROnPlateau)
        if config.interval == interval and number % config.frequency == 0 and not monitors:
            trainer.lightning_module.lr_scheduler_step(config.scheduler, None)

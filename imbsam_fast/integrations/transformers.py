"""Hugging Face Transformers: a Trainer whose steps are ImbSAM's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from ..losses import SplitLoss
from ..optim import ImbSAM
from ..training.plans import StepResult
from ..training.train_step import TrainStep
from .batches import Gathered, concatenated

_COUNTS = "imbsam_step.json"  # in a checkpoint, beside Trainer's own files

# Arguments of TrainStep that Trainer decides, and where.
_TRAINERS = {
    "max_norm": "args.max_grad_norm",
    "micro_batch_size": "args.per_device_train_batch_size and args.gradient_accumulation_steps",
    "grad_scaler": "args.fp16",
    "autocast": "args.bf16 or args.fp16",
    "unpack": "nothing, since models of Transformers are called so",
}


class ImbSAMTrainer(Trainer):
    """`transformers.Trainer` with ImbSAM around its optimizer, the one of `args.optim` or yours.

    The criterion is the loss of the training: the model runs without the labels, and the
    criterion gets its `logits` and the labels. Evaluation is Trainer's own, with the model's loss.
    Checkpoints, resuming, mixed precision, schedules and DistributedDataParallel are Trainer's:

    - `args.max_grad_norm` clips the combined gradient; `grad_norm` in the log is its norm, also
      where 0 stands for no clipping.
    - `args.gradient_accumulation_steps` batches make one step with all their rows, and are run
      one after another; its loss counts each row alike. They are padded to one length by the
      `processing_class`, if it has a `pad`, and else need one shape but for the rows.
    - `on_pre_optimizer_step` and `on_optimizer_step` of callbacks come after the step.

    Args:
        args, kwargs: those of Trainer.
        criterion: as for TrainStep.
        rho, adaptive, master_weights: those of ImbSAM.
        step_options: further arguments of TrainStep: plan, same_dropout, perturb_every, or the name
            of another output than `logits`.

    Raises ValueError for settings that exclude each other, and for DeepSpeed and `DataParallel`
    (several GPUs in one process; launch one process for each instead).
    """

    def __init__(
        self,
        *args: Any,
        criterion: Callable[..., SplitLoss],
        rho: float = 0.05,
        adaptive: bool = False,
        master_weights: bool = False,
        step_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.criterion = criterion
        self.imbsam_settings: dict[str, Any] = {
            "rho": rho, "adaptive": adaptive, "master_weights": master_weights
        }  # fmt: skip
        self.step_options = dict(step_options or {})
        self.train_step: TrainStep | None = None
        self.last_result: StepResult | None = None
        self._gathered = Gathered(self._joined)
        self._loaded: dict[str, int] | None = None
        super().__init__(*args, **kwargs)
        self._check()

    def _check(self) -> None:
        for name in self.step_options.keys() & _TRAINERS.keys():
            raise ValueError(f"step_options has {name!r}, expected it in {_TRAINERS[name]}")
        if len(self.label_names) != 1:
            raise ValueError(f"label_names is {self.label_names}, expected one name")
        for name, value, expected in (
            ("compute_loss_func", self.compute_loss_func, None),
            ("args.label_smoothing_factor", self.args.label_smoothing_factor, 0),
        ):
            if value != expected:
                raise ValueError(
                    f"{name} is {value!r}, expected {expected!r}: the loss is the criterion's"
                )
        for name, is_on, reason in (
            ("DeepSpeed", self.is_deepspeed_enabled, "its own optimizer takes the steps"),
            ("DataParallel", self.args.n_gpu > 1, "launch one process for each GPU"),
        ):
            if is_on:
                raise ValueError(f"{name} is on, expected it off with ImbSAM: {reason}")

    # ------------------------------------------------------------ Trainer's hooks

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's, with ImbSAM around it."""
        made = super().create_optimizer(model)
        if not isinstance(getattr(made, "optimizer", made), ImbSAM):  # Accelerate's wrapper is kept
            self.optimizer = ImbSAM(made, **self.imbsam_settings)
        return self.optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, where a step begins."""
        self._gathered.clear()
        return super().get_batch_samples(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Gather a batch, and make the step with the last of it. Returns the step's loss, or 0."""
        model.train()
        self.optimizer.train()
        inputs = dict(self._prepare_inputs(inputs))
        (name,) = self.label_names
        if name not in inputs:
            raise ValueError(f"the batch has {', '.join(inputs)}, expected {name!r} among them")
        targets = inputs.pop(name)
        self._gathered.add(inputs, targets)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=targets.device)
        self.last_result = self._gathered.step(self._train_step(model))
        # Trainer's own step, which follows, finds that none is due.
        self.accelerator.gradient_state._set_sync_gradients(False)
        return self.last_result.loss

    def _train_step(self, model: nn.Module) -> TrainStep:
        step = self.train_step
        if step is None or step.model is not model or step.wrapper.given is not self.optimizer:
            norm = self.args.max_grad_norm
            options = {"logits": "logits", **self.step_options}
            self.train_step = step = TrainStep(
                model, self.criterion, self.optimizer, unpack=True,
                max_norm=norm if norm > 0 else float("inf"), **options,
            )  # fmt: skip
            if self._loaded is not None:
                step.load_state_dict(self._loaded)
        return step

    def _joined(self, batches: list[dict[str, Any]]) -> dict[str, Any]:
        """Batches that a collator padded each to a length of its own, as one."""
        padded_names = getattr(self.processing_class, "model_input_names", ())
        names = [name for name in padded_names if name in batches[0]]
        widths = {tuple(batch[name].shape[1:]) for batch in batches for name in names[:1]}
        if len(widths) < 2 or not hasattr(self.processing_class, "pad"):
            return concatenated(batches)
        rows = [
            dict(zip(names, row)) for batch in batches for row in zip(*(batch[n] for n in names))
        ]
        padded = pad_without_fast_tokenizer_warning(
            self.processing_class, rows, return_tensors="pt"
        ).to(batches[0][names[0]].device)
        others = [{k: v for k, v in batch.items() if k not in names} for batch in batches]
        return {**concatenated(others), **padded}

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        return self._get_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Tensor | None:
        return None if self.last_result is None else self.last_result.grad_norm

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.train_step is not None:
            (Path(output_dir) / _COUNTS).write_text(json.dumps(self.train_step.state_dict()))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = None if checkpoint is None else Path(checkpoint) / _COUNTS
        if path is not None and path.is_file():
            self._loaded, self.train_step = json.loads(path.read_text()), None


if not hasattr(Trainer, "_get_grad_norm"):
    raise ImportError(
        "ImbSAMTrainer needs transformers 5 or newer, whose Trainer has _get_grad_norm"
    )

"""The CUDA graphs of a TrainStep: which passes its step has, and what their graph takes as inputs.

Graphs of the joint plan and of steps between those of `perturb_every` take whole batches. Those of
the split and the sampled plan take the positions of the rows of their parts too, in few sizes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..optim.scaling import in_use
from .cuda_graph import Constants, GraphedSteps, Step, check_capturable, constants_of, grain
from .own_writes import OwnWrites
from .plans import Passes, Plan, StepResult, joint_plan, split_plan
from .rows import Rows, filled, positions
from .sampled import CheaperSteps, plain_plan, sampled_passes


class Runs(Passes, Protocol):
    """The parts of TrainStep that its graphs need."""

    plan: str
    batch_norm: str
    max_norm: float | None
    grad_scaler: torch.amp.GradScaler | None
    cheaper: CheaperSteps
    own_writes: OwnWrites

    def run(self, plan: Plan, inputs: Any, targets: Tensor, rows: Rows) -> StepResult:
        """The passes of one step."""
        ...


class StepGraphs:
    """Steps of `step`, each kind captured for itself.

    Raises ValueError for settings that only the host sees.
    """

    def __init__(self, step: Runs) -> None:
        self.step = step
        device = check_capturable(step.optimizer, in_use(step.grad_scaler))
        kinds: dict[str, Step] = {
            "plain": partial(unconditional, step, plan=plain_plan),
            "joint": partial(unconditional, step),
            "split": partial(split_parts, step),
            "sampled": partial(sampled_part, step),
        }
        self.kinds = {
            name: GraphedSteps(run, device, partial(constants, step)) for name, run in kinds.items()
        }

    def is_blind(self, targets: Tensor) -> bool:
        """Whether a step need not look at the labels, which on a GPU would be a wait."""
        counts_rows = self.step.cheaper.every > 1 and targets.device.type == "cpu"
        return self.step.plan in ("joint", "auto") and not counts_rows

    def blind(self, perturbs: bool, inputs: Any, targets: Tensor) -> StepResult:
        """A step on labels that nobody has looked at."""
        return self.kinds["joint" if perturbs else "plain"](inputs, targets)

    def __call__(
        self, perturbs: bool, inputs: Any, targets: Tensor, rows: Rows
    ) -> StepResult | None:
        """A step on `rows`; None where it has to run as usual."""
        kind = self._kind(rows) if perturbs else "plain"
        labels: Any = targets
        if kind in ("split", "sampled"):
            if not self._has_parts(kind, rows):
                return None
            labels = (targets, *map(positions, self._parts(kind, rows)))
        result = self.kinds[kind](inputs, labels)
        perturbed = perturbs and rows.tail_rows > 0
        return result._replace(tail_share=rows.tail_share, perturbed=perturbed)

    def _kind(self, rows: Rows) -> str:
        plan = self.step.plan
        if plan != "sampled":
            return "split" if plan == "split" else "joint"
        if not rows.tail_rows:
            return "plain"
        return "sampled" if rows.head_rows else "joint"

    def _has_parts(self, kind: str, rows: Rows) -> bool:
        """Whether the parts are known, and what a graph has as a constant is as it expects."""
        step = self.step
        if step.model.training not in step.own_writes.seen or rows.counted != len(rows.tail):
            return False
        return kind == "sampled" or not step.sees_all_rows_at_once()

    def _parts(self, kind: str, rows: Rows) -> list[Tensor]:
        """The split plan's head and tail rows, or the sample, in few sizes: bool (N,) each."""
        sampled = self.step.cheaper.sampled
        if sampled is not None and self.step.sees_all_rows_at_once():
            return [sampled.drawn(rows, few_shapes=True)]
        parts = filled(rows, grain(len(rows.tail)))
        return [parts.head, parts.tail] if kind == "split" else [parts.tail]


def constants(step: Runs) -> Constants:
    """What captured steps do not read from the device."""
    return constants_of(
        step.model, step.optimizer, in_use(step.grad_scaler),
        batch_norm=step.batch_norm, max_norm=step.max_norm,
    )  # fmt: skip


def unconditional(step: Runs, inputs: Any, targets: Tensor, plan: Plan = joint_plan) -> StepResult:
    """A plan with all its passes, whatever the labels say: they are not looked at.

    Without tail rows the tail's gradient is zero, and so is the perturbation.
    """
    all_rows = torch.ones(len(targets), dtype=torch.bool, device="cpu")
    rows = Rows(all_rows, all_rows, len(targets), len(targets), counted=None)
    result = step.run(plan, inputs, targets, rows)
    return result._replace(perturbed=None) if plan is joint_plan else result


def split_parts(step: Runs, inputs: Any, parts: tuple[Tensor, Tensor, Tensor]) -> StepResult:
    """The split plan of a batch all of whose rows count: labels, and each part's positions."""
    targets, head, tail = parts
    rows = Rows(head, tail, len(head), len(tail), counted=len(targets))
    return step.run(split_plan, inputs, targets, rows)


def sampled_part(step: Runs, inputs: Any, parts: tuple[Tensor, Tensor]) -> StepResult:
    """The sampled plan of a batch all of whose rows count: labels, the sample's positions."""
    targets, part = parts
    rows = Rows(part, part, len(targets), len(part), counted=len(targets))
    return step.run(partial(sampled_passes, part=lambda: part), inputs, targets, rows)

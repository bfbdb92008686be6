"""Batches that are gathered until a step is due, and then are one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..training.plans import StepResult
from ..training.train_step import TrainStep


class Gathered:
    """Gradient accumulation for a `TrainStep`: its perturbation is that of all rows together.

    Only inputs and targets wait here, no graph: the passes of the step run in pieces of at most as
    many rows as the largest batch has.

    Args:
        join: makes one batch of the inputs of several.
    """

    def __init__(self, join: Callable[[list[Any]], Any] | None = None) -> None:
        self.join = join or concatenated
        self.batches: list[tuple[Any, Tensor]] = []

    def __len__(self) -> int:
        return len(self.batches)

    def add(self, inputs: Any, targets: Tensor) -> None:
        """One more batch for the step that is due later."""
        self.batches.append((inputs, targets))

    def clear(self) -> None:
        """Forget what was added: there is no step of it."""
        self.batches.clear()

    def step(self, step: TrainStep) -> StepResult:
        """The step of all batches that were added; nothing is left of them, even if it fails."""
        batches, self.batches = self.batches, []
        if len(batches) == 1:
            return step(*batches[0])
        given = step.micro_batch_size
        if given is None:
            step.micro_batch_size = _checked(step, max(len(targets) for _, targets in batches))
        try:
            inputs = self.join([inputs for inputs, _ in batches])
            return step(inputs, concatenated([targets for _, targets in batches]))
        finally:
            step.micro_batch_size = given


def _checked(step: TrainStep, rows: int) -> int:
    """The size of the pieces, where TrainStep would take it as `micro_batch_size`."""
    uses_graphs = step.graphs is not None
    if uses_graphs:
        raise ValueError("cuda_graph is True, expected False where batches are accumulated")
    step.ranks.check(step.plan, rows, step.perturbation, uses_graphs)
    return rows


def concatenated(batches: list[Any]) -> Any:
    """The rows of all batches, each a pytree of tensors.

    Raises ValueError where tensors differ in more than the number of rows.
    """
    return pytree.tree_map(_concatenated, *batches)


def _concatenated(*parts: Any) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0]
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) > 1:
        found = ", ".join(str((len(part), *part.shape[1:])) for part in parts)
        raise ValueError(
            f"the batches to accumulate hold tensors of shapes {found}, expected one shape but for "
            "the rows: pad all batches to one length"
        )
    return torch.cat(parts)


def scalars(result: StepResult) -> dict[str, float | Tensor]:
    """The numbers of a step by name, for a log; what the step does not know is left out."""
    named: Mapping[str, Any] = result._asdict()
    return {
        name: float(value) if isinstance(value, bool) else value
        for name, value in named.items()
        if name != "logits" and value is not None
    }

"""The passes of one training step, in the plans of docs/design.md section 6.

A plan knows the order of passes; what a pass is, and the optimizer's calls, are TrainStep's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..losses import SplitLoss
from ..optim import ImbSAM
from ..optim.scaling import Norms
from ..optim.two_backwards import compiled_for_two_backwards
from .rows import Rows, assemble, take_rows
from .trees import mapped


class StepResult(NamedTuple):
    """Loss, outputs and norms of one step at the unperturbed weights, without gradients.

    Nothing here has waited for the device: what is a tensor is computed there, and waits when it is
    read. The norms are float64, over all parameters and ranks, without a gradient scaler's scale;
    in a step that overflowed they are infinite or not a number. None is what a step does not know:

    - `grad_norm` and `clip_factor` without `max_norm`, which costs a pass over g_h and g_p (2n
      read); `max_norm=float("inf")` measures and clips nothing. A gradient scaler makes that pass
      anyway, and `grad_norm` is known with it.
    - `tail_grad_norm`, which costs nothing, where no tail gradient was taken at these weights: a
      step without tail rows (0 where ranks run its passes all the same) or between those of
      `perturb_every`; and with `adaptive`, where the perturbation has another norm.
    - `tail_share` and `perturbed` in a CUDA graph of the joint plan, which does not look at the
      labels but for `perturb_every`.
    """

    loss: Tensor  # () head + tail
    head: Tensor  # ()
    tail: Tensor  # ()
    # The model's outputs, or their entry `TrainStep(logits=...)`: a row for a row of the batch, in
    # its order.
    logits: Any
    grad_norm: Tensor | None = None  # () of g_h + g_p, before clipping
    tail_grad_norm: Tensor | None = None  # () of g_t over the perturbed groups, sampled: of g_t^S
    clip_factor: Tensor | None = None  # () what g_h + g_p was multiplied with, at most 1
    # Of this process's counted labels, or of their mass in label distributions.
    tail_share: float | None = None
    perturbed: bool | None = None  # whether the step had a perturbed pass


class Passes(Protocol):
    """The parts of TrainStep that plans call."""

    model: nn.Module
    optimizer: ImbSAM

    def micro_batches(self, inputs: Any, targets: Tensor) -> Iterator[tuple[Any, Tensor]]: ...

    def forward(
        self, inputs: Any, targets: Tensor, counted: int | None
    ) -> tuple[Any, SplitLoss]: ...

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None: ...

    def perturb(self, has_tail: bool, subtract: bool = False) -> None: ...

    def sees_all_rows_at_once(self) -> bool: ...

    def tail_rows_suffice(self) -> bool: ...

    def sample_backward(self, inputs: Any, targets: Tensor, counted: int | None) -> None: ...

    def perturbed_backward(self, inputs: Any, targets: Tensor, counted: int | None) -> None: ...

    def update(self) -> Norms: ...


# Runs the passes of one step and the optimizer's calls between them.
Plan = Callable[[Passes, Any, Tensor, Rows], StepResult]


# ---------------------------------------------------------------- the plans


def joint_plan(step: Passes, inputs: Any, targets: Tensor, rows: Rows) -> StepResult:
    """One forward of all rows, a backward per part, one more pass for the tail.

    That pass too is of all rows, unless the tail rows alone give the same.
    """
    head, tail = Gradients(step.optimizer), Gradients(step.optimizer)
    seen = Seen()
    pieces = list(step.micro_batches(inputs, targets))
    for left, (x, y) in zip(reversed(range(len(pieces))), pieces):
        with compiled_for_two_backwards():
            outputs, loss = step.forward(x, y, rows.counted)
        seen.add(outputs, loss.head, loss.tail)
        if rows.head_rows:
            with head.added_up():
                step.backward(loss.head, retain_graph=rows.tail_rows > 0)
            if left == 0:  # before the tail's backward: the optimizer may need g_h no more
                head.hand_over()
                step.optimizer.first_step()
        if rows.tail_rows:
            with tail.added_up():
                step.backward(loss.tail)
    tail.hand_over()
    step.perturb(rows.tail_rows > 0)
    if rows.tail_rows:
        if step.tail_rows_suffice():
            inputs, targets = take_rows(rows.tail, inputs, targets)
        step.perturbed_backward(inputs, targets, rows.counted)
    return updated(step, step_result(rows, seen.head, seen.tail, seen.outputs()))


def split_plan(step: Passes, inputs: Any, targets: Tensor, rows: Rows) -> StepResult:
    """The head rows alone, the tail rows alone, the tail rows again at the perturbed weights."""
    head, tail = Seen(), Seen()
    if rows.head_rows:
        for x, y in step.micro_batches(*take_rows(rows.head, inputs, targets)):
            outputs, loss = step.forward(x, y, rows.counted)
            step.backward(loss.head)
            head.add(outputs, head=loss.head)
        step.optimizer.first_step()
    if rows.tail_rows:
        tail_inputs, tail_targets = take_rows(rows.tail, inputs, targets)
        for x, y in step.micro_batches(tail_inputs, tail_targets):
            outputs, loss = step.forward(x, y, rows.counted)
            step.backward(loss.tail)
            tail.add(outputs, tail=loss.tail)
    step.perturb(rows.tail_rows > 0)
    if rows.tail_rows:
        step.perturbed_backward(tail_inputs, tail_targets, rows.counted)
    outputs = _assemble(rows, len(targets), head, tail)
    return updated(step, step_result(rows, head.head, tail.tail, outputs))


# ---------------------------------------------------------------- what passes leave behind


class Gradients:
    """The gradients of one part, added up over micro-batches.

    With one micro-batch they go from autograd to the optimizer as they are.
    """

    def __init__(self, optimizer: ImbSAM) -> None:
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.sums: list[Tensor | None] | None = None

    @contextmanager
    def added_up(self) -> Iterator[None]:
        """Add the gradients of the backward inside the block to the sums."""
        if self.sums is not None:
            self.hand_over()
        yield
        self.sums = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None

    def hand_over(self) -> None:
        """Move the sums into `p.grad`."""
        for p, total in zip(self.params, self.sums or ()):
            p.grad = total
        self.sums = None


class Seen:
    """Outputs and losses of the unperturbed passes, piece by piece."""

    def __init__(self) -> None:
        self.pieces: list[Any] = []
        self.head: Tensor | None = None
        self.tail: Tensor | None = None

    def add(self, outputs: Any, head: Tensor | None = None, tail: Tensor | None = None) -> None:
        """The outputs and the losses of one more piece."""
        self.pieces.append(mapped(Tensor.detach, outputs))
        if head is not None:
            self.head = head.detach() if self.head is None else self.head + head.detach()
        if tail is not None:
            self.tail = tail.detach() if self.tail is None else self.tail + tail.detach()

    def outputs(self) -> Any:
        """The outputs of all pieces as one."""
        if len(self.pieces) == 1:
            return self.pieces[0]
        return pytree.tree_map(
            lambda *x: torch.cat(x) if isinstance(x[0], Tensor) else x[0], *self.pieces
        )


def _assemble(rows: Rows, size: int, head: Seen, tail: Seen) -> Any:
    """The outputs of the parts as one batch in its original order."""
    if not (head.pieces and tail.pieces):
        return (head if head.pieces else tail).outputs()
    return assemble(rows, size, head.outputs(), tail.outputs())


def step_result(rows: Rows, head: Tensor | None, tail: Tensor | None, outputs: Any) -> StepResult:
    """What a step returns, but for the norms; a part that had no pass is 0.

    Made before the update: a failure here must leave the weights as they were.
    """
    known = next(part for part in (head, tail) if part is not None)
    head, tail = (torch.zeros_like(known) if part is None else part for part in (head, tail))
    return StepResult(head + tail, head, tail, outputs, tail_share=rows.tail_share)


def updated(step: Passes, result: StepResult) -> StepResult:
    """The optimizer's update, whose norms are added to what the step returns."""
    return result._replace(**step.update().as_dict())

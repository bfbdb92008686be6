"""Cheaper than the paper's step: a correction from a sample of the rows, or in some steps only.

What the perturbation adds to the gradient g of all rows is the correction g_p - g_t. The sampled
plan takes it, and epsilon, on a sample S of the batch,

    d = g + g_p^S - g_t^S,    epsilon = rho g_t^S / ||g_t^S||

with all tail rows in S, and head rows drawn at random beside them where rows influence each other.
Without batch statistics head rows would change nothing: S is the tail rows, and d is ImbSAM's.
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from ..optim.two_backwards import compiled_for_two_backwards
from .batch_norm import frozen_batch_norm_statistics, has_batch_statistics
from .plans import Passes, Rows, Seen, StepResult, joint_plan, step_result, take_rows

# A batch of one row has no variance.
LEAST_ROWS = 2


class SampledPlan:
    """All rows forward and backward, then two passes of a sample: 1 + 2 `share` SGD steps.

    Args:
        share: of the batch's rows that the sample has, in (0, 1]; where the tail rows are more,
            the sample is those rows.
        seed: with the number of the step it decides which head rows are drawn, so that a step
            draws the same ones whenever it is taken.
        common: whether g_t is the mean of several ranks'.
    """

    def __init__(self, share: float, seed: int, common: bool = False) -> None:
        self.share = share
        self.seed = seed
        self.common = common
        self.number = 0  # of the step

    def __call__(self, step: Passes, inputs: Any, targets: Tensor, rows: Rows) -> StepResult:
        if not rows.head_rows and not self.common:  # d is g_p, which joint has in two passes
            return joint_plan(step, inputs, targets, rows)
        seen = _all_rows(step, inputs, targets, rows)
        step.optimizer.first_step()
        if rows.tail_rows:
            sample = take_rows(self.drawn(step.model, rows), inputs, targets)
            with frozen_batch_norm_statistics(step.model):
                for x, y in step.micro_batches(*sample):
                    _, loss = step.forward(x, y, rows.counted)
                    step.backward(loss.tail)
        step.perturb(rows.tail_rows > 0, subtract=True)
        if rows.tail_rows:
            step.perturbed_backward(*sample, rows.counted)
        result = step_result(seen.head, seen.tail, seen.outputs())
        step.update()
        return result

    def drawn(self, model: nn.Module, rows: Rows) -> Tensor:
        """The sample, bool (N,): where the model has batch statistics, on the CPU."""
        if not has_batch_statistics(model):
            return rows.tail
        sample = rows.tail.to("cpu", copy=True)
        head = (~sample).nonzero().squeeze(1)
        size = self._size(len(sample), len(sample) - len(head), _is_compiled(model))
        generator = torch.Generator().manual_seed(crc32(f"{self.seed} {self.number}".encode()))
        order = torch.randperm(len(head), generator=generator)
        sample[head[order[: size + len(head) - len(sample)]]] = True
        return sample

    def _size(self, rows: int, tail_rows: int, few_shapes: bool) -> int:
        size = max(round(self.share * rows), min(LEAST_ROWS, rows))
        if tail_rows <= size:
            return size
        if few_shapes:  # a compiled model is compiled for each of them
            return min(-(-tail_rows // size) * size, rows)
        return max(tail_rows, size)


def plain_plan(step: Passes, inputs: Any, targets: Tensor, rows: Rows) -> StepResult:
    """One forward and one backward of head + tail: a step of SGD."""
    seen = _all_rows(step, inputs, targets, rows)
    step.optimizer.first_step()
    result = step_result(seen.head, seen.tail, seen.outputs())
    step.update()
    return result


def _all_rows(step: Passes, inputs: Any, targets: Tensor, rows: Rows) -> Seen:
    """The gradient of head + tail, in `p.grad`."""
    seen = Seen()
    for x, y in step.micro_batches(inputs, targets):
        with compiled_for_two_backwards():  # other steps may run the joint plan on this graph
            outputs, loss = step.forward(x, y, rows.counted)
        seen.add(outputs, loss.head, loss.tail)
        step.backward(loss.head + loss.tail)
    return seen


def _is_compiled(model: nn.Module) -> bool:
    return any(
        getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod")
        for m in model.modules()
    )

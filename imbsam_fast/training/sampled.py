"""Cheaper than the paper's step: a correction from a sample of the rows, or in some steps only.

What the perturbation adds to the gradient g of all rows is the correction g_p - g_t. The sampled
plan takes it, and epsilon, on a sample S of the batch,

    d = g + g_p^S - g_t^S,    epsilon = rho g_t^S / ||g_t^S||

with all tail rows in S, and head rows drawn at random beside them where rows influence each other.
Without batch statistics head rows would change nothing: S is the tail rows, and d is ImbSAM's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from ..optim.two_backwards import compiled_for_two_backwards
from ..validation import check_number, check_whole_number
from .choices import SAMPLE
from .plans import Passes, Seen, StepResult, joint_plan, step_result, updated
from .rows import Rows, take_rows

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
        check_number("sample", share, "a number > 0 and <= 1", lambda x: 0 < x <= 1)
        check_whole_number("sample_seed", seed, "an integer >= 0", 0)

    def __call__(self, step: Passes, inputs: Any, targets: Tensor, rows: Rows) -> StepResult:
        """The passes of one step; see plans.Plan."""
        if not rows.head_rows and not self.common:  # d is g_p, which joint has in two passes
            return joint_plan(step, inputs, targets, rows)

        def part() -> Tensor:
            if step.sees_all_rows_at_once():  # known for good once a pass was seen
                return self.drawn(rows, is_compiled(step.model))
            return rows.tail

        return sampled_passes(step, inputs, targets, rows, part)

    def drawn(self, rows: Rows, few_shapes: bool = False) -> Tensor:
        """The sample for a model that sees all rows at once, bool (N,) on the CPU.

        `few_shapes` fills more tail rows than the share up to a multiple of it: models are
        compiled and steps captured for each size.
        """
        sample = rows.tail.to("cpu", copy=True)
        head = (~sample).nonzero().squeeze(1)
        size = self._size(len(sample), len(sample) - len(head), few_shapes)
        generator = torch.Generator().manual_seed(crc32(f"{self.seed} {self.number}".encode()))
        order = torch.randperm(len(head), generator=generator)
        sample[head[order[: size + len(head) - len(sample)]]] = True
        return sample

    def _size(self, rows: int, tail_rows: int, few_shapes: bool) -> int:
        size = max(round(self.share * rows), min(LEAST_ROWS, rows))
        if tail_rows <= size:
            return size
        if few_shapes:
            return min(-(-tail_rows // size) * size, rows)
        return max(tail_rows, size)


def sampled_passes(
    step: Passes, inputs: Any, targets: Tensor, rows: Rows, part: Callable[[], Tensor]
) -> StepResult:
    """All rows, and twice those of the sample, which `part` tells after the first pass."""
    seen = _all_rows(step, inputs, targets, rows)
    step.optimizer.first_step()
    if rows.tail_rows:
        sample = take_rows(part(), inputs, targets)
        step.sample_backward(*sample, rows.counted)
    step.perturb(rows.tail_rows > 0, subtract=True)
    if rows.tail_rows:
        step.perturbed_backward(*sample, rows.counted)
    return updated(step, step_result(rows, seen.head, seen.tail, seen.outputs()))


class CheaperSteps:
    """Which steps perturb; the number of counted steps decides and is the only state.

    Attributes:
        every: every how many steps one perturbs.
        sampled: the sampled plan of these steps; None for another plan.
        counted: how many steps were taken.
    """

    def __init__(self, every: int) -> None:
        check_whole_number("perturb_every", every, "an integer >= 1", 1)
        self.every = every
        self.sampled: SampledPlan | None = None
        self.counted = 0

    @contextmanager
    def one_step(self, counts: bool) -> Iterator[bool]:
        """Whether the step inside the block perturbs; it counts unless it fails."""
        number = self.counted + counts
        if self.sampled is not None:
            self.sampled.number = number
        yield number % self.every == 0
        self.counted = number

    def state_dict(self) -> dict[str, int]:
        """The number of counted steps."""
        return {"counted_steps": self.counted}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        if not isinstance(state_dict, dict) or "counted_steps" not in state_dict:
            raise ValueError(f"state_dict is {state_dict!r}, expected what state_dict returned")
        counted = state_dict["counted_steps"]
        check_whole_number("state_dict['counted_steps']", counted, "an integer >= 0", 0)
        self.counted = counted


def check_sampled(plan: str, share: float, batch_norm: str) -> None:
    """Refuse a share of samples that are not drawn, and statistics of a sample, not the batch."""
    if plan != "sampled" and share != SAMPLE:
        raise ValueError(
            f"sample is {share!r}, expected {SAMPLE} with plan={plan!r}: it is a setting of "
            "plan='sampled'"
        )
    if plan == "sampled" and batch_norm != "once":
        raise ValueError(f"batch_norm is {batch_norm!r}, expected 'once' with plan='sampled'")


def plain_plan(step: Passes, inputs: Any, targets: Tensor, rows: Rows) -> StepResult:
    """One forward and one backward of head + tail: a step of SGD."""
    seen = _all_rows(step, inputs, targets, rows)
    step.optimizer.first_step()
    return updated(step, step_result(rows, seen.head, seen.tail, seen.outputs()))


def _all_rows(step: Passes, inputs: Any, targets: Tensor, rows: Rows) -> Seen:
    """The gradient of head + tail, in `p.grad`."""
    seen = Seen()
    for x, y in step.micro_batches(inputs, targets):
        with compiled_for_two_backwards():  # other steps may run the joint plan on this graph
            outputs, loss = step.forward(x, y, rows.counted)
        seen.add(outputs, loss.head, loss.tail)
        step.backward(loss.head + loss.tail)
    return seen


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile compiled `model` or a module in it."""
    # `_modules`, for hasattr takes as long as three modules where the name is missing.
    return any(
        getattr(m, "_compiled_call_impl", None) is not None or "_orig_mod" in m._modules
        for m in model.modules()
    )

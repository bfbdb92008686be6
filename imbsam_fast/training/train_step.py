"""TrainStep: one training step, whose passes are those of a plan (plans.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import SplitLoss, check_split_loss
from ..optim import ImbSAM
from ..optim.buckets import params_of
from ..optim.interrupts import uninterrupted
from ..optim.lean import LeanImbSAM
from ..optim.replicas import average_
from ..optim.scaling import Norms, found_inf_of
from ..optim.two_backwards import backward
from ..validation import check_grad_scaler, check_max_norm, check_no_gradient
from .arguments import (
    check_autocast,
    check_batch,
    check_choices,
    check_criterion,
    check_holds_some,
    check_lean,
    check_switches,
    unwrapped,
)
from .auto_plan import split_is_cheaper
from .batch_norm import (
    check_batch_norm_is_visible,
    frozen_batch_norm_statistics,
    has_batch_statistics,
    statistics_where,
)
from .choices import SAMPLE
from .cuda_graph import check_plan
from .data_parallel import Ranks, parts_overlap
from .generators import Draws, Generators
from .model_call import ModelCall
from .own_writes import ChangesItselfError, OwnWrites
from .plans import Plan, StepResult, joint_plan, split_plan
from .rows import Rows, pieces, rows_of
from .sampled import CheaperSteps, SampledPlan, check_sampled, is_compiled, plain_plan
from .step_graphs import StepGraphs
from .wrappers import Wrapper


class TrainStep:
    """One ImbSAM training step: `result = step(inputs, targets)`.

    The model runs as `model(inputs)`; inputs are a tensor or a pytree of tensors whose first
    dimension is the batch, on the model's device. Targets are int64 labels (N,), or what else the
    criterion takes: label distributions, dense labels, yes or no for every class. On the CPU they
    cost no device synchronisation.

    Args:
        model: any module, compiled or not.
        criterion: gives the head and the tail loss, e.g. `SplitCrossEntropy`.
        optimizer: an `ImbSAM`, also as Accelerate or Lightning wrapped it, or a `LeanImbSAM` for
            the least memory, which excludes grad_scaler, max_norm, cuda_graph and
            DistributedDataParallel; under the joint plan micro-batches cost it n more, since both
            gradients are summed at once.
        plan: "joint" runs all rows forward once and both parts backward, then all rows at the
            perturbed weights: exact for every model, 2.67 SGD steps. "split" runs each part's
            rows alone: 1 + f SGD steps (h + 2f where a share h of the rows is in the head
            pass), and the same result where rows do not influence each other; under
            training-mode BatchNorm it is a different algorithm. "auto" takes the cheaper one
            for the batch and the size of the model (joint then perturbs with the tail rows alone
            where rows do not influence each other), but joint where BatchNorm uses the batch's, or
            where a forward pass was seen to write to other buffers of the model or the criterion
            (spectral norm, observers of quantisation, statistics of a layer's own).
            "sampled", NOT THE PAPER where a BatchNorm layer uses batch statistics, runs all rows
            once and takes what the perturbation changes from a sample: 1 + 2 `sample` SGD steps.
        batch_norm: "once" updates running statistics, and all other buffers that a pass writes
            to, in the unperturbed passes only, "twice" in the perturbed pass too (the authors'
            released code).
        autocast: the context in which the model and the criterion run, for example
            `torch.autocast("cuda", torch.bfloat16)`.
        grad_scaler: scales every loss, for float16; it is updated here. A step with a
            gradient that is not finite only restores the weights. None: the one of Accelerate's
            or Lightning's optimizer, if there is one.
        max_norm: clip the combined gradient to this global norm; infinity only measures it, for
            `StepResult.grad_norm`, which costs a pass over both gradients.
        perturbation: under DistributedDataParallel, "global" perturbs every rank along the
            mean of the ranks' tail gradients, as one process with all rows would, "local" each
            along its own, which saves one of the two all-reduces. "global" for sharded weights.
        micro_batch_size: run every pass in pieces of at most so many rows and add up their
            gradients. The perturbation is that of the whole batch, so that the step equals
            the one without pieces wherever rows do not influence each other.
        cuda_graph: capture the whole step as a CUDA graph, one for each shape of the batch after
            three ordinary steps, and replay it, on one GPU; a learning rate must be a tensor on
            the device (`torch.optim.SGD(params, torch.tensor(0.1, device="cuda"))`), which
            schedulers then change in place. Other settings are constants of a graph: steps run as
            usual after one has changed (OneCycleLR's momentum), until they stay the same for three
            steps. Under the joint plan a batch without tail rows costs as much as any other. The
            split plan, for models without batch statistics, is captured for parts of few sizes:
            each is filled up to a multiple of 8 rows, or of a 32nd of the batch, with rows that
            weigh nothing in it; a batch with ignored rows runs as usual, and labels belong on the
            CPU. So is the sampled plan: where tail rows are more than the share `sample`, head rows
            fill the sample up to a whole multiple of that; without batch statistics tail rows are
            filled up as in the split plan. Micro-batches are not captured.
        same_dropout: draw in the perturbed pass what the unperturbed pass of the same rows drew
            from torch's default generators, of the CPU and of the model's devices: a row has one
            dropout mask a step. The generators go on as if there had been one pass.
        sample: the share of the batch, in (0, 1], of plan="sampled": all tail rows, even where they
            are more, and head rows drawn at random beside them. Excludes batch_norm="twice",
            since running statistics see the pass of all rows alone. Another share is an error with
            another plan, which would not read it.
        sample_seed: decides the drawing, with the number of the step.
        unpack: give the model the entries of the inputs one by one: `model(**inputs)` for a dict,
            `model(*inputs)` for a tuple.
        logits: which entry of the model's outputs the criterion gets, and StepResult.logits is: a
            name ("logits" of a Hugging Face ModelOutput, a key of a dict) or a place in a tuple.
        perturb_every: NOT THE PAPER beyond 1. Perturb in every so many steps with tail rows; the
            others are SGD steps on head + tail. Several ranks count every step, and so does
            cuda_graph under the joint plan where labels are on the GPU.

    Accelerate's and Lightning's optimizers count, profile and run their hooks around a step as
    around one of their own; Lightning's `on_before_optimizer_step` runs when step hooks do
    (see `ImbSAM`). A step inside `accelerator.accumulate` that is to accumulate only is refused.

    No gradient may stand in `p.grad` before a step, and none does afterwards. A forward pass that
    writes to inputs or targets which a later pass reads is refused; what it keeps elsewhere than
    in buffers cannot be seen, and is kept twice.

    `state_dict` has the number of steps, which these two go by: a part of their checkpoints.

    A `DistributedDataParallel` model takes part in one step together on all ranks, whatever
    rows each has; every trainable parameter must get a gradient on some rank, and ranks count
    alike, as with DDP itself; it is found around `model` too. So does a model that `fully_shard`
    (FSDP2) spread over ranks before the optimizer was made: there, and with SyncBatchNorm, all
    ranks run all passes, on one row of weight zero where a rank has none. It excludes LeanImbSAM
    and cuda_graph.

    A batch without tail rows costs one SGD step. If anything fails, weights and optimizer state
    are what they were; the running statistics of BatchNorm keep the passes that ran, as after a
    failed step of SGD. Trainable parameters of the model that `optimizer` does not hold gather
    the gradients of all passes, and it does not clear them.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., SplitLoss],
        optimizer: ImbSAM,
        plan: str = "auto",
        batch_norm: str = "once",
        autocast: AbstractContextManager | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        max_norm: float | None = None,
        perturbation: str = "global",
        micro_batch_size: int | None = None,
        cuda_graph: bool = False,
        same_dropout: bool = False,
        sample: float = SAMPLE,
        sample_seed: int = 0,
        perturb_every: int = 1,
        unpack: bool = False,
        logits: str | int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}, expected an nn.Module")
        given, optimizer = optimizer, unwrapped(optimizer)
        check_criterion(criterion)
        check_choices(plan, batch_norm, perturbation, micro_batch_size)
        check_sampled(plan, sample, batch_norm)
        check_autocast(autocast)
        check_switches(cuda_graph=cuda_graph, same_dropout=same_dropout)
        check_grad_scaler(grad_scaler)
        self.wrapper = Wrapper(given, optimizer)
        check_max_norm(max_norm)
        self.ranks = Ranks(model, params_of(optimizer.param_groups))
        check_holds_some(optimizer, model)
        check_batch_norm_is_visible(model)
        self.model = model
        self.call = ModelCall(model, unpack, logits)
        self.criterion = criterion
        self.optimizer = optimizer
        self.plan = plan
        self.batch_norm = batch_norm
        self.autocast = autocast or nullcontext()
        self.grad_scaler = self.wrapper.grad_scaler() if grad_scaler is None else grad_scaler
        self.max_norm = max_norm
        self.perturbation = perturbation
        self.micro_batch_size = micro_batch_size
        self.group = self.ranks.group
        self.ranks.check(plan, micro_batch_size, perturbation, cuda_graph)
        self.cheaper = CheaperSteps(perturb_every)
        if plan == "sampled":
            self.cheaper.sampled = self._sampled(sample, sample_seed)
        self.same_dropout = same_dropout
        self.draws = Draws(Generators(model), same_dropout)
        self.mixes_rows = has_batch_statistics(model)  # in the mode of the present step
        self.own_writes = OwnWrites(
            model, criterion, self.draws.generators, same_everywhere=self.ranks.sharded
        )
        if isinstance(optimizer, LeanImbSAM):
            check_lean(self.grad_scaler, max_norm, self.group, cuda_graph=cuda_graph)
        self.graphs = self._graphs() if cuda_graph else None

    def __call__(self, inputs: Any, targets: Tensor) -> StepResult:
        """One step on a batch: inputs and targets with N rows each."""
        check_batch(inputs, targets, self.criterion)
        self.optimizer.require_idle("a training step")
        check_no_gradient("a training step", params_of(self.optimizer.param_groups))
        self.mixes_rows = has_batch_statistics(self.model)
        with self.wrapper.one_step():
            if self.graphs is not None and self.graphs.is_blind(targets):
                with self.cheaper.one_step(counts=True) as perturbs:
                    return self.graphs.blind(perturbs, inputs, targets)
            rows = rows_of(self.criterion, targets, self.ranks.same_passes)
            # Ranks have tail rows in different steps, and count alike.
            together = self.group is not None or self.ranks.sharded
            with self.cheaper.one_step(counts=rows.tail_rows > 0 or together) as perturbs:
                if self.graphs is not None:
                    result = self.graphs(perturbs, inputs, targets, rows)
                    if result is not None:
                        return result
                plan = self._planned(inputs, rows) if perturbs else plain_plan
                return self.run(plan, inputs, targets, rows)

    def state_dict(self) -> dict[str, int]:
        """The number of steps taken: what `sample` and `perturb_every` go by."""
        return self.cheaper.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.cheaper.load_state_dict(state_dict)

    def run(self, plan: Plan, inputs: Any, targets: Tensor, rows: Rows) -> StepResult:
        """The passes of one step; after a failure the weights are what they were."""
        may_restart = self.plan == "auto" and plan is split_plan
        self.own_writes.begin_step(may_restart, reads_again=rows.tail_rows > 0)
        self.draws.begin_step()
        try:
            with self.ranks.one_step():
                try:
                    return plan(self, inputs, targets, rows)
                except ChangesItselfError:
                    self.draws.begin_step()
                    return self._planned(inputs, rows)(self, inputs, targets, rows)
        except BaseException:
            self.optimizer.restore()
            raise

    def _sampled(self, share: float, seed: int) -> SampledPlan:
        common = self.group is not None and self.perturbation == "global"
        return SampledPlan(share, seed, common)

    def _graphs(self) -> StepGraphs:
        parallel = None if self.group is None else type(self.model).__name__
        check_plan(self.mixes_rows, self.plan, self.micro_batch_size, parallel, self.same_dropout)
        return StepGraphs(self)

    def _planned(self, inputs: Any, rows: Rows) -> Plan:
        if self.cheaper.sampled is not None:
            return self.cheaper.sampled
        if self.plan == "auto" and self.ranks.same_passes:  # ranks decide alike: not by rows
            split = (
                self.micro_batch_size is None
                and not parts_overlap(self.criterion.split)  # type: ignore[attr-defined]
                and not self.sees_all_rows_at_once()
            )
        elif self.plan == "auto":
            split = not self.sees_all_rows_at_once() and self._split_is_cheaper(inputs, rows)
        else:
            split = self.plan == "split"
        return split_plan if split else joint_plan

    def _split_is_cheaper(self, inputs: Any, rows: Rows) -> bool:
        perturbed = rows.tail_rows if self.tail_rows_suffice() else rows.head.shape[0]
        return split_is_cheaper(self.model, inputs, rows, perturbed)

    # ------------------------------------------------------------ what plans are made of

    def sees_all_rows_at_once(self) -> bool:
        """Whether the model gathers something over the rows of a batch, so that parts differ."""
        return self.mixes_rows or bool(self.own_writes.changing)

    def tail_rows_suffice(self) -> bool:
        """Whether the joint plan's perturbed pass runs the tail rows alone.

        Not where each pass has to have the rows of another: on all ranks, with the same dropout, in
        a compiled model, which would be compiled for every number of tail rows.
        """
        asked = self.plan == "auto" and not self.ranks.same_passes and not self.same_dropout
        return asked and not self.sees_all_rows_at_once() and not is_compiled(self.model)

    def micro_batches(self, inputs: Any, targets: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """The rows of a pass in pieces of at most micro_batch_size."""
        return pieces(inputs, targets, self.micro_batch_size)

    def forward(self, inputs: Any, targets: Tensor, counted: int | None) -> tuple[Any, SplitLoss]:
        """The model's outputs and their loss, as a part of a batch with `counted` rows."""
        if not self.optimizer.is_perturbed:
            self.draws.note(len(targets))
        before = self.own_writes.before(inputs, targets)
        with self.autocast:
            outputs = self.call(inputs)
            loss = self.criterion(outputs, targets, batch_size=counted or None)
        check_split_loss("criterion", loss)
        self.own_writes.after(before)
        return outputs, loss

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Backward of `loss`, scaled where there is a gradient scaler."""
        if self.grad_scaler is not None:
            loss = self.grad_scaler.scale(loss)
        backward(loss, retain_graph)

    def sample_backward(self, inputs: Any, targets: Tensor, counted: int | None) -> None:
        """The tail loss of rows that have had their pass, at the same weights, and its gradient."""
        with self._later_statistics(frozen=True):
            for x, y in self.micro_batches(inputs, targets):
                _, loss = self.forward(x, y, counted)
                self.backward(loss.tail)

    def perturbed_backward(self, inputs: Any, targets: Tensor, counted: int | None) -> None:
        """The tail loss at theta + epsilon, and its gradient."""
        pieces = list(self.micro_batches(inputs, targets))
        draws = self.draws.of_last([len(y) for _, y in pieces])
        with self._later_statistics(frozen=self.batch_norm == "once"):
            for (x, y), states in zip(pieces, draws):
                # The backward is inside: under activation checkpointing it runs the model again.
                with self.draws.generators.replayed(states):
                    _, loss = self.forward(x, y, counted)
                    self.backward(loss.tail)

    @contextmanager
    def _later_statistics(self, frozen: bool) -> Iterator[None]:
        if not self.sees_all_rows_at_once():  # no layer that has any
            yield
            return
        if frozen:
            with frozen_batch_norm_statistics(self.model), self.own_writes.kept_out():
                yield
            return
        # A gradient that overflowed skips the step, and must not reach the statistics either.
        may_overflow = self.grad_scaler is not None and self.optimizer.is_perturbed
        if not may_overflow:
            yield
            return
        finite, others = self.optimizer.perturbation_is_finite(), self.own_writes.changing_tensors()
        with statistics_where(finite, self.model, others):
            yield

    def perturb(self, has_tail: bool, subtract: bool = False) -> None:
        """Ranks without tail rows follow the others where the perturbation is a common one.

        `subtract` takes g_t away from the gradient that is held.
        """
        if self.group is not None and self.perturbation == "global":
            average_(self.optimizer.gradients(), self.group)
        elif not has_tail:
            return
        self.optimizer.second_step(subtract)
        self.ranks.gather_anew()

    def update(self) -> Norms:
        """The optimizer's update, with clipping and the gradient scaler."""
        if self.group is not None:
            self.optimizer.merge_held()
            average_(self.optimizer.gradients(), self.group)
        self.optimizer.tail_gradient_norm(at_once=True)  # for the result: nothing may fail later
        with uninterrupted():  # an updated weight and what the next step needs belong together
            norms = self.optimizer.third_step(self.grad_scaler, self.max_norm)
            found_inf = found_inf_of(self.grad_scaler, self.optimizer)
            if self.grad_scaler is not None:
                self.grad_scaler.update()
        self.wrapper.note_skipped(found_inf)
        self.ranks.gather_anew()
        return norms

"""One step on several ranks: DistributedDataParallel, and models sharded by `fully_shard`.

DDP's own reducer allows one backward per forward and would reduce all three gradients. Its hooks
stay off here: g_t is averaged for the perturbation and g_h + g_p for the update, two all-reduces
of the gradients. FSDP2 averages each gradient in its backward, and gathers weights in each pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..optim import shards
from ..optim.replicas import group_of, no_sync, replicas_of
from ..split import ClassSplit


class Ranks:
    """The processes that train `model` together; for an ordinary model only this one.

    Attributes:
        replicas: the DistributedDataParallel models inside or around `model` (Lightning wraps the
            module that trains, torch.compile the module that it compiles).
        group: the ranks that they are replicated on, None without them.
        sharded: whether the weights are spread over ranks by `fully_shard`.
        same_passes: whether ranks talk to each other in a pass, so that all must run it.
    """

    def __init__(self, model: nn.Module, params: Sequence[Tensor]) -> None:
        self.model = model
        self.sharded = shards.is_sharded(params)
        inside = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        self.replicas = inside or replicas_of(params)
        self.group = group_of(self.replicas)
        self.same_passes = self.sharded or (self.group is not None and _has_sync_batch_norm(model))
        self.modules = shards.sharded_modules(model)
        self.failed = False
        self.gather_anew()

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """Inside the block DDP does not average gradients; after a failure the model is usable."""
        if self.failed:
            raise RuntimeError(
                "a step of this fully_shard model failed, and this torch has no reset_iter_state "
                "to make it usable again; build the model and load a checkpoint"
            )
        shards.check_synchronised(self.modules)
        try:
            with no_sync(self.replicas):
                yield
        except BaseException:
            if self.modules:
                self.failed = not shards.reset(self.model)
            raise

    def gather_anew(self) -> None:
        """Make the next pass gather the weights again, since the optimizer changed them."""
        shards.forget_unsharded(self.modules)

    def check(
        self,
        plan: str,
        micro_batch_size: int | None,
        perturbation: str,
        cuda_graph: bool,
    ) -> None:
        """Raise ValueError for settings of TrainStep that do not work on these ranks."""
        if self.same_passes and plan in ("split", "sampled") and micro_batch_size is not None:
            # A rank with more rows of a part would run more pieces than the others.
            raise ValueError(
                f"micro_batch_size is {micro_batch_size}, expected None with plan={plan!r} where "
                "ranks talk to each other in every pass (fully_shard, SyncBatchNorm)"
            )
        for name, value, expected in (
            ("perturbation", perturbation, "global"),  # there is one copy of the weights
            ("cuda_graph", cuda_graph, False),
        ):
            if self.sharded and value != expected:
                raise ValueError(
                    f"{name} is {value!r}, expected {expected!r} with a fully_shard model"
                )


def keep_in_step(head: Tensor, tail: Tensor, split: ClassSplit) -> None:
    """Mark rows so that every rank runs the same passes; bool (N,) both, written in place.

    Without a row of a part its pass runs on the first row, to which the class gives weight zero.
    A part that no class belongs to has no pass on any rank.
    """
    has_head, has_tail = _parts(split)
    if not has_head:
        head.fill_(False)
        tail.fill_(True)
        return
    for part, exists in ((head, True), (tail, has_tail)):
        if exists and not part.any():
            part[0] = True


def parts_overlap(split: ClassSplit) -> bool:
    """Whether a class belongs to both the head and the tail."""
    labels = torch.arange(len(split.plain), device="cpu")
    return bool((split.plain_mask(labels) & split.tail_mask(labels)).any())


def _parts(split: ClassSplit) -> tuple[bool, bool]:
    """Whether there are head classes, and tail classes."""
    labels = torch.arange(len(split.plain), device="cpu")
    has_tail = bool(split.tail_mask(labels).any())
    return bool(split.plain_mask(labels).any()) or not has_tail, has_tail


def _has_sync_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())

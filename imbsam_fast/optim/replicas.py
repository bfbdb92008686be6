"""Weights that DistributedDataParallel (DDP) keeps alike on several ranks, and their gradients.

DDP averages the gradients of one backward after each forward of its own. A step has two backwards
over one forward, so it turns DDP's averaging off and does it here.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import shards

# Elements in one all-reduce: large enough for bandwidth, small beside the gradients.
BUCKET_ELEMENTS = 16 * 1024 * 1024


class Replicas:
    """The DDP models that hold an optimizer's parameters, looked for at its first step.

    An optimizer is given parameters and never sees the model. Without this search each rank would
    silently train a model of its own.
    """

    def __init__(self) -> None:
        self.found: list[DistributedDataParallel] | None = None

    def may_be(self) -> bool:
        """False for one process, at once."""
        return bool(self.found) or _several_ranks()

    def of(self, params: Sequence[Tensor]) -> list[DistributedDataParallel]:
        """The DDP models; [] in one process, on ranks that train apart, and for `fully_shard`."""
        if self.found is None:
            if not _several_ranks():
                return []  # not remembered: the group may come later
            self.found = replicas_of(params)
        return self.found

    def leave_g_t_apart(self, params: Sequence[Tensor]) -> bool:
        """Whether the gradients in `p.grad` may be each rank's own, though DDP is to average them.

        It does not in a second backward over one forward, as the tail's is in the three calls.
        Where it was told not to synchronise, the caller averages, or wants each rank's own.
        """
        asked = any(model.require_backward_grad_sync for model in self.of(params))
        return asked and any(p.grad is not None for p in params)


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.compiler.disable
def replicas_of(params: Sequence[Tensor]) -> list[DistributedDataParallel]:
    """The DDP models in this process that hold any of `params`.

    Raises ValueError where a FullyShardedDataParallel (FSDP1) holds one.
    """
    if not _several_ranks() or shards.is_sharded(params):
        return []
    held = set(map(id, params))
    found = []
    for wrapper in _wrappers():
        if held.isdisjoint(map(id, wrapper.parameters())):
            continue
        if not isinstance(wrapper, DistributedDataParallel):
            raise ValueError(
                "the parameters are FullyShardedDataParallel's, expected fully_shard instead"
            )
        found.append(wrapper)
    return found


def _wrappers() -> list[torch.nn.Module]:
    """All DDP and FSDP1 modules of the process.

    torch has no list of them, and parameters do not tell. Objects refer to their class, so that the
    garbage collector finds them in a tenth of a second.
    """
    kinds: list[type] = [DistributedDataParallel]
    if "torch.distributed.fsdp" in sys.modules:
        kinds.append(sys.modules["torch.distributed.fsdp"].FullyShardedDataParallel)
    classes = list(kinds)
    for cls in classes:  # which grows
        classes += cls.__subclasses__()
    return [x for x in gc.get_referrers(*classes) if issubclass(type(x), tuple(kinds))]


def group_of(replicas: Sequence[DistributedDataParallel]) -> dist.ProcessGroup | None:
    """The process group that the models are replicated on; None if there are no models.

    Raises ValueError for models that a step cannot average by itself.
    """
    for model in replicas:
        if model.static_graph:
            raise ValueError(
                "the DistributedDataParallel model has static_graph=True, expected False: its "
                "reducer counts on one backward for each forward, and a step has two"
            )
        if model.process_group != replicas[0].process_group:
            raise ValueError(
                "the parameters are in DistributedDataParallel models of two process groups, "
                "expected one group"
            )
    return replicas[0].process_group if replicas else None


@contextmanager
def no_sync(replicas: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Inside the block DDP does not average gradients."""
    with ExitStack() as stack:
        for model in replicas:
            stack.enter_context(model.no_sync())
        yield


def average_(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Replace each gradient by its mean over the ranks; they come in one order on all ranks."""
    for bucket in _buckets(gradients):
        flat = torch.cat([g.reshape(-1) for g in bucket])
        flat.div_(dist.get_world_size(group))
        dist.all_reduce(flat, group=group)
        pieces = flat.split([g.numel() for g in bucket])
        torch._foreach_copy_(bucket, [piece.view(g.shape) for piece, g in zip(pieces, bucket)])


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive gradients of one dtype and device, in pieces of about BUCKET_ELEMENTS."""
    bucket: list[Tensor] = []
    size = 0
    for g in gradients:
        size += g.numel()
        kind = (g.dtype, g.device)
        if bucket and (kind != (bucket[0].dtype, bucket[0].device) or size > BUCKET_ELEMENTS):
            yield bucket
            bucket, size = [], g.numel()
        bucket.append(g)
    if bucket:
        yield bucket

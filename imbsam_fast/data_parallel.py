"""Data parallelism: the same step on every rank, with two all-reduces of the gradients.

DDP's own reducer allows one backward per forward and would reduce all three gradients. Its hooks
stay off here: g_t is averaged for the perturbation and g_h + g_p for the update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Elements in one all-reduce: large enough for bandwidth, small beside the gradients.
BUCKET_ELEMENTS = 16 * 1024 * 1024


def process_group(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that `model` is replicated on, None without DistributedDataParallel."""
    if dist.is_available() and isinstance(model, nn.parallel.DistributedDataParallel):
        return model.process_group
    return None


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

"""Which gradients other code can reach: only the others are held or become *saved* weights.

DistributedDataParallel's bucket views, a flat gradient buffer, a gradient that a logger keeps:
others write there in the next backward pass, or sooner. Such a gradient is copied.
"""

from __future__ import annotations

import sys
from operator import attrgetter

import torch
from torch import Tensor, UntypedStorage

from ..ops import native
from .buckets import Slots

_ONLY_TENSORS = {Tensor}
_address = attrgetter("_cdata")
# A torch without it: every gradient counts as shared, and is copied.
_uses = getattr(torch._C, "_storage_Use_Count", lambda address: 0)
# What the two counts are of a tensor that only a list refers to, its storage looked at from here.
_REFERENCES = max(map(sys.getrefcount, [torch.zeros((), device="cpu")]))
_USES = 2


def owned(gradients: Slots) -> Slots:
    """`gradients`, with copies of those that code outside this list can reach.

    That is a tensor that is referred to elsewhere, a view or a tensor with views, memory that
    torch did not allocate (NumPy's, other processes', a CUDA graph's pool), and whatever a tensor
    subclass wraps. The caller keeps no reference besides the list.
    """
    if torch.compiler.is_compiling():  # the compiled code will meet gradients of either kind
        return [None if g is None else _copy(g) for g in gradients]
    if native.all_alone(gradients):
        return gradients
    references = [*map(sys.getrefcount, gradients)]
    if set(map(type, gradients)) == _ONLY_TENSORS and max(references) <= _REFERENCES:
        storages = [*map(Tensor.untyped_storage, gradients)]  # type: ignore[arg-type]  # no None
        if set(map(_uses, map(_address, storages))) == {_USES} and all(
            map(UntypedStorage.resizable, storages)
        ):
            return gradients
        del storages
    return [
        g if g is None or (count <= _REFERENCES and _is_alone(g)) else _copy(g)
        for g, count in zip(gradients, references)
    ]


@torch.no_grad()
def _copy(g: Tensor) -> Tensor:
    return g.clone()


def _is_alone(g: Tensor) -> bool:
    """Whether this tensor is the only one on its memory, which torch's allocator gave it."""
    if type(g) is not Tensor:
        return False
    storage = g.untyped_storage()
    return _uses(storage._cdata) == _USES and storage.resizable()

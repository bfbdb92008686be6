"""Weights that FSDP2 spreads over ranks: the part that this rank holds, and what all ranks sum up.

A parameter is then a DTensor, and so are its gradient and its state. Kernels take the local part;
only norms and flags concern all ranks. A rank may hold nothing of a parameter and still takes part.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

_PLAIN = (Tensor, nn.Parameter, type(None))
_PLAIN_SET = frozenset(_PLAIN)
_DTENSORS = "torch.distributed.tensor"  # importing it takes a second; before that there are none


# ---------------------------------------------------------------- tensors


def _all_plain(tensors: Sequence[Tensor | None]) -> bool:
    if torch.compiler.is_compiling():  # torch 2.6 understands no map there, and no frozenset
        return all(type(t) in _PLAIN for t in tensors)
    return _PLAIN_SET.issuperset(map(type, tensors))


def is_sharded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether there is a DTensor among them."""
    if _DTENSORS not in sys.modules or _all_plain(tensors):
        return False
    return any(_is_dtensor(t) for t in tensors)


def strange_kind(params: Sequence[Tensor]) -> type | None:
    """The type of a parameter that is neither plain nor a DTensor, if there is one."""
    if _all_plain(params):
        return None
    return next((type(p) for p in params if type(p) not in _PLAIN and not _is_dtensor(p)), None)


def local(t: Tensor) -> Tensor:
    """The part of `t` that this rank holds: its memory, not a copy."""
    if not _is_dtensor(t):
        return t
    with torch.no_grad():
        return t.to_local()  # type: ignore[attr-defined]


def locals_of(tensors: list[Any]) -> list[Any]:
    """`local` of each; None stays None. Without DTensors it is the same list."""
    if not is_sharded(tensors):
        return tensors
    return [t if t is None else local(t) for t in tensors]


def as_part_of(p: Tensor, t: Tensor) -> Tensor:
    """The tensor that is sharded as `p` is, and whose local part is `t`."""
    if not _is_dtensor(p):
        return t
    whole: Any = p
    return _dtensor_class().from_local(
        t, whole.device_mesh, whole.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def local_gradients(params: Sequence[Tensor]) -> list[Tensor | None]:
    """The local parts of `p.grad`; raises TypeError where ranks split it otherwise than `p`."""
    gradients = [p.grad for p in params]
    for i, (p, g) in enumerate(zip(params, gradients)):
        if g is not None and _placements(g) != _placements(p):
            raise TypeError(
                f"the gradient of parameter {i} has placements {_placements(g)}, expected those "
                f"of the parameter, {_placements(p)}"
            )
    return locals_of(gradients)


def check_placements(params: Sequence[Tensor]) -> None:
    """Refuse parameters spread in other ways than `fully_shard` does it, with or without replicas.

    That is: all of them on one mesh, along one of its dimensions in shards of their first
    dimension, and replicated along the others.
    """
    if not is_sharded(params):
        return
    mesh = _mesh(params)
    for i, p in enumerate(params):
        if not _is_dtensor(p):
            raise ValueError(
                f"parameter {i} is a tensor of this rank alone and others are sharded, expected "
                "all of them sharded by fully_shard; after a forward pass call model.reshard() "
                "before parameters()"
            )
        if not _is_fully_sharded(p):
            raise ValueError(
                f"parameter {i} has placements {_placements(p)} on a mesh of "
                f"{p.device_mesh.ndim} dimensions, expected Shard(dim=0) once and Replicate() "  # type: ignore[attr-defined]
                "otherwise, as fully_shard leaves it; tensor parallelism is not supported"
            )
        if p.device_mesh != mesh:  # type: ignore[attr-defined]
            raise ValueError(
                f"parameter {i} is on {p.device_mesh}, expected {mesh} as the others"  # type: ignore[attr-defined]
            )


def summed(value: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The sum of `value` over the ranks that hold parts of `params`, which it becomes."""
    return _all_reduced(value, params, dist.ReduceOp.SUM)


def largest(value: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The largest `value` on any rank that holds parts of `params`, which it becomes."""
    return _all_reduced(value, params, dist.ReduceOp.MAX)


def _all_reduced(value: Tensor, params: Sequence[Tensor], op: Any) -> Tensor:
    p: Any = next(p for p in params if _is_dtensor(p))
    dim = next(i for i, placement in enumerate(p.placements) if placement.is_shard())
    dist.all_reduce(value, op, group=p.device_mesh.get_group(dim))
    return value


def _is_fully_sharded(p: Any) -> bool:
    kinds = sys.modules[_DTENSORS]
    shards = [x for x in p.placements if type(x) is not kinds.Replicate]
    return len(shards) == 1 and type(shards[0]) is kinds.Shard and shards[0].dim == 0


def _mesh(params: Sequence[Tensor]) -> Any:
    return next(p.device_mesh for p in params if _is_dtensor(p))  # type: ignore[attr-defined]


def _placements(t: Any) -> Any:
    return getattr(t, "placements", None)


def _dtensor_class() -> type[DTensor]:
    return sys.modules[_DTENSORS].DTensor


def _is_dtensor(t: Tensor | None) -> bool:
    return _DTENSORS in sys.modules and isinstance(t, _dtensor_class())


# ---------------------------------------------------------------- modules


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules of `model` that `fully_shard` was called on.

    Raises ValueError for FullyShardedDataParallel, whose flat parameters are no DTensors.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    fsdp = sys.modules["torch.distributed.fsdp"]
    for name, module in model.named_modules():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                f"model has FullyShardedDataParallel at {name!r}, expected fully_shard instead"
            )
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def check_synchronised(modules: Sequence[FSDPModule]) -> None:
    """Refuse modules that were told to keep their gradients from the other ranks."""
    for group in (group for m in modules for group in _param_groups(m)):
        if not (group.reduce_grads and group.all_reduce_grads):
            raise RuntimeError(
                "the model's set_requires_gradient_sync is False, expected True: every gradient "
                "of a step is one of all ranks; use micro_batch_size for accumulation"
            )


def forget_unsharded(modules: Sequence[FSDPModule]) -> None:
    """Free the gathered weights, so that the next forward gathers what the optimizer wrote."""
    for module in modules:
        module.reshard()


def reset(model: nn.Module) -> bool:
    """Make `model` usable after a pass that failed; False where this torch cannot."""
    model.zero_grad()  # also what a backward left in weights that were gathered
    roots = list(_roots(model))
    if not all(hasattr(root, "reset_iter_state") for root in roots):
        return False
    for root in roots:
        root.reset_iter_state()
    return True


def _roots(module: nn.Module) -> Iterator[Any]:
    if isinstance(module, sys.modules["torch.distributed.fsdp"].FSDPModule):
        yield module
        return
    for child in module.children():
        yield from _roots(child)


def _param_groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()  # torch has no public way to ask
    several = getattr(state, "_fsdp_param_groups", None)  # newer torch
    return several or [g for g in (state._fsdp_param_group,) if g is not None]

"""Parameters and the tensors that belong to them, sorted into buckets: one kernel launch each."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from ..ops import native
from ..ops.arguments import unobserved
from .shards import locals_of

# One entry a parameter, in the order of param_groups; None where there is no tensor.
Slots = list[Tensor | None]


class Bucket:
    """The parameters that one launch takes: one group, device and dtype, the same inputs.

    For sharded parameters, `params` are the local parts of this rank.
    """

    def __init__(self, group: dict[str, Any], indices: Sequence[int], params: list[Tensor]) -> None:
        self.group, self.indices, self.params = group, indices, params

    def pick(self, slots: Slots) -> list[Tensor]:
        """The tensors of this bucket; [] if it has none."""
        return [] if slots[self.indices[0]] is None else _picked(slots, self.indices)

    def give(self, slots: Slots, tensors: Slots) -> None:
        """Copy the entries of this bucket from `tensors` to `slots`."""
        if isinstance(self.indices, range):
            where = slice(self.indices.start, self.indices.stop)
            slots[where] = tensors[where]
        else:
            for i in self.indices:
                slots[i] = tensors[i]


def params_of(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    """The parameters of all groups, in their order."""
    params: list[Tensor] = []
    for group in groups:
        params += group["params"]
    return params


def local_params_of(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    """This rank's parts of the parameters."""
    return locals_of(params_of(groups))


def all_present(slots: Slots) -> bool:
    """Whether all entries are tensors; False too where only a slow look would tell."""
    return unobserved() and native.occupancy(slots) is True


def buckets(groups: Sequence[dict[str, Any]], *lists: Slots) -> list[Bucket]:
    """Sort the parameters with a tensor in the last list into buckets, one per launch.

    Parameters of a bucket have the same group, device, dtype and lists with a tensor.
    """
    params = local_params_of(groups)
    if unobserved():
        sizes = [len(group["params"]) for group in groups]
        if (parts := native.partition(sizes, params, lists)) is not None:
            return [Bucket(groups[g], which, _picked(params, which)) for g, which in parts]
    needed = lists[-1]
    found: list[Bucket] = []
    first = 0
    for group in groups:
        members: dict[Hashable, list[int]] = {}
        for i, p in enumerate(group["params"], first):
            if needed[i] is not None:
                present = tuple(slots[i] is not None for slots in lists)
                members.setdefault((p.device, p.dtype, present), []).append(i)
        found += [Bucket(group, m, [params[i] for i in m]) for m in members.values()]
        first += len(group["params"])
    return found


def _picked(slots: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    if isinstance(indices, range):
        return slots[indices.start : indices.stop]  # type: ignore[return-value]
    return [slots[i] for i in indices]

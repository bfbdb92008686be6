"""Parameters with what goes with them, sorted into buckets that one launch takes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain
from operator import itemgetter
from types import NoneType
from typing import Any

from torch import Tensor

from ..ops.arguments import one_kind
from .shards import locals_of

# One entry a parameter, in the order of param_groups; None where there is no tensor.
Slots = list[Tensor | None]

_params = itemgetter("params")


class Bucket:
    """The parameters that one launch takes: one group, device and dtype, the same inputs.

    Of parameters that are sharded, `params` are this rank's parts.
    """

    def __init__(self, group: dict[str, Any], indices: Sequence[int], params: list[Tensor]) -> None:
        self.group, self.indices, self.params = group, indices, params

    def pick(self, slots: Slots) -> list[Tensor]:
        """This bucket's tensors; [] where it has none."""
        if slots[self.indices[0]] is None:
            return []
        return [slots[i] for i in self.indices]  # type: ignore[misc]  # all alike in a bucket


def params_of(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    return [*chain.from_iterable(map(_params, groups))]


def local_params_of(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    """This rank's parts of the parameters."""
    return locals_of(params_of(groups))


def buckets(groups: Sequence[dict[str, Any]], *lists: Slots) -> list[Bucket]:
    """The parameters with a tensor in the last list, as launches take them.

    That is by group, device and dtype, and by which of the lists have a tensor.
    """
    needed = lists[-1]
    params = local_params_of(groups)
    alike = len(groups) == 1 and all(map(_all_or_none, lists))
    if alike and needed[0] is not None and one_kind(params):
        return [Bucket(groups[0], range(len(params)), params)]
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


def _all_or_none(slots: Slots) -> bool:
    kinds = set(map(type, slots))
    return len(kinds) == 1 or NoneType not in kinds

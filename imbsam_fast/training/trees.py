"""What models take and return: a tensor, or tensors in containers (a pytree).

torch's functions for pytrees take ten times as long for a tensor alone, which is the usual case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in `tree`."""
    if isinstance(tree, Tensor):
        return [tree]
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """`tree` with `function` of every tensor in the tensor's place."""
    return (
        function(tree) if isinstance(tree, Tensor) else pytree.tree_map_only(Tensor, function, tree)
    )

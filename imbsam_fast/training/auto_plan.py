"""plan="auto": which of the exact plans is cheaper for a batch.

With h and f the shares of head and tail rows, the split plan costs h + 2f SGD steps. The joint plan
costs 5/3 and its perturbed pass: 5/3 + f where that needs the tail rows alone, or 8/3; but it has
one forward less. In small networks most of the time is a fixed cost per forward.
"""

from __future__ import annotations

from math import prod
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .rows import Rows
from .trees import tensors

# A forward and backward of a module on no rows, in multiply-adds of one forward: from timings on a
# CPU of networks of 2 to 9 modules, split and joint plan beside each other. Not measured on GPUs,
# where launches cost more; what a wrong choice costs is at most the ninth part of a step of
# passes that cost the same for any rows.
WORK_OF_A_MODULE = 2_000_000


def split_is_cheaper(model: nn.Module, inputs: Any, rows: Rows, perturbed: int) -> bool:
    """Whether the split plan is cheaper, for a model whose rows do not influence each other.

    `perturbed` is how many rows the joint plan's perturbed pass would have.
    """
    joint = 5 * rows.head.shape[0] + 3 * perturbed  # in thirds of a row's forward and backward
    saved = joint - 3 * (rows.head_rows + 2 * rows.tail_rows)
    modules, weights = _size(model)
    # Multiply-adds of a row's forward, roughly: each weight once a position of image or text.
    x = tensors(inputs)[0]
    channels = 2 if x.is_floating_point() else 1  # dimensions before the positions
    work_of_a_row = weights * prod(x.shape[channels:])
    return saved * work_of_a_row >= 3 * WORK_OF_A_MODULE * modules


_sizes: WeakKeyDictionary[nn.Module, tuple[int, int]] = WeakKeyDictionary()


def _size(model: nn.Module) -> tuple[int, int]:
    """Modules without children and weights of a model when it was first asked for.

    To count those of a small network takes as long as a layer of it.
    """
    if model not in _sizes:
        modules = sum(1 for m in model.modules() if not any(True for _ in m.children()))
        _sizes[model] = modules, sum(p.numel() for p in model.parameters())
    return _sizes[model]

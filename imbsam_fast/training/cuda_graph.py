"""Whole training steps as CUDA graphs: one launch instead of thousands.

The joint plan has the same passes for every batch of one shape and waits for nothing, so that
all of it can be captured, forwards and backwards included. It pays where launching takes longer
than computing: small models, small batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Steps that run as usual before a shape is captured, as torch.cuda.graphs asks for: they create
# the momentum buffers and load what libraries load at their first call.
WARM_UP_STEPS = 3

# One whole step, from tensors on the device to tensors on the device.
Step = Callable[[Any, Tensor], Any]


class GraphedSteps:
    """`step`, replayed from a graph of its own for each shape of the batch."""

    def __init__(self, step: Step, device: torch.device) -> None:
        self.step = step
        self.device = device
        self.warm_ups: dict[tuple, int] = {}
        self.graphs: dict[tuple, _Graph] = {}

    def __call__(self, inputs: Any, targets: Tensor) -> Any:
        """One step: run as it is in the first WARM_UP_STEPS of a shape, then replayed."""
        key = _shapes(inputs, targets)
        if key in self.graphs:
            return self.graphs[key].replay(inputs, targets)
        self.warm_ups[key] = self.warm_ups.get(key, 0) + 1
        if self.warm_ups[key] <= WARM_UP_STEPS:
            return self._on_a_side_stream(inputs, targets.to(self.device, non_blocking=True))
        self.graphs[key] = _Graph(self.step, inputs, targets, self.device)
        return self.graphs[key].replay(inputs, targets)

    def _on_a_side_stream(self, inputs: Any, targets: Tensor) -> Any:
        current, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = self.step(inputs, targets)
        current.wait_stream(side)
        return result


class _Graph:
    """One captured step with the memory that its batches are copied to."""

    def __init__(self, step: Step, inputs: Any, targets: Tensor, device: torch.device) -> None:
        self.inputs = pytree.tree_map_only(Tensor, Tensor.clone, inputs)
        self.targets = targets.to(device, copy=True)
        self.graph = torch.cuda.CUDAGraph()
        # Threads that load data may go on allocating pinned memory.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = step(self.inputs, self.targets)

    def replay(self, inputs: Any, targets: Tensor) -> Any:
        for place, x in zip(pytree.tree_leaves(self.inputs), pytree.tree_leaves(inputs)):
            if isinstance(x, Tensor):
                place.copy_(x, non_blocking=True)
        self.targets.copy_(targets, non_blocking=True)
        self.graph.replay()
        return pytree.tree_map_only(Tensor, Tensor.clone, self.result)  # the next replay's memory


def _shapes(inputs: Any, targets: Tensor) -> tuple:
    """What a graph is made for: the layout of every tensor, and all that is no tensor."""
    leaves, structure = pytree.tree_flatten(inputs)
    kinds = [(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in leaves]
    return (str(structure), *kinds, targets.shape)

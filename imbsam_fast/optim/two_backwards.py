"""Two backward passes through one graph, also where torch.compile made it.

Inductor lets a compiled backward write into tensors saved for it ("donated buffers"), which
rules out a second backward; torch refuses one with an error. The setting that avoids donation
also silences that error, so graphs compiled earlier must be recognised here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor


def compiled_for_two_backwards() -> AbstractContextManager[None]:
    """A model that is compiled inside the block keeps what a second backward needs."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled in this process
        return nullcontext()
    return _without_donation()


@contextmanager
def _without_donation() -> Iterator[None]:
    # config.patch does the same and makes a class each time, three times as slow.
    config: Any = torch._functorch.config
    if not config.donated_buffer:
        yield
        return
    config.donated_buffer = False
    try:
        yield
    finally:
        config.donated_buffer = True


def backward(loss: Tensor, retain_graph: bool = False) -> None:
    """`loss.backward` through a graph from the block above; retain_graph for the first of two."""
    # The check that the setting silences is of compiled graphs that are kept.
    compiled = list(_compiled_nodes(loss)) if retain_graph else []
    if not compiled:
        loss.backward(retain_graph=retain_graph)
        return
    if any(map(_donates, compiled)):
        raise RuntimeError(
            "the compiled model ran in training mode before its first TrainStep, which fixed "
            "its graph to a single backward, and the joint plan needs two; call "
            "torch._dynamo.reset() once before the first TrainStep"
        )
    with compiled_for_two_backwards():
        loss.backward(retain_graph=True)


def _compiled_nodes(loss: Tensor) -> Iterator[object]:
    """The nodes of the loss's graph that torch.compile made."""
    if "torch._functorch.aot_autograd" not in sys.modules:  # the first compilation imports it
        return
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CompiledFunctionBackward":
            yield node
        waiting.extend(next_node for next_node, _ in node.next_functions)


def _donates(node: object) -> bool:
    # Where the attributes are missing, this torch has no donated buffers, or other names for
    # them: assume the worst.
    metadata = getattr(getattr(node, "_forward_cls", None), "metadata", None)
    return bool(getattr(metadata, "bw_donated_idxs", True))

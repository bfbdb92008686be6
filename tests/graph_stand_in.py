"""Stands in for torch.cuda and its graphs, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from imbsam_fast.training.cuda_graph import GraphedSteps
from imbsam_fast.training.plans import StepResult


class StandIn:
    """Captures like a CUDA graph: nothing runs then, and a replay works on the same memory."""

    capturing: StandIn | None = None

    def replay(self) -> None:
        results = pytree.tree_leaves(self.work())
        for place, x in zip(pytree.tree_leaves(self.results), results):
            place.copy_(x)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class Runtime:
    """Stands in for torch.cuda, and notes on which streams and from which pools it works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[torch.device, Any]] = []  # streams, with their devices
        self.captures: list[tuple[Any, Any]] = []  # stream and pool of each
        self.warm_ups: list[Any] = []  # the stream of each
        self.current = Stream()
        for name, value in {
            "CUDAGraph": StandIn,
            "graph": self.graph,
            "current_stream": lambda device: self.current,
            "Stream": self.stream,
            "stream": self.on_stream,
            "device": nullcontext,
            "graph_pool_handle": object,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextmanager
    def graph(
        self, graph: StandIn, pool: Any, stream: Any, capture_error_mode: str
    ) -> Iterator[None]:
        self.captures.append((stream, pool))
        StandIn.capturing = graph
        yield
        StandIn.capturing = None

    def stream(self, device: torch.device) -> Any:
        made = Stream()
        self.made.append((device, made))
        return made

    def on_stream(self, stream: Any) -> AbstractContextManager:
        self.warm_ups.append(stream)
        return nullcontext()


def captured(steps: GraphedSteps) -> int:
    return sum(shape.graph is not None for shape in steps.shapes.values())


def capturable(
    step: Callable, classes: int, dtype: torch.dtype, sizes: list[tuple[int, ...]] | None = None
) -> Callable:
    """`step` of a TrainStep, whose graphs are the stand-in's.

    `sizes` gets how many labels, and rows of each part, there are at every call.
    """

    def run(inputs: Any, labels: Any) -> StepResult:
        if sizes is not None and isinstance(labels, tuple):
            sizes.append(tuple(map(len, labels)))
        return step(inputs, labels)

    def captured_or_run(inputs: Any, labels: Any) -> StepResult:
        graph = StandIn.capturing
        if graph is None:
            return run(inputs, labels)
        graph.work = lambda: run(inputs, labels)[:4]
        shapes = [(), (), (), (len(inputs), classes)]  # what a capture leaves: nothing computed
        graph.results = [torch.full(shape, torch.nan, dtype=dtype) for shape in shapes]
        return StepResult(*graph.results)

    return captured_or_run

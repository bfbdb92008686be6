"""Whole training steps as CUDA graphs: one launch instead of thousands.

The joint plan has the same passes for every batch of one shape and waits for nothing, so that
all of it can be captured, forwards and backwards included. So have the split and the sampled plan,
once their parts have few sizes. It pays where launching takes longer than computing: small models,
small batches.

What a graph does not read from the device when it runs is a constant of it: settings that are
numbers, where the weights and the base's state lie, which layers train. A graph whose constants
have changed is given up, and steps run as usual until they have been the same for a while.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from ..optim import ImbSAM
from ..optim.bases import reason_not_fused
from .trees import mapped

# Steps that run as usual before a shape is captured, as torch.cuda.graphs asks for: they create
# the momentum buffers and load what libraries load at their first call.
WARM_UP_STEPS = 3
# So many steps in a row with changed constants are no accident.
CHANGES = 20

# Parts of the split plan are filled up to multiples of so many rows, or of this share of the batch.
GRAIN, GRAIN_SHARE = 8, 32

# One whole step, from tensors on the device to tensors on the device: inputs, and labels or a tuple
# of them and of what else depends on them.
Step = Callable[[Any, Any], Any]
Constants = dict[str, Any]


def no_constants() -> Constants:
    """Of a step that reads everything from the device."""
    return {}


class GraphedSteps:
    """`step`, replayed from a graph of its own for each shape of the batch.

    Steps that are not replayed run on the stream that graphs are captured on, so that all of them
    share one pool of memory.
    """

    def __init__(
        self, step: Step, device: torch.device, constants: Callable[[], Constants] = no_constants
    ) -> None:
        self.step, self.device, self.constants = step, device, constants
        self.shapes: dict[tuple, _Shape] = {}
        self.stream: torch.cuda.Stream | None = None
        self.pool: Any = None

    def __call__(self, inputs: Any, targets: Any) -> Any:
        """One step: as it is in the first WARM_UP_STEPS of a shape, then replayed.

        `targets` may lie anywhere, and are moved.
        """
        shape = self.shapes.setdefault(_shapes(inputs, targets), _Shape())
        shape.look_at(self.constants())
        if shape.graph is None and shape.steps < WARM_UP_STEPS:
            result = self._on_the_side(inputs, self._moved(targets))
            shape.has_run(self.constants())  # with the state that a first step makes
            return result
        if shape.graph is None:
            shape.graph = self._captured(inputs, targets)
        return shape.graph.replay(inputs, targets)

    def _side(self) -> torch.cuda.Stream:
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)
            self.pool = torch.cuda.graph_pool_handle()
        return self.stream

    def _moved(self, targets: Any) -> Any:
        return pytree.tree_map(lambda y: y.to(self.device, non_blocking=True), targets)

    def _on_the_side(self, inputs: Any, targets: Any) -> Any:
        current, side = torch.cuda.current_stream(self.device), self._side()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = self.step(inputs, targets)
        current.wait_stream(side)
        return result

    def _captured(self, inputs: Any, targets: Any) -> _Graph:
        with torch.cuda.device(self.device):  # whose memory is freed first, and no other's
            return _Graph(self.step, inputs, targets, self.device, self._side(), self.pool)


class _Shape:
    """The graph of one shape, or the steps on the way to it."""

    def __init__(self) -> None:
        self.graph: _Graph | None = None
        self.steps = 0  # with the present constants
        self.known: Constants | None = None
        self.changes = 0

    def look_at(self, constants: Constants) -> None:
        """Start anew where a constant has changed."""
        if self.known is None or self.known == constants:
            return
        names = [n for n in constants if n not in self.known or constants[n] != self.known[n]]
        self.graph, self.steps = None, 0
        self.changes += 1
        if self.changes == CHANGES:
            warnings.warn(
                f"cuda_graph=True captures nothing as long as {', '.join(names)} changes from step "
                "to step: these steps run as usual. OneCycleLR leaves the momentum alone with "
                "cycle_momentum=False",
                stacklevel=4,
            )

    def has_run(self, constants: Constants) -> None:
        """Note a step that was not replayed, and the constants after it."""
        self.steps += 1
        self.known = constants
        if self.steps == WARM_UP_STEPS:
            self.changes = 0


class _Graph:
    """One captured step with the memory that its batches are copied to."""

    def __init__(
        self,
        step: Step,
        inputs: Any,
        targets: Any,
        device: torch.device,
        stream: torch.cuda.Stream,
        pool: Any,
    ) -> None:
        self.inputs = mapped(Tensor.clone, inputs)
        self.targets = pytree.tree_map(lambda y: y.to(device, copy=True), targets)
        self.graph = torch.cuda.CUDAGraph()
        # Threads that load data may go on allocating pinned memory.
        with torch.cuda.graph(
            self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        ):
            self.result = step(self.inputs, self.targets)

    def replay(self, inputs: Any, targets: Any) -> Any:
        """The captured step on another batch; what it returns is a copy."""
        for place, x in zip(pytree.tree_leaves(self.inputs), pytree.tree_leaves(inputs)):
            if isinstance(x, Tensor):
                place.copy_(x, non_blocking=True)
        for place, y in zip(pytree.tree_leaves(self.targets), pytree.tree_leaves(targets)):
            place.copy_(y, non_blocking=True)
        self.graph.replay()
        return mapped(Tensor.clone, self.result)  # the next replay's memory


def _shapes(inputs: Any, targets: Any) -> tuple:
    """What a graph is made for: the layout of every tensor, and all that is no tensor."""
    leaves, structure = pytree.tree_flatten(inputs)
    kinds = [(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in leaves]
    of_targets = ((y.shape, y.dtype) for y in pytree.tree_leaves(targets))
    return (str(structure), *kinds, *of_targets)


# ---------------------------------------------------------------- of a training step


def grain(rows: int) -> int:
    """Parts of a batch of so many rows are filled up to multiples of this."""
    return max(GRAIN, rows // GRAIN_SHARE)


def constants_of(
    model: nn.Module, optimizer: ImbSAM | Optimizer, grad_scaler: GradScaler | None, **others: Any
) -> Constants:
    """What a captured step of these does not read from the device, by its name."""
    found = dict(others)
    for i, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if name != "params":
                found[f"param_groups[{i}][{name!r}]"] = _constant(value)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found["the parameters"] = [(p.data_ptr(), p.requires_grad) for p in params]
    found["the optimizer's state"] = [
        _constant(x) for of_p in optimizer.state.values() for x in of_p.values()
    ]
    found["model.training"] = [m.training for m in model.modules()]
    if grad_scaler is not None:
        for name in ("growth_factor", "backoff_factor", "growth_interval"):
            found[f"grad_scaler.{name}"] = getattr(grad_scaler, f"get_{name}")()
    return found


def _constant(value: Any) -> Any:
    """A tensor is read when the graph runs, from the place where it was captured."""
    if isinstance(value, Tensor):
        return ("tensor", value.data_ptr(), value.dtype)
    return tuple(map(_constant, value)) if isinstance(value, (tuple, list)) else value


def check_plan(
    mixes_rows: bool,
    plan: str,
    micro_batch_size: int | None,
    model: str | None,
    same_dropout: bool,
) -> None:
    """Refuse a step whose passes differ from batch to batch, or that waits for other ranks.

    `mixes_rows`: whether a layer uses batch statistics; `model`: the class of one that is data
    parallel, None for others.
    """
    plans = {"joint", "sampled", "auto" if mixes_rows else "split"}
    needs = {
        "plan": (plan, plan in plans),
        "micro_batch_size": (micro_batch_size, micro_batch_size is None),
        "model": (model, model is None),
        "same_dropout": (same_dropout, not same_dropout),
    }
    for name, (value, fits) in needs.items():
        if not fits:
            raise ValueError(
                f"{name} is {value!r}, expected with cuda_graph=True: the joint or the sampled "
                "plan, or the split plan where no BatchNorm layer uses batch statistics, no "
                "micro-batches, no DistributedDataParallel, same_dropout=False"
            )


def check_capturable(optimizer: ImbSAM, grad_scaler: GradScaler | None) -> torch.device:
    """The parameters' device; refuses settings that only the host sees, and would see once."""
    groups = optimizer.param_groups
    device = groups[0]["params"][0].device
    for i, group in enumerate(groups):
        lr = group["lr"]
        if not isinstance(lr, Tensor) or lr.device != device or device.type != "cuda":
            raise ValueError(
                f"param_groups[{i}]['lr'] is {lr!r} and the parameters are on {device}, "
                "expected with cuda_graph=True both on one GPU: a number would never change"
            )
        if not (group.get("capturable", True) or group.get("fused")):
            raise ValueError(
                f"param_groups[{i}]['capturable'] is {group['capturable']!r}, expected True or "
                "fused=True with cuda_graph=True: a count of steps on the CPU would never change"
            )
    reason = reason_not_fused(optimizer.base)
    if grad_scaler is not None and reason is not None:
        raise ValueError(
            f"{reason}, expected with grad_scaler and cuda_graph=True a base that is updated by a "
            "fused kernel: its own step() is left out on the host, which cannot wait for the device"
        )
    return device

"""What a forward pass writes besides its outputs: buffers of the model, and its inputs.

torch's BatchNorm and InstanceNorm are known by their classes (batch_norm.py). All others, spectral
norm, observers of quantisation, a layer's own averages, are noticed by the values of the buffers
around the first pass, and around every pass by the version counters that torch keeps of tensors
(F.batch_norm does not count there).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..split import ClassSplit
from .generators import Generators
from .trees import tensors


class ChangesItselfError(Exception):
    """The first pass of the split plan has written to buffers; nothing else has happened yet."""


class _Buffer(NamedTuple):
    """A buffer with its value and version at one moment."""

    owner: dict[str, Tensor | None]  # of a module: its buffers by name
    name: str
    tensor: Tensor
    version: int

    def is_as_before(self) -> bool:
        now = self.owner.get(self.name)
        return now is self.tensor and _version(now) == self.version


class _Before(NamedTuple):
    """Buffers and versions before a forward pass."""

    buffers: list[_Buffer]
    given: list[tuple[str, Tensor, int]]  # who may write to it, the tensor, its version


class OwnWrites:
    """The buffers that forward passes of `model` and `criterion` were seen to write to.

    Args:
        model: the model; batch_norm.py handles its normalising layers.
        criterion: watched too where it is a module.
        generators: the random generators that the passes use.
        same_everywhere: whether all ranks must find the same buffers, whatever their values.
    """

    def __init__(
        self, model: nn.Module, criterion: object, generators: Generators, same_everywhere: bool
    ) -> None:
        modules = {m: None for m in model.modules() if not isinstance(m, _NormBase)}
        if isinstance(criterion, nn.Module):
            modules |= {m: None for m in criterion.modules() if not isinstance(m, ClassSplit)}
        self.model = model
        self.owners = [m._buffers for m in modules]
        self.generators = generators
        self.same_everywhere = same_everywhere
        self.changing: dict[tuple[int, str], tuple[dict[str, Tensor | None], str]] = {}
        self.seen: set[bool] = set()  # the modes, training or not, in which a pass was seen
        self.start: tuple[list[_Buffer], list[Tensor], list[Tensor]] | None = None
        self.may_restart = False
        self.reads_again = False

    def begin_step(self, may_restart: bool, reads_again: bool) -> None:
        """Copy what a pass may write to if no pass of its kind has been seen.

        Args:
            may_restart: whether the first pass may raise ChangesItselfError.
            reads_again: whether later passes have the same inputs.
        """
        self.may_restart, self.reads_again = may_restart, reads_again
        self.start = None
        buffers = self._now() if self.model.training not in self.seen else []
        if buffers:
            self.start = buffers, _copies(buffers), self.generators.states()

    def before(self, inputs: Any, targets: Tensor) -> _Before:
        """Note the versions of what the pass that follows might write to."""
        given = [("model", x, _version(x)) for x in tensors(inputs)]
        given.append(("criterion", targets, _version(targets)))
        return _Before(self._now(), given)

    def after(self, before: _Before) -> None:
        """Note which buffers the pass changed.

        Raises RuntimeError where it wrote to what another pass is to read, ChangesItselfError as
        `begin_step` says; the buffers and generators are then what they were before.
        """
        new = {_key(b): b for b in before.buffers if not b.is_as_before()}
        if self.start is not None:
            if not self.same_everywhere:  # DDP writes to all buffers: those of one rank
                new = {}
            new |= self._other_values()
        new = {key: b for key, b in new.items() if key not in self.changing}
        self.changing |= {key: (b.owner, b.name) for key, b in new.items()}
        self.seen.add(self.model.training)
        start, may_restart = self.start, self.may_restart
        self.start, self.may_restart = None, False
        if self.reads_again:
            _check_not_written(before.given)
        if new and may_restart:
            if start is not None:  # else a layer began to write later: it keeps this pass as well
                buffers, values, states = start
                _put_back(buffers, values)
                self.generators.set(states)
            raise ChangesItselfError

    @contextmanager
    def kept_out(self) -> Iterator[None]:
        """Inside the block, undo what forward passes write to buffers."""
        buffers = self._changing_now()
        values = _copies(buffers)
        try:
            yield
        finally:
            _put_back(buffers, values)

    def changing_tensors(self) -> list[Tensor]:
        """The buffers that passes write to, as tensors."""
        return [b.tensor for b in self._changing_now()]

    def _now(self) -> list[_Buffer]:
        return [
            _Buffer(owner, name, b, _version(b))
            for owner in self.owners
            if owner
            for name, b in owner.items()
            if b is not None
        ]

    def _changing_now(self) -> list[_Buffer]:
        found = [(owner, name, owner.get(name)) for owner, name in self.changing.values()]
        return [_Buffer(o, name, b, _version(b)) for o, name, b in found if b is not None]

    def _other_values(self) -> dict[tuple[int, str], _Buffer]:
        """The buffers that are not what they were before the first pass."""
        buffers, values, _ = self.start  # type: ignore[misc]
        pairs = zip(buffers, values)
        return {_key(b): b for b, v in pairs if not _equal(b.owner.get(b.name), v)}


def _key(b: _Buffer) -> tuple[int, str]:
    return id(b.owner), b.name


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _equal(now: Tensor | None, before: Tensor) -> bool:
    return now is not None and now.shape == before.shape and torch.equal(now, before)


def _copies(buffers: list[_Buffer]) -> list[Tensor]:
    return [b.tensor.detach().clone() for b in buffers]


@torch.no_grad()
def _put_back(buffers: list[_Buffer], values: list[Tensor]) -> None:
    """The tensors that the buffers were, with these values."""
    for b, value in zip(buffers, values):
        b.owner[b.name] = b.tensor
        if b.tensor.shape != value.shape:  # an observer's, which grow
            b.tensor.resize_(value.shape)
        b.tensor.copy_(value)


def _check_not_written(given: list[tuple[str, Tensor, int]]) -> None:
    for who, x, version in given:
        if _version(x) != version:
            what = "inputs" if who == "model" else "targets"
            raise RuntimeError(
                f"the {who} wrote to {what}, a tensor of shape {tuple(x.shape)}, in its forward "
                f"pass, expected it to leave them: the other passes of a step read them again; "
                "use operations that are not in place"
            )

"""Random states of forward passes, so that later passes can draw the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Generators:
    """torch's default generators of the CPU and of the devices that `model` is on."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def states(self) -> list[Tensor]:
        """The state of each generator; it is read on the host, without waiting for a device."""
        return [torch.get_rng_state(), *(_get(device) for device in self._devices())]

    def set(self, states: Sequence[Tensor]) -> None:
        """Set the generators to what `states` returned."""
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices(), states[1:]):
            _set(device, state)

    @contextmanager
    def replayed(self, states: Sequence[Tensor] | None) -> Iterator[None]:
        """Inside the block, draw from `states` on; afterwards, restore the generators."""
        if states is None:
            yield
            return
        before = self.states()
        self.set(states)
        try:
            yield
        finally:
            self.set(before)

    def _devices(self) -> list[torch.device]:
        """In one order, as long as the model stays where it is."""
        devices = dict.fromkeys(p.device for p in self.model.parameters())
        return [d for d in devices if d.type not in ("cpu", "meta")]


class Draws:
    """The generator states at the start of a step's passes, to draw the same numbers again."""

    def __init__(self, generators: Generators, wanted: bool) -> None:
        self.generators = generators
        self.wanted = wanted
        self.passes: list[tuple[int, list[Tensor]]] = []

    def begin_step(self) -> None:
        """Forget the passes of the last step."""
        self.passes = []

    def note(self, rows: int) -> None:
        """Note the states before a pass of so many rows."""
        if self.wanted:
            self.passes.append((rows, self.generators.states()))

    def of_last(self, rows: Sequence[int]) -> Sequence[list[Tensor] | None]:
        """The states at the start of the last passes with these numbers of rows."""
        if not self.wanted:
            return [None] * len(rows)
        last = self.passes[-len(rows) :]
        if [n for n, _ in last] != [*rows]:
            raise RuntimeError(
                f"same_dropout is True, and the perturbed pass has {[*rows]} rows where the "
                f"unperturbed one had {[n for n, _ in last]}, expected the same rows"
            )
        return [states for _, states in last]


def _get(device: torch.device) -> Tensor:
    module = torch.get_device_module(device)
    return module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)


def _set(device: torch.device, state: Tensor) -> None:
    module = torch.get_device_module(device)
    if device.type == "mps":  # there is one only
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, device)

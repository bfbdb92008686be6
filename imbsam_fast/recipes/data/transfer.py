"""Batches on their way to the device that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RawBatch(NamedTuple):
    """Pixels as they were read; their memory is used again once the next batch is asked for."""

    pixels: Tensor  # uint8, on the CPU
    finish: Callable[[Tensor], Tensor]  # makes images of pixels, on any device
    targets: Tensor  # int64 (b,), on the CPU


def finished_on(
    device: torch.device, batches: Iterable[RawBatch]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Finished images on `device` and targets on the CPU, one batch ahead on a GPU."""
    if device.type == "cuda":
        yield from one_ahead(batches, SideStream(device))
        return
    for batch in batches:
        yield batch.finish(batch.pixels.to(device)), batch.targets


def one_ahead(batches: Iterable[RawBatch], stream: SideStream) -> Iterator[tuple[Tensor, Tensor]]:
    """While the caller works on a batch, the next is read, copied and finished on `stream`."""
    ready = None
    for batch in batches:
        begun = stream.begin(batch)
        if ready is not None:
            yield stream.end(*ready)
        ready = begun
    if ready is not None:
        yield stream.end(*ready)


class SideStream:
    """A stream of a GPU on which batches are copied and finished while another one trains.

    Args:
        device: the GPU.
        cuda: torch.cuda, or what stands in for it in tests.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device = device
        self.cuda = cuda
        self.stream = cuda.Stream(device)
        # Two pinned buffers, each with the event after which it may be written to again.
        self._buffers: list[tuple[Tensor, Any] | None] = [None, None]

    def begin(self, batch: RawBatch) -> tuple[Tensor, Tensor, Any]:
        """Start the copy; returns at once, with images that are there after `end`, and an event."""
        pinned = self._pinned(batch.pixels)
        pinned.copy_(batch.pixels)
        with self.cuda.stream(self.stream):
            pixels = pinned.to(self.device, non_blocking=True)
            copied = self.stream.record_event()
            images = batch.finish(pixels)
            done = self.stream.record_event()
        self._buffers.append((pinned, copied))
        return images, batch.targets, done

    def end(self, images: Tensor, targets: Tensor, done: Any) -> tuple[Tensor, Tensor]:
        """Images and targets of `begin`, usable on the current stream."""
        current = self.cuda.current_stream(self.device)
        current.wait_event(done)  # and not for the stream: the next batch is on it already
        images.record_stream(current)  # so that its memory is not given away while it is used
        return images, targets

    def _pinned(self, like: Tensor) -> Tensor:
        """A buffer that no copy reads any more."""
        kept = self._buffers.pop(0)
        if kept is not None:
            buffer, copied = kept
            copied.synchronize()
            if buffer.shape == like.shape:
                return buffer
        return torch.empty_like(like, pin_memory=self.device.type == "cuda")

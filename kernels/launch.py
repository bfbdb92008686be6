"""How the kernels are launched: dtypes, the table of tensors in device memory, configurations."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _probe():
    pass


# Threads of a warp (NVIDIA) or wavefront (AMD's data center GPUs).
WARP_SIZE = 64 if torch.version.hip else 32

# Whether TRITON_INTERPRET was set when triton decorated the kernels: they then run on the CPU.
INTERPRETED = not isinstance(_probe, triton.JITFunction)


def launch_options(threads: int) -> dict[str, int | bool]:
    """What every launch says.

    enable_fp_fusion=False: multiplications and additions stay apart, as in csrc/arithmetic.h, so
    that the optimizer phases give the bits of reference.py. Triton's default is about to change.
    """
    return {"num_warps": max(1, threads // WARP_SIZE), "enable_fp_fusion": False}


def on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device: make that the tensors' device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# ---------------------------------------------------------------- the table of tensors

# One tensor in 16-byte accesses needs every list's address to be a multiple of this.
_ALIGNMENT = 16

# Tables kept on the devices, of a few kilobytes each: a step uses about one per phase, bucket of
# parameters and set of gradient addresses that the allocator hands out.
_TABLES_KEPT = 128


class Table(NamedTuple):
    """The tensors of one launch in device memory; see `table`."""

    spans: Tensor  # (count, 3) int64: tensor, its first element in the span, elements
    addresses: Tensor  # (tensors, 1 + lists) int64: whether all are aligned, the addresses
    programs: int  # of the launch, one for each span


def table(span: int, lists: Sequence[Sequence[Tensor]]) -> Table:
    """The table of a launch with one program per `span` elements of every tensor.

    Tensor i of every list has the same number of elements; an empty list is absent. The same
    tensors at the same addresses, on the same stream, give the table that is already there.
    """
    first = next(filter(None, lists))
    device = first[0].device
    numel = tuple(map(Tensor.numel, first))
    addresses = tuple(tuple(map(Tensor.data_ptr, list_)) for list_ in lists)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _captured_table(span, numel, addresses, device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _table(span, numel, addresses, device, stream)


@functools.lru_cache(_TABLES_KEPT)
def _table(
    span: int,
    numel: tuple[int, ...],
    addresses: tuple[tuple[int, ...], ...],
    device: torch.device,
    stream: int,  # in its order the table is written, read and freed
) -> Table:
    spans = _spans(span, numel, device, stream)
    words = _address_words(len(numel), addresses)
    return Table(spans, _uploaded(words, device)[0], len(spans))


@functools.lru_cache(_TABLES_KEPT)
def _spans(span: int, numel: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return _uploaded(_span_words(span, numel), device)[0]


def _span_words(span: int, numel: Sequence[int]) -> Tensor:
    """(spans, 3): the tensor, the first element, the elements of each span, tensor by tensor."""
    words = [
        (i, first, min(span, n - first)) for i, n in enumerate(numel) for first in range(0, n, span)
    ]
    return torch.tensor(words, dtype=torch.int64, device="cpu").reshape(-1, 3)


def _address_words(count: int, addresses: Sequence[tuple[int, ...]]) -> Tensor:
    """(count, 1 + lists): 1 where every address is aligned, and the addresses, 0 if absent."""
    numbers = [list_ or (0,) * count for list_ in addresses]
    columns = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    aligned = (columns % _ALIGNMENT == 0).all(dim=0, keepdim=True)
    return torch.cat([aligned, columns]).t().contiguous()


def _uploaded(words: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The words on the device, without waiting for it, and where they were copied from."""
    if device.type == "cpu":
        return words, words
    pinned = words.pin_memory()
    return pinned.to(device, non_blocking=True), pinned


# A CUDA graph copies its tables from here at every replay.
_graph_sources: list[Tensor] = []


def _captured_table(
    span: int, numel: tuple[int, ...], addresses: tuple[tuple[int, ...], ...], device: torch.device
) -> Table:
    """A table of its own for a CUDA graph, which outlives every cache."""
    spans, spans_source = _uploaded(_span_words(span, numel), device)
    words, words_source = _uploaded(_address_words(len(numel), addresses), device)
    _graph_sources.extend([spans_source, words_source])
    return Table(spans, words, len(spans))

"""The processes of a run under torchrun: who is who, and how a model is spread over them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.images import DataError

T = TypeVar("T")


class RanksError(Exception):
    """Processes cannot work together; the text says what to do."""


class Ranks(NamedTuple):
    """This process among those of the run; alone where `kind` is "off"."""

    kind: str = "off"  # one of settings.config.DISTRIBUTED
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def spread(self, model: nn.Module) -> nn.Module:
        """What runs in place of `model`, whose parameters under FSDP2 become shards."""
        if self.kind == "ddp":
            on_gpu = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(model, device_ids=on_gpu)
        if self.kind == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            # Without a mesh they would lie on a GPU wherever there is one.
            fully_shard(model, mesh=init_device_mesh(self.device.type, (self.world,)))
        return model

    def check_batch(self, batch_size: int, images: int) -> None:
        """Raise RanksError where the ranks' shares of a batch could differ in size."""
        if self.world > 1 and (batch_size % self.world or batch_size > images):
            raise RanksError(
                f"--batch-size is {batch_size}, expected a multiple of the {self.world} processes "
                f"and at most {images}, the training images"
            )

    def check_method(self, method: str) -> None:
        """Raise RanksError for a second stage, which changes the network after it was sharded."""
        if self.kind == "fsdp" and method != "ce":
            raise RanksError(
                f"--distributed is 'fsdp', expected 'ddp' or 'off' with --method {method}, whose "
                "second stage changes the network"
            )

    @property
    def part(self) -> slice:
        """This rank's rows of a batch."""
        return slice(self.rank, None, self.world)

    def sum_(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def average_statistics(self, model: nn.Module) -> None:
        """Each rank has its own BatchNorm statistics; this makes them the mean, on all ranks."""
        if self.world > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    self.sum_(buffer.div_(self.world))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on some rank; they all decide alike."""
        if self.world == 1:
            return flag
        return bool(self.sum_(torch.tensor(float(flag), device=self.device)))

    def agreed(self, batches: Iterable[T]) -> Iterator[T]:
        """`batches`, of which every rank has as many; where one cannot be read, all stop alike.

        A rank that goes on alone would wait for the others for ever.
        """
        if self.world == 1:
            yield from batches
            return
        source = iter(batches)
        while True:
            failure, batch = None, None
            try:
                batch = next(source, None)
            except DataError as error:
                failure = error
            if self.any(failure is not None):
                raise failure or DataError("another of the processes cannot read its images")
            if batch is None:
                return
            yield batch


ALONE = Ranks()


@contextmanager
def joined(kind: str, device: str) -> Iterator[Ranks]:
    """The ranks of this run. For "ddp" and "fsdp" the processes meet as torchrun tells them."""
    if kind == "off":
        yield Ranks(device=torch.device(device))
        return
    if "LOCAL_RANK" not in os.environ:
        raise RanksError(
            f"--distributed is {kind!r} and LOCAL_RANK is not set, expected to run under torchrun: "
            "torchrun --nproc-per-node N -m imbsam_fast train ..."
        )
    index = int(os.environ["LOCAL_RANK"])
    place = torch.device(device, index) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Ranks(kind, dist.get_rank(), dist.get_world_size(), place)
    finally:
        dist.destroy_process_group()


def state_of(
    kind: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of `model` and of its optimizer, whole on every rank."""
    if kind != "fsdp":
        return model.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(model, optimizer, options=whole)
    return weights, state  # type: ignore[return-value]


def load_state(
    kind: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: dict[str, Any],
    state: dict[str, Any],
) -> None:
    """What `state_of` returned, back into a model and an optimizer of the same `kind`."""
    if kind != "fsdp":
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    whole = StateDictOptions(full_state_dict=True)
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=state, options=whole
    )

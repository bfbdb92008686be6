"""A model that `fully_shard` spread over ranks, and what is compared of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import network
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

# torch 2.6's own FSDP2 needs a device with streams (docs/support.md).
needs_fsdp = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="FSDP2 of torch 2.6 does not run on a CPU"
)


class Scaled(nn.Module):
    """A network with a parameter of one element, of which most ranks hold nothing."""

    def __init__(self, norm: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = network(norm, dtype)
        self.scale = nn.Parameter(torch.full((1,), 1.5, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layers(x)


def sharded(model: nn.Module, **settings: Any) -> nn.Module:
    """Convolution and classifier in shards of their own, the rest in those of the root."""
    # Without a mesh they would lie on a GPU wherever there is one.
    settings = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),)), **settings}
    for layer in (model.layers[0], model.layers[-1]):
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(a: nn.Module, b: nn.Module, tolerance: float = 1e-12) -> None:
    for name, (p, q) in zip(dict(b.named_parameters()), zip(a.parameters(), b.parameters())):
        torch.testing.assert_close(whole(p), whole(q), rtol=0, atol=tolerance, msg=name)


def parts(model: nn.Module) -> list[Tensor]:
    """Copies of what this rank holds."""
    return [p.to_local().detach().clone() for p in model.parameters()]

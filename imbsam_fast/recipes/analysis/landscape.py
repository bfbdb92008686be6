"""Loss landscapes: the loss of several groups of classes around the weights of a model.

Filter-normalised random directions as in Li et al., "Visualizing the Loss Landscape of Neural
Nets" (2018), which make landscapes of differently scaled networks comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .modes import looked_at

Direction = dict[str, Tensor]  # parameter name -> its direction, of the parameter's shape
RowLosses = Callable[[Any, Tensor], Tensor]  # outputs, targets (N,) -> losses (N,)


def filter_normalised_direction(model: nn.Module, generator: torch.Generator) -> Direction:
    """A random direction, each filter of which is as long as the model's own.

    A filter is w[i] of a parameter w with two dimensions or more: the weights of one output.
    Biases and the parameters of normalisation layers, which have one dimension, stay where they
    are, as in the authors' figures. The same on every device.
    """
    direction = {}
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        noise = noise.to(weight.device, weight.dtype)
        if weight.ndim < 2:
            direction[name] = torch.zeros_like(noise)
            continue
        dims = tuple(range(1, weight.ndim))
        length = torch.linalg.vector_norm(weight.detach(), dim=dims, keepdim=True)
        own = torch.linalg.vector_norm(noise, dim=dims, keepdim=True)
        direction[name] = noise * (length / own.clamp_min(torch.finfo(noise.dtype).tiny))
    return direction


@torch.no_grad()
def group_losses(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    row_losses: RowLosses,
    batches: Sequence[tuple[Any, Tensor]],
    groups: Tensor,
    batch_norm: str = "running",
) -> Tensor:
    """The mean loss of the rows of each group, (G,) float64, at `weights`.

    `weights` takes the place of the model's own parameters, which are not changed. `groups`
    holds masks over the classes, bool (G, K); a group without a row has not-a-number.
    """
    device = next(model.parameters()).device
    groups = groups.to(device)
    total = torch.zeros(len(groups), dtype=torch.float64, device=device)
    rows = torch.zeros_like(total)
    with looked_at(model, batch_norm):
        for inputs, targets in batches:
            targets = targets.to(device)
            outputs = functional_call(model, dict(weights), (inputs.to(device),))
            losses = row_losses(outputs, targets).double()
            member = groups[:, targets]  # (G, N)
            # where, not a product: a row of infinite loss is no part of the other groups
            total += torch.where(member, losses, 0.0).sum(dim=1)
            rows += member.sum(dim=1)
    return total / rows


def moved(
    model: nn.Module, directions: Sequence[Direction], steps: Sequence[float]
) -> dict[str, Tensor]:
    """The weights theta + sum of steps_i directions_i; theta itself at zero."""
    weights = {}
    for name, weight in model.named_parameters():
        value = weight.detach()
        for direction, step in zip(directions, steps, strict=True):
            value = value + step * direction[name]
        weights[name] = value
    return weights


def losses_on_grid(
    losses_at: Callable[[dict[str, Tensor]], Tensor],
    model: nn.Module,
    directions: Sequence[Direction],
    steps: Sequence[float],
    on_point: Callable[[], None] = lambda: None,
) -> Tensor:
    """`losses_at` (weights -> (G,)) at every point of the grid that `directions` span.

    One direction gives (G, steps), two give (G, steps, steps), the first direction first.
    """
    points = []
    for point in product(steps, repeat=len(directions)):
        points.append(losses_at(moved(model, directions, point)))
        on_point()
    sides = [len(steps)] * len(directions)
    return torch.stack(points, dim=-1).unflatten(-1, sides).cpu()


def symmetric_steps(radius: float, number: int) -> list[float]:
    """`number` points from -radius to radius, with an exact 0 in the middle.

    Raises ValueError for an even `number`, which has no middle, or for fewer than three.
    """
    if number < 3 or number % 2 == 0:
        raise ValueError(f"number of points is {number}, expected an odd number from 3")
    half = number // 2
    return [radius * i / half for i in range(-half, half + 1)]

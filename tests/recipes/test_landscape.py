"""Loss landscapes: directions, the loss of groups of classes, and grids with known values."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from networks import batches, network
from torch import Tensor, nn

from imbsam_fast.recipes.analysis.landscape import (
    filter_normalised_direction,
    group_losses,
    losses_on_grid,
    moved,
    symmetric_steps,
)

HEAD_AND_TAIL = torch.tensor([[True] * 5 + [False] * 5, [False] * 5 + [True] * 5])
row_losses = partial(F.cross_entropy, reduction="none")


def direction(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    return filter_normalised_direction(model, torch.Generator().manual_seed(seed))


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


# ---------------------------------------------------------------- directions


def test_every_filter_of_a_direction_is_as_long_as_the_models_own():
    model = network()
    found = direction(model)
    for name, weight in model.named_parameters():
        assert found[name].shape == weight.shape
        for own, drawn in zip(weight.detach(), found[name]):
            expected = float(own.norm()) if weight.ndim > 1 else 0.0
            assert float(drawn.norm()) == pytest.approx(expected, rel=1e-12)


def test_a_direction_depends_on_the_seed_alone_and_is_random_inside_a_filter():
    model = network()
    first, again, other = (direction(model, seed)["0.weight"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    own = model[0].weight.detach()
    cosine = F.cosine_similarity(first.flatten(1), own.flatten(1))
    assert cosine.abs().max() < 0.9
    assert F.cosine_similarity(first.flatten(), other.flatten(), dim=0).abs() < 0.3


def test_a_filter_of_zeros_does_not_move():
    model = network()
    nn.init.zeros_(model[0].weight[2])
    assert not direction(model)["0.weight"][2].any()
    assert direction(model)["0.weight"].isfinite().all()


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("batch_norm", ["running", "batch"])
def test_group_losses_are_the_mean_losses_of_their_rows(batch_norm):
    model = network()
    data = list(batches(6))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = group_losses(model, own_weights(model), row_losses, data, HEAD_AND_TAIL, batch_norm)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    model.train(batch_norm == "batch")
    with torch.no_grad():
        losses = torch.cat([row_losses(model(x), y) for x, y in data])
    targets = torch.cat([y for _, y in data])
    expected = [losses[targets < 5].mean(), losses[targets >= 5].mean()]
    assert found.tolist() == pytest.approx([float(x) for x in expected], rel=1e-12)


def test_a_group_without_rows_has_no_loss():
    model = network()
    data = [(torch.randn(3, 3, 6, 6).double(), torch.tensor([0, 1, 2]))]
    found = group_losses(model, own_weights(model), row_losses, data, HEAD_AND_TAIL)
    assert found[0] > 0 and math.isnan(found[1])


def test_an_infinite_row_is_in_its_own_group_only():
    data = [(torch.eye(10), torch.tensor([0] + [9] * 9))]
    losses = torch.tensor([torch.inf] + [2.0] * 9)
    model = nn.Linear(10, 10)
    found = group_losses(
        model, own_weights(model), lambda outputs, targets: losses, data, HEAD_AND_TAIL
    )
    assert found.tolist() == [math.inf, 2.0]


# ---------------------------------------------------------------- grids


def test_at_zero_stands_the_loss_of_the_model():
    model = network()
    data = list(batches(3))
    losses_at = lambda weights: group_losses(  # noqa: E731
        model, weights, row_losses, data, HEAD_AND_TAIL
    )
    grid = losses_on_grid(losses_at, model, [direction(model), direction(model, 1)], [-1.0, 0, 1.0])
    assert grid.shape == (2, 3, 3)
    assert torch.equal(grid[:, 1, 1], losses_at(own_weights(model)))
    line = losses_on_grid(losses_at, model, [direction(model, 1)], [-1.0, 0, 1.0])
    assert torch.equal(grid[:, 1, :], line)
    assert len(grid.flatten().unique()) == 18


def test_the_landscape_of_a_quadratic_loss():
    """|(W + a D) x - W x|^2 = a^2 |D x|^2: symmetric, and known at every point."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    goal = model(x).detach()

    def losses_at(weights: dict[str, Tensor]) -> Tensor:
        return (x @ weights["weight"].T - goal).square().sum()[None]

    d, e = direction(model), direction(model, 1)
    steps = symmetric_steps(0.5, 5)
    ticks: list[int] = []
    (grid,) = losses_on_grid(losses_at, model, [d, e], steps, lambda: ticks.append(1))
    for i, a in enumerate(steps):
        for j, b in enumerate(steps):
            expected = (x @ (a * d["weight"] + b * e["weight"]).T).square().sum()
            torch.testing.assert_close(grid[i, j], expected)
    torch.testing.assert_close(grid, grid.flip(0, 1))
    assert grid[2, 2] == 0 and len(ticks) == 25


def test_moved_is_the_model_itself_at_zero_and_changes_nothing():
    model = network(dtype=torch.float32)
    before = [p.clone() for p in model.parameters()]
    still = moved(model, [direction(model), direction(model, 1)], [0.0, 0.0])
    assert all(torch.equal(a, b) for a, b in zip(still.values(), model.parameters()))
    away = moved(model, [direction(model)], [0.5])
    assert not torch.equal(away["0.weight"], model[0].weight)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_symmetric_steps():
    assert symmetric_steps(1.0, 5) == [-1.0, -0.5, 0.0, 0.5, 1.0]
    steps = symmetric_steps(0.3, 21)
    assert steps[10] == 0.0 and [-s for s in reversed(steps)] == steps


@pytest.mark.parametrize("number", [1, 4, 20])
def test_a_grid_without_a_middle_is_refused(number):
    with pytest.raises(ValueError, match=f"number of points is {number}, expected an odd number"):
        symmetric_steps(1.0, number)

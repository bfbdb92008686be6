"""same_dropout: the perturbed pass drops what the unperturbed pass of the same rows dropped."""

from __future__ import annotations

import pytest
import torch
from networks import COUNTS, batches, distance, imbsam, network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imbsam_fast import ClassSplit, SplitCrossEntropy, TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
each_device = pytest.mark.parametrize("device", DEVICES)


class Drops(nn.Module):
    """Dropout that tells its masks, each row's by the row's first pixel."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.passes: list[dict[float, tuple[bool, ...]]] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.rand_like(x[:, 0]).flatten(1) < 0.5
        first = x[:, 0, 0, 0].tolist()
        self.passes.append(dict(zip(first, map(tuple, mask.tolist()))))
        return self.model(2 * x * mask.view_as(x[:, :1]))


def step_of(model: nn.Module, **settings) -> TrainStep:
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    return TrainStep(model, criterion, imbsam(model), **settings)


def trained(model: nn.Module, device: str, steps: int = 4, **settings) -> nn.Module:
    step = step_of(model, **settings)
    torch.manual_seed(5)
    for x, y in batches(steps):
        step(x.to(device), y)
    return model


@each_device
@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("plan", ["joint", "split"])
def test_every_row_has_one_mask_in_a_step(plan, micro_batch_size, device):
    x, y = next(batches(1))
    for same in (True, False):
        model = Drops(network("group")).to(device)
        step = step_of(model, plan=plan, micro_batch_size=micro_batch_size, same_dropout=same)
        torch.manual_seed(5)
        masks = []
        for _ in range(2):
            model.passes.clear()
            step(x.to(device), y)
            half = len(model.passes) // 2 if plan == "joint" else -(-int((y >= 5).sum()) // 3)
            if plan == "split" and micro_batch_size is None:
                half = 1
            first = {k: m for p in model.passes[:-half] for k, m in p.items()}
            again = {k: m for p in model.passes[-half:] for k, m in p.items()}
            assert len(first) == 16 and again and first.keys() >= again.keys()
            alike = {k: first[k] == mask for k, mask in again.items()}
            assert all(alike.values()) if same else not any(alike.values())
            masks.append(first)
        assert not any(masks[0][k] == masks[1][k] for k in masks[0])  # each step draws anew


@each_device
def test_random_numbers_go_on_as_after_one_pass(device):
    """As if the perturbed pass had drawn nothing, so that no mask comes twice."""
    model = Drops(network("group")).to(device)
    x, y = next(batches(1))
    step = step_of(model, plan="joint", same_dropout=True)
    torch.manual_seed(5)
    step(x.to(device), y)
    following = torch.rand(4, device=device)
    torch.manual_seed(5)
    model(x.to(device))
    assert torch.equal(torch.rand(4, device=device), following)


def test_an_error_in_the_perturbed_pass_gives_the_generator_back():
    model = nn.Sequential(nn.Dropout(), network("group"))
    step = step_of(model, plan="joint", same_dropout=True)
    x, y = next(batches(1))

    def fail(*_: object) -> None:
        if step.optimizer.is_perturbed:
            raise ArithmeticError

    model[1].register_forward_hook(fail)
    torch.manual_seed(5)
    with pytest.raises(ArithmeticError):
        step(x, y)
    following = torch.rand(4)
    torch.manual_seed(5)
    nn.Dropout()(x)
    assert torch.equal(torch.rand(4), following)


class Masked(nn.Module):
    """The network under one mask that is given: what a step with same_dropout minimises."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.model(x["images"] * x["mask"])


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        # Reentrant checkpoints need an input with a gradient.
        return checkpoint(self.model, x.clone().requires_grad_(), use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("wrap", ["plain", "checkpoint", "reentrant checkpoint"])
def test_the_step_is_that_of_fixed_masks(wrap):
    inner = network("group")
    model: nn.Module = nn.Sequential(nn.Dropout(), inner)
    if wrap != "plain":
        model = Checkpointed(model, use_reentrant=wrap != "checkpoint")
    trained(model, "cpu", plan="joint", same_dropout=True)
    expected = Masked(network("group"))
    step = step_of(expected, plan="joint")
    torch.manual_seed(5)
    for x, y in batches(4):
        mask = nn.functional.dropout(torch.ones_like(x))
        step({"images": x, "mask": mask}, y)
    assert distance(inner, expected.model) < 1e-12
    different = nn.Sequential(nn.Dropout(), network("group"))
    trained(different, "cpu", plan="joint")
    assert distance(inner, different[1]) > 1e-6


@each_device
def test_autocast_and_a_scaler_change_nothing_about_the_masks(device):
    model = Drops(network("group", torch.float32)).to(device)
    scaler = torch.amp.GradScaler(device, init_scale=8.0)
    autocast = torch.autocast(device, torch.bfloat16)
    step = step_of(model, plan="joint", autocast=autocast, grad_scaler=scaler, same_dropout=True)
    x, y = next(batches(1, torch.float32))
    step(x.to(device), y)
    assert model.passes[0] == model.passes[1]


def test_compiled_dropout_is_replayed():
    losses = []

    class Keeps(nn.Module):
        """The mask is what is left of ones."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            dropped = nn.functional.dropout(x, training=self.training)
            return self.fc(dropped), dropped

    model = torch.compile(Keeps())
    loss = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))

    class First:
        split = loss.split

        def __call__(self, outputs, targets, batch_size=None):
            losses.append(outputs[1].detach().clone())
            return loss(outputs[0], targets, batch_size)

    step = TrainStep(model, First(), imbsam(model), plan="joint", same_dropout=True)
    x, y = torch.ones(16, 64), torch.arange(16) % 10
    for _ in range(2):
        losses.clear()
        step(x, y)
        assert torch.equal(*losses) and 0 < float((losses[0] == 0).float().mean()) < 1


def test_a_plan_with_other_rows_in_the_perturbed_pass_is_an_error():
    model = nn.Sequential(nn.Dropout(), network("group"))
    step = step_of(model, same_dropout=True)
    x, y = next(batches(1))
    step.forward(x, y, 16)
    step.optimizer.zero_grad()
    with pytest.raises(
        RuntimeError, match=r"same_dropout is True, and the perturbed pass has \[3\]"
    ):
        step.perturbed_backward(x[:3], y[:3], 16)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="same_dropout is 1"):
        step_of(network("group"), same_dropout=1)

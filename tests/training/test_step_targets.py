"""TrainStep with other targets than labels, and models that are called and answer otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from networks import COUNTS, RHO, batches, distance, imbsam, network
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from imbsam_fast import ClassSplit, SplitBCEWithLogits, SplitCrossEntropy, TrainStep, split_loss
from imbsam_fast.losses import SplitLoss
from imbsam_fast.training.rows import take_rows

pytestmark = pytest.mark.usefixtures("one_thread")

SPLIT = ClassSplit.from_counts(COUNTS)  # classes 5 to 9 are tail


def mixed(y: Tensor) -> Tensor:
    """Every second row is mixed with another one, one row is ignored."""
    q = F.one_hot(y, 10).double()
    q[::2] = 0.7 * q[::2] + 0.3 * q.flip(0)[::2]
    q[5] = 0
    return q


def terms(outputs: Tensor, targets: Tensor) -> Tensor:
    return -targets * outputs.log_softmax(1)


class PerPixel(nn.Module):
    """Labels for the positions of an image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 10, 3, padding=1), nn.AvgPool2d(3)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def dense_labels(y: Tensor) -> Tensor:
    labels = torch.stack([y, y.flip(0), (y + 1) % 10, torch.full_like(y, -100)], 1)
    return labels.reshape(-1, 2, 2)


Case = tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[Tensor], Tensor]]
CASES: dict[str, Case] = {
    "distributions": (lambda: network("group"), lambda: SplitCrossEntropy(SPLIT), mixed),
    "terms of the classes": (lambda: network("group"), lambda: split_loss(terms, SPLIT), mixed),
    "dense labels": (PerPixel, lambda: SplitCrossEntropy(SPLIT), dense_labels),
    "many labels": (
        lambda: network("group"),
        lambda: SplitBCEWithLogits(SPLIT),
        lambda y: F.one_hot(y, 10) + F.one_hot((y + 3) % 10, 10),
    ),
}


def trained(case: str, steps: int = 7, **settings: Any) -> tuple[nn.Module, list]:
    model, criterion, targets_of = CASES[case][0](), CASES[case][1](), CASES[case][2]
    step = TrainStep(model, criterion, imbsam(model), **settings)
    return model, [step(x, targets_of(y)) for x, y in batches(steps)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "settings",
    [{"plan": "split"}, {"plan": "auto"}, {"plan": "sampled"}, {"micro_batch_size": 5}],
    ids=["split", "auto", "sampled", "micro-batches"],
)
def test_plans_agree_for_all_targets(case, settings):
    (joint, expected), (model, found) = trained(case, plan="joint"), trained(case, **settings)
    assert distance(joint, CASES[case][0]()) > 1e-4
    assert distance(joint, model) < 1e-12
    for a, b in zip(expected, found):
        torch.testing.assert_close((a.loss, a.logits), (b.loss, b.logits), rtol=1e-11, atol=1e-11)
        assert a.tail_share == b.tail_share


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_algorithm_1(case):
    """One step without momentum, from gradients of the criterion's two parts."""
    model, criterion, targets_of = CASES[case][0](), CASES[case][1](), CASES[case][2]
    x, y = next(batches(1))
    targets = targets_of(y)
    params = list(model.parameters())

    def gradient(part: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(getattr(criterion(model(x), targets), part), params)

    start = [p.detach().clone() for p in params]
    g_h, g_t = gradient("head"), gradient("tail")
    norm = torch.cat([g.flatten() for g in g_t]).norm()
    with torch.no_grad():
        for p, g in zip(params, g_t):
            p += RHO * g / norm
    g_p = gradient("tail")
    expected = [s - 0.05 * (h + p + 5e-3 * s) for s, h, p in zip(start, g_h, g_p)]
    found, _ = trained(case, steps=1, plan="split")
    torch.testing.assert_close([p.detach() for p in found.parameters()], expected)


def test_the_split_plan_runs_a_row_where_it_has_weight_alone():
    model = network("group")
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    step = TrainStep(model, SplitCrossEntropy(SPLIT), imbsam(model), plan="split")
    q = torch.zeros(16, 10)
    q[:8, 0] = 1  # head
    q[8:12, 9] = 1  # tail
    q[12:, 4] = q[12:, 5] = 0.5  # both
    result = step(next(batches(1))[0], q)
    assert rows == [12, 8, 8] and result.tail_share == 6 / 16
    rows.clear()
    assert not step(next(batches(1))[0], F.one_hot(torch.arange(16) % 5, 10).double()).perturbed
    assert rows == [16]


# ---------------------------------------------------------------- calls and outputs


class Output(NamedTuple):
    logits: Tensor
    hidden: Tensor


class TwoInputs(nn.Module):
    """Takes its inputs by name, and answers as it is told."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.answer = network("group"), answer

    def forward(self, images: Tensor, scale: Tensor) -> Any:
        return self.answer(self.model(images) * scale)


ANSWERS: dict[str, tuple[Callable[[Tensor], Any], str | int | None]] = {
    "a tensor": (lambda z: z, None),
    "a dict": (lambda z: {"hidden": torch.zeros(3), "logits": z}, "logits"),
    "attributes": (lambda z: Output(z, torch.zeros(3)), "logits"),
    "a tuple": (lambda z: (torch.zeros(3), z), 1),
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("plan", ["joint", "split"])
@pytest.mark.parametrize("by", ["name", "place"])
def test_inputs_are_unpacked_and_logits_found(answer, plan, by):
    """Entries of no row, which no batch could be put together from, are left out."""
    make, logits = ANSWERS[answer]
    model, expected = TwoInputs(make), network("group")
    criterion = SplitCrossEntropy(SPLIT)
    step = TrainStep(model, criterion, imbsam(model), plan, unpack=True, logits=logits)
    plain = TrainStep(expected, criterion, imbsam(expected), plan)
    for x, y in batches(3):
        scale = torch.ones(len(y), 1, dtype=torch.float64)
        inputs = {"images": x, "scale": scale} if by == "name" else (x, scale)
        found = step(inputs, y)
        torch.testing.assert_close(found.logits, plain(x, y).logits)
    assert distance(model.model, expected) == 0


# ---------------------------------------------------------------- refusals


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a torch built with CUDA")
def test_rows_that_are_chosen_on_the_cpu_of_a_batch_on_a_gpu() -> None:
    """As the sampled plan does; a fake GPU refuses what a real one would."""
    with FakeTensorMode():
        rows = torch.tensor([0, 2])
        batch = torch.empty(4, 3, device="cuda"), torch.empty(4, 3, 2, 2, device="cuda")
        labels = torch.empty(4, dtype=torch.int64, device="cuda")
        taken, targets = take_rows(rows, batch, labels)
    assert [(x.device.type, len(x)) for x in (*taken, targets)] == [("cuda", 2)] * 3


class LabelsOnly:
    split = SPLIT

    def __call__(self, outputs: Tensor, targets: Tensor, batch_size: Any = None) -> SplitLoss:
        return SplitCrossEntropy(SPLIT)(outputs, targets, batch_size)


def stepping(criterion: Any = None, **settings: Any) -> TrainStep:
    model = network("group")
    return TrainStep(model, criterion or SplitCrossEntropy(SPLIT), imbsam(model), **settings)


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], object], str]] = {
    "labels of another dtype": (
        lambda x, y: stepping()(x, y.int()),
        r"targets is torch.int32 \(16,\), expected int64 labels \(N,\) or",
    ),
    "labels as floats": (
        lambda x, y: stepping()(x, y.double()),
        r"targets is torch.float64 \(16,\), expected int64 labels \(N,\) or",
    ),
    "a list": (lambda x, y: stepping()(x, y.tolist()), "targets is list, expected int64 labels"),
    "other rows": (
        lambda x, y: stepping()(x, mixed(y)[:9]), r"inputs holds a tensor of shape .*expected 9",
    ),
    "other classes": (
        lambda x, y: stepping()(x, mixed(y)[:, :9]), "the split has 10 classes, expected 9",
    ),
    "a criterion that takes labels alone": (
        lambda x, y: stepping(LabelsOnly())(x, mixed(y)),
        r"targets is torch.float64 \(16, 10\), expected int64 labels \(N,\)",
    ),
    "no mapping": (
        lambda x, y: stepping(unpack=True)(x, y),
        "inputs is Tensor, expected with unpack=True a mapping",
    ),
    "no such logits": (
        lambda x, y: stepping(logits="scores")(x, y),
        "logits is 'scores', expected an entry of what the model returned: Tensor",
    ),
    "logits": (lambda x, y: stepping(logits=1.5), "logits is 1.5, expected the name or the place"),
    "unpack": (lambda x, y: stepping(unpack="yes"), "unpack is 'yes', expected True or False"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_name_what_was_given(what):
    attempt, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        attempt(*next(batches(1)))

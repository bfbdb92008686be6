"""What a step says of its gradients, against the definition in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import COUNTS, RHO, batches, imbsam, network
from phases import equal, fill, gradients, parameters
from torch import Tensor, nn

from imbsam_fast import ClassSplit, ImbSAM, LeanImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.optim import scaling
from imbsam_fast.training.step_graphs import unconditional

pytestmark = pytest.mark.usefixtures("one_thread")

# Settings of TrainStep; "norm" and "adaptive" are the network's and the optimizer's.
CASES: dict[str, dict[str, Any]] = {
    "joint": {"plan": "joint"},
    "joint, batch norm": {"plan": "joint", "norm": "batch"},
    "split": {"plan": "split"},
    "sampled": {"plan": "sampled"},
    "sampled, batch norm": {"plan": "sampled", "norm": "batch", "sample": 1.0},
    "every third": {"plan": "split", "perturb_every": 3},
    "micro-batches": {"plan": "joint", "micro_batch_size": 5},
    "split micro-batches": {"plan": "split", "micro_batch_size": 3},
    "scaler": {"plan": "joint", "scale": 1024.0},
    "adaptive": {"plan": "split", "adaptive": True},
    "a group at theta": {"plan": "joint", "perturb": False},
    "lean": {"plan": "joint", "lean": True},
}


class Definition:
    """The equations of docs/design.md section 2 on a copy of the model, in float64."""

    def __init__(self, adaptive: bool, perturb: bool, every: int) -> None:
        self.adaptive, self.perturb, self.every = adaptive, perturb, every
        self.counted = 0

    def norms(self, model: nn.Module, x: Tensor, y: Tensor, max_norm: float | None) -> dict:
        model = copy.deepcopy(model)
        params = list(model.parameters())
        in_tail = torch.tensor(COUNTS)[y] <= 100
        g_h, g_t = (self.gradient(model, x, y, rows) for rows in (~in_tail, in_tail))
        has_tail = bool(in_tail.any())
        self.counted += has_tail
        perturbed = has_tail and self.counted % self.every == 0
        g_p = g_t
        if perturbed:
            self.move(params, g_t)
            g_p = self.gradient(model, x, y, in_tail)
        grad_norm = norm([h + p for h, p in zip(g_h, g_p)])
        moved = g_t if self.perturb else g_t[:-1]
        factor = None if max_norm is None else min(1.0, max_norm / (grad_norm + 1e-6))
        return {
            "grad_norm": grad_norm,
            "tail_grad_norm": norm(moved) if perturbed and not self.adaptive else None,
            "clip_factor": factor,
            "tail_share": float(in_tail.double().mean()),
            "perturbed": perturbed,
        }

    def gradient(self, model: nn.Module, x: Tensor, y: Tensor, rows: Tensor) -> list[Tensor]:
        log_p = torch.log_softmax(model(x), dim=1)
        loss = -log_p[torch.arange(len(y)), y][rows].sum() / len(y)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    @torch.no_grad()
    def move(self, params: list[Tensor], g: list[Tensor]) -> None:
        if not self.perturb:
            params, g = params[:-1], g[:-1]
        t = [p.abs() if self.adaptive else torch.ones_like(p) for p in params]
        length = norm([a * b for a, b in zip(t, g)])
        for p, a, b in zip(params, t, g):
            p += RHO * a * a * b / length


def norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([t.reshape(-1) for t in tensors]).norm())


def train_step(model: nn.Module, max_norm: float | None, **case: Any) -> TrainStep:
    lean, adaptive = case.pop("lean", False), case.pop("adaptive", False)
    optimizer = imbsam(model, adaptive=adaptive)
    if lean:
        optimizer = LeanImbSAM(optimizer.base, rho=RHO)
    if not case.pop("perturb", True):
        *others, last = model.parameters()
        groups = [{"params": others}, {"params": [last], "perturb": False}]
        optimizer = ImbSAM(torch.optim.SGD(groups, 0.05), rho=RHO)
    if scale := case.pop("scale", None):
        case["grad_scaler"] = torch.amp.GradScaler("cpu", init_scale=scale)
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    return TrainStep(model, criterion, optimizer, max_norm=max_norm, **case)


@pytest.mark.parametrize("max_norm", [None, float("inf"), 0.6])
@pytest.mark.parametrize("case", CASES)
def test_norms_are_those_of_the_definition(case, max_norm):
    settings = dict(CASES[case])
    model = network(settings.pop("norm", "group"))
    lean = "lean" in settings
    step = train_step(model, None if lean else max_norm, **settings)
    definition = Definition(
        settings.get("adaptive", False), settings.get("perturb", True),
        settings.get("perturb_every", 1),
    )  # fmt: skip
    clipped = []
    for x, y in batches(8):
        expected = definition.norms(model, x, y, None if lean else max_norm)
        if lean or (max_norm is None and "scale" not in settings):
            expected["grad_norm"] = None
        result = step(x, y)
        for name, value in expected.items():
            found = getattr(result, name)
            assert (found is None) == (value is None), name
            if name in ("tail_share", "perturbed"):
                assert type(found) is type(value) and found == value, name
            elif value is not None:
                assert isinstance(found, Tensor) and found.dim() == 0 and not found.requires_grad
                assert float(found) == pytest.approx(value, rel=1e-9), name
        clipped.append(expected["clip_factor"])
    if max_norm == 0.6 and not lean:
        assert min(clipped) < 1


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_measuring_changes_no_bit(scale):
    ends = []
    for max_norm in (None, float("inf")):
        model = network("batch")
        step = train_step(model, max_norm, plan="joint", scale=scale)
        for x, y in batches(4):
            step(x, y)
        ends.append(list(model.parameters()))
    assert equal(*ends)


@pytest.mark.parametrize(("settings", "passes"), [({}, 0), ({"max_norm": float("inf")}, 1)])
def test_the_combined_norm_costs_a_pass_where_it_is_asked_for_alone(monkeypatch, settings, passes):
    made = []
    grad_check = scaling.ops.grad_check
    monkeypatch.setattr(scaling.ops, "grad_check", lambda *a: made.append(a) or grad_check(*a))
    model = network("group")
    train_step(model, settings.get("max_norm"), plan="split")(*next(batches(1)))
    assert len(made) == passes


def test_the_three_calls_return_them():
    params = parameters()
    optimizer = ImbSAM(torch.optim.SGD(params, 0.1))
    passes = [gradients(i) for i in range(3)]
    for call, grads in zip((optimizer.first_step, optimizer.second_step), passes):
        fill(params, grads)
        assert call() is None
    fill(params, passes[2])
    norms = optimizer.third_step(max_norm=float("inf"))
    combined = norm([h + p for h, p in zip(passes[0], passes[2])])
    assert float(norms.grad_norm) == pytest.approx(combined, rel=1e-12)
    assert float(norms.tail_grad_norm) == pytest.approx(norm(passes[1]), rel=1e-12)
    assert float(norms.clip_factor) == 1 and norms.perturbed is True
    none = optimizer.third_step(max_norm=1.0)  # there is no gradient
    assert [*none] == [None, None, None, False]


def test_a_step_that_overflowed_says_so_in_its_norm():
    params = parameters()
    optimizer, grad_scaler = ImbSAM(torch.optim.SGD(params, 0.1)), torch.amp.GradScaler("cpu")
    grad_scaler.scale(torch.zeros(()))
    grads = gradients(0)
    grads[1][2] = torch.inf
    fill(params, grads)
    norms = optimizer.third_step(grad_scaler, max_norm=float("inf"))
    assert norms.grad_norm.isinf() and float(norms.clip_factor) == 1 and not norms.perturbed
    assert equal(params, parameters())


def test_a_step_that_looks_at_no_label_knows_the_norms_alone():
    """As in a CUDA graph."""
    model, expected = network("batch"), network("batch")
    x, y = next(batches(1))
    step = train_step(model, float("inf"), plan="joint")
    found = unconditional(step, x, y)
    known = train_step(expected, float("inf"), plan="joint")(x, y)
    for name in ("grad_norm", "tail_grad_norm", "clip_factor"):
        torch.testing.assert_close(getattr(found, name), getattr(known, name))
    assert found.tail_share is None and found.perturbed is None
    assert known.tail_share is not None and known.perturbed is True

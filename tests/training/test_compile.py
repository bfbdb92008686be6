"""torch.compile: models under both plans, and the optimizer's own phases."""

from __future__ import annotations

import copy

import pytest
import torch
from compiles import needs_a_compiler
from torch import nn

from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep, ops

pytestmark = needs_a_compiler

COUNTS = [500, 300, 200, 50, 20, 5]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), norm, nn.GELU(), nn.Linear(32, 6))


def optimizer_for(model: nn.Module, lr: float | torch.Tensor = 0.1) -> ImbSAM:
    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    return ImbSAM(base)


def train(model: nn.Module, plan: str, steps: int = 5) -> None:
    """The first batch has no tail row: its graph must serve the later ones too."""
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    # More tail rows than the sample holds would be filled up in the compiled model alone.
    sample = {"sample": 0.5} if plan == "sampled" else {}
    step = TrainStep(model, criterion, optimizer_for(model), plan=plan, **sample)
    generator = torch.Generator().manual_seed(1)
    for i in range(steps):
        inputs = torch.randn(32, 12, generator=generator)
        step(inputs, torch.arange(32) % (3 if i == 0 else 6))


@pytest.mark.parametrize(
    ("norm", "plan"),
    [
        (nn.LayerNorm(32), "joint"),
        (nn.LayerNorm(32), "split"),  # with batch statistics it is another algorithm
        (nn.BatchNorm1d(32), "joint"),
        (nn.BatchNorm1d(32), "sampled"),
    ],
    ids=["layer-joint", "layer-split", "batch-joint", "batch-sampled"],
)
def test_a_compiled_model_trains_like_the_eager_one(norm, plan):
    eager, compiled = network(norm), network(copy.deepcopy(norm))
    train(eager, plan)
    train(torch.compile(compiled, fullgraph=True), plan)
    torch.testing.assert_close(eager.state_dict(), compiled.state_dict(), rtol=1e-4, atol=1e-5)


def test_step_with_a_closure_works_on_a_compiled_model():
    models = [network(nn.LayerNorm(32)) for _ in range(2)]
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    x, y = torch.randn(32, 12), torch.arange(32) % 6
    for original, model in zip(models, (models[0], torch.compile(models[1]))):
        optimizer = optimizer_for(original)
        for _ in range(3):
            optimizer.step(lambda model=model: criterion(model(x), y))
    torch.testing.assert_close(*(list(m.parameters()) for m in models), rtol=1e-4, atol=1e-5)


def test_a_graph_compiled_for_one_backward_is_refused_not_misread():
    model = torch.compile(network(nn.BatchNorm1d(32)))
    model(torch.randn(32, 12)).sum().backward()
    model.zero_grad()
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(RuntimeError, match=r"call torch._dynamo.reset\(\) once before"):
        train(model, "joint", steps=2)
    torch._dynamo.reset()
    train(model, "joint", steps=2)
    assert not torch.equal(before["_orig_mod.0.weight"], model.get_parameter("_orig_mod.0.weight"))


def test_the_loss_compiles_with_the_model():
    model = network(nn.LayerNorm(32))
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS), label_smoothing=0.1)
    x, y = torch.randn(32, 12), torch.arange(32) % 6

    def loss(x, y):
        parts = criterion(model(x), y)
        return parts.head + 2 * parts.tail

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True)):
        value = f(x, y)
        results.append((value, torch.autograd.grad(value, list(model.parameters()))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="torch.compile before 2.7 traces no context managers"
)
def test_the_phases_compile_as_full_graphs():
    eager, compiled = network(nn.LayerNorm(32)), network(nn.LayerNorm(32))
    for model, wrap in (
        (eager, lambda f: f),
        (compiled, lambda f: torch.compile(f, fullgraph=True)),
    ):
        optimizer = optimizer_for(model, lr=torch.tensor(0.1))
        phases = [
            wrap(f) for f in (optimizer.first_step, optimizer.second_step, optimizer.third_step)
        ]
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            for phase in phases:
                for p in model.parameters():
                    p.grad = torch.randn(p.shape, generator=generator)
                phase()
    assert all(torch.equal(a, b) for a, b in zip(eager.parameters(), compiled.parameters()))


def test_the_operators_compile_as_one_graph():
    def phases(theta, g_t, g_h, g_p, m, lr):
        ops.perturb_(theta, g_t, ops.squared_norm(g_t), 0.05)
        ops.sgd_update_(theta, g_t, g_h, g_p, m, lr, 0.9, 0.0, 5e-4, False, False)

    def tensors():
        torch.manual_seed(0)
        return [[torch.randn(7, 5), torch.randn(3)] for _ in range(5)]

    eager, compiled = tensors(), tensors()
    lr = torch.tensor(0.1)
    phases(*eager, lr)
    torch.compile(phases, fullgraph=True)(*compiled, lr)
    for a, b in zip(eager, compiled):
        assert all(torch.equal(x, y) for x, y in zip(a, b))

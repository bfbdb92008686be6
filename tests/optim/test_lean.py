"""LeanImbSAM: the steps of ImbSAM, in the memory of SGD, and what a failure leaves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import COUNTS, LR, MOMENTUM, RHO, WEIGHT_DECAY, batches, distance, network
from phases import classifier, equal, fill, gradients, parameters, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.bench_memory import LiveBytes
from imbsam_fast import ClassSplit, ImbSAM, LeanImbSAM, SplitCrossEntropy, TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")

each_plan = pytest.mark.parametrize("plan", ["joint", "split"])

SETTINGS = {
    "decay": {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY},
    "no decay": {"momentum": 0.5},
    "dampening": {"momentum": MOMENTUM, "weight_decay": 0.1, "dampening": 0.5},
    "maximize": {"momentum": MOMENTUM, "weight_decay": 0.1, "maximize": True},
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def optimizers(settings: dict, dtype=torch.float64, **own) -> list[tuple[ImbSAM, list]]:
    """An ordinary and a lean one on equal parameters, in two groups."""
    found = []
    for kind in (ImbSAM, LeanImbSAM):
        params = parameters(dtype)
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": torch.tensor(0.03)}]
        base = torch.optim.SGD(groups, lr=0.1, foreach=False, **settings)
        found.append((kind(base, **own), params))
    return found


def backward(params: list[nn.Parameter], grads: list[Tensor | None]) -> None:
    """A backward pass that computes these gradients."""
    sum((p * g).sum() for p, g in zip(params, grads) if g is not None).backward()


def step_through(optimizer: ImbSAM, params: list, passes: list[list | None]) -> None:
    """One step whose passes have these gradients; a pass that is None is left out."""
    calls = (optimizer.first_step, optimizer.second_step, optimizer.third_step)
    for grads, call in zip(passes, calls):
        if grads is not None:
            backward(params, grads)
            call()


def lean(model: nn.Module, **settings) -> LeanImbSAM:
    settings = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, **settings}
    return LeanImbSAM(torch.optim.SGD(model.parameters(), LR, **settings), rho=RHO)


def stepping(model: nn.Module, optimizer: ImbSAM | None = None, **settings) -> TrainStep:
    criterion = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))
    return TrainStep(model, criterion, optimizer or lean(model), **settings)


def trained(kind: type[ImbSAM], norm: str, steps: int = 20, dtype=torch.float64, **settings):
    model = network(norm, dtype)
    base = torch.optim.SGD(model.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
    step = stepping(model, kind(base, rho=RHO), **settings)
    results = [step(x, y) for x, y in batches(steps, dtype)]
    return model, results


def momentum(optimizer: ImbSAM) -> list[Tensor]:
    return [s["momentum_buffer"] for s in optimizer.state.values()]


# ---------------------------------------------------------------- the same steps


@each_setting
@pytest.mark.parametrize("adaptive", [False, True])
def test_steps_are_the_ordinary_ones(settings, adaptive):
    (ordinary, expected), (other, params) = optimizers(settings, rho=0.5, adaptive=adaptive)
    for step in range(5):
        passes = [gradients(3 * step + i) for i in range(3)]
        step_through(ordinary, expected, passes)
        step_through(other, params, passes)
        assert all(p.grad is None for p in params)
    torch.testing.assert_close(params, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(momentum(other), momentum(ordinary), rtol=1e-13, atol=1e-14)
    assert not equal(params, parameters())


@each_setting
@pytest.mark.parametrize("left_out", [(0,), (1,), (0, 1)], ids=["sam", "two sums", "sgd"])
def test_passes_may_be_left_out(settings, left_out):
    (ordinary, expected), (other, params) = optimizers(settings)
    for step in range(3):
        passes = [None if i in left_out else gradients(3 * step + i) for i in range(3)]
        step_through(ordinary, expected, passes)
        step_through(other, params, passes)
    torch.testing.assert_close(params, expected, rtol=1e-13, atol=1e-14)


@each_setting
@pytest.mark.parametrize("present", range(8))
def test_parameters_without_a_gradient_in_some_passes(settings, present):
    """Bit i of `present`: whether parameter 3 has one in pass i; the others always do."""
    (ordinary, expected), (other, params) = optimizers(settings)
    for step in range(3):
        passes = [gradients(3 * step + i) for i in range(3)]
        for i, grads in enumerate(passes):
            if not present >> i & 1:
                grads[3] = None
        step_through(ordinary, expected, passes)
        step_through(other, params, passes)
    torch.testing.assert_close(params, expected, rtol=1e-13, atol=1e-14)
    assert len(other.state) == len(ordinary.state)
    assert torch.equal(params[3], parameters()[3]) == (present & 5 == 0)


@each_plan
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("size", [None, 5])
def test_train_steps_are_the_ordinary_ones(plan, norm, size):
    """Among them batches without tail and without head rows."""
    settings = {"plan": plan, "micro_batch_size": size}
    expected, seen = trained(ImbSAM, norm, **settings)
    model, results = trained(LeanImbSAM, norm, **settings)
    assert distance(model, expected) < 1e-12
    for a, b in zip(results, seen):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_float32_and_autocast():
    autocast = torch.autocast("cpu", torch.bfloat16)
    for settings, tolerance in (({}, 1e-5), ({"autocast": autocast}, 1e-2)):
        models = [
            trained(kind, "group", 10, torch.float32, **settings)[0]
            for kind in (ImbSAM, LeanImbSAM)
        ]
        assert distance(*models) < tolerance


def test_compiled_models():
    ends = []
    for compile_it in (False, True):
        model = network("group")
        compiled = torch.compile(model, backend="aot_eager") if compile_it else model
        step = stepping(compiled, plan="joint")
        for x, y in batches(3):
            step(x, y)
        ends.append(model)
    assert distance(*ends) < 1e-13


def test_the_step_with_a_closure():
    ends = []
    for kind in (ImbSAM, LeanImbSAM):
        model, criterion, x, y = classifier()
        optimizer = kind(torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=0.01))
        for _ in range(3):
            optimizer.step(lambda model=model: criterion(model(x), y))  # noqa: B023
        ends.append(model)
    assert distance(*ends) < 1e-14


@pytest.mark.parametrize("reentrant", [False, True])
def test_tied_weights_under_activation_checkpointing(reentrant):
    """Their gradient arrives in two pieces, and the second one needs the perturbed weights."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.linear, self.last = (
                nn.Linear(*size).double() for size in ((4, 6), (6, 6), (6, 10))
            )

        def forward(self, x):
            x = self.first(x)
            for _ in range(2):
                x = checkpoint(lambda x: self.linear(x).tanh(), x, use_reentrant=reentrant)
            return self.last(x)

    ends = []
    for kind in (ImbSAM, LeanImbSAM):
        model = Tied()
        base = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=0.01)
        step = stepping(model, kind(base, rho=0.5), plan="joint")
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            step(torch.randn(10, 4, generator=generator, dtype=torch.float64), torch.arange(10))
        ends.append(model)
    assert distance(*ends) < 1e-13


def test_frozen_parameters_stay_and_several_backwards_add_up():
    (ordinary, expected), (other, params) = optimizers(SETTINGS["decay"])
    for optimizer, own in ((ordinary, expected), (other, params)):
        own[1].requires_grad_(False)
        trainable = [p for p in own if p.requires_grad]
        for i, call in enumerate(
            (optimizer.first_step, optimizer.second_step, optimizer.third_step)
        ):
            for piece in range(2):
                backward(trainable, gradients(2 * i + piece)[: len(trainable)][:1])
            call()
    torch.testing.assert_close(params, expected, rtol=1e-13, atol=1e-14)
    assert equal(params[1:], parameters()[1:])


# ---------------------------------------------------------------- memory


@each_plan
def test_the_peak_is_that_of_weights_saved_and_momentum(plan):
    layers = [nn.Linear(64, 64, bias=False) for _ in range(50)]
    model = nn.Sequential(*layers, nn.Linear(64, 10, bias=False))
    n = sum(p.nbytes for p in model.parameters())
    x, y = torch.randn(2, 64), torch.tensor([0, 9])
    peaks = []
    for kind in (ImbSAM, LeanImbSAM):
        own = copy.deepcopy(model)
        step = stepping(own, kind(torch.optim.SGD(own.parameters(), 1e-3, 0.9)), plan=plan)
        with LiveBytes(*own.parameters(), x, y) as count:
            for _ in range(2):
                step(x, y)
                assert count.live < 2.1 * n
        peaks.append(count.peak / n)
    assert 5 < peaks[0] < 5.2
    assert 3 < peaks[1] < 3.2  # one gradient is 0.02 n, the activations of a pass 0.12 n


# ---------------------------------------------------------------- failures


class Failing(nn.Module):
    """Raises in the n-th forward, or in the middle of that forward's backward."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model, self.calls, self.fails, self.backward = model, 0, None, False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls != self.fails:
            return self.model(x)
        if not self.backward:
            raise MemoryError("injected")
        h = self.model[:3](x)
        h.register_hook(fail)  # when the last layer's gradients have arrived
        return self.model[3:](h)


def fail(_: Tensor) -> None:
    raise MemoryError("injected")


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("plan", "call"), [("joint", 1), ("joint", 2), ("split", 1), ("split", 2), ("split", 3)]
)
def test_a_failure_leaves_the_weights_and_what_it_says_of_the_momentum(
    plan, call, in_backward, first
):
    model = Failing(network("group", torch.float32))
    params = list(model.parameters())
    optimizer = lean(model)
    step = stepping(model, optimizer, plan=plan)
    (x, y), (x2, y2) = list(batches(2, torch.float32))
    if not first:
        step(x, y)
    before, m = snapshot(params), snapshot(momentum(optimizer))
    theta = copy.deepcopy(model.model)
    model.calls, model.fails, model.backward = 0, call, in_backward
    with pytest.raises(MemoryError, match="injected"):
        step(x2, y2)
    assert equal(params, before)
    assert not optimizer.is_perturbed and all(p.grad is None for p in params)
    assert not any(p._post_accumulate_grad_hooks for p in params)
    if first:
        assert not optimizer.state
    elif call == 1:  # nothing was taken up yet
        assert equal(momentum(optimizer), m)
    else:
        losses = SplitCrossEntropy(ClassSplit.from_counts(COUNTS))(theta(x2), y2)
        g_h = torch.autograd.grad(losses.head, list(theta.parameters()))
        for i, (found, was, h, p) in enumerate(zip(momentum(optimizer), m, g_h, before)):
            expected = MOMENTUM * was + (h + WEIGHT_DECAY * p)
            perturbed = call == (2 if plan == "joint" else 3)
            if perturbed and in_backward and i >= len(m) - 2:  # these had g_p too
                assert not torch.allclose(found, expected, rtol=1e-3)
            else:
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    model.fails = None
    step(x2, y2)
    assert not equal(params, before) and all(p.isfinite().all() for p in params)


def test_the_three_calls_out_of_order():
    (_, _), (optimizer, params) = optimizers(SETTINGS["decay"])
    before = snapshot(params)
    fill(params, gradients(0))
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="first_step was called twice"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="state_dict in the middle of a step, where a grad"):
        optimizer.state_dict()
    fill(params, gradients(1))
    optimizer.second_step()
    with pytest.raises(RuntimeError, match="second_step was called twice"):
        optimizer.second_step()
    optimizer.restore()
    assert equal(params, before) and not optimizer.state
    assert not any(p._post_accumulate_grad_hooks for p in params)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(10, 3, sparse=True)
    optimizer = lean(table, weight_decay=0)
    before = snapshot(list(table.parameters()))
    fill([table.weight], [torch.ones(10, 3)])
    optimizer.second_step()
    with pytest.raises(TypeError, match=r"gradient of parameter 0 is torch.sparse_coo, expected"):
        table(torch.arange(4)).sum().backward()
    optimizer.restore()
    assert equal(list(table.parameters()), before)


# ---------------------------------------------------------------- an optimizer like the others


def test_checkpoints_copies_and_pickles():
    (ordinary, expected), (other, params) = optimizers(SETTINGS["decay"])
    passes = [gradients(i) for i in range(3)]
    step_through(other, params, passes)
    step_through(ordinary, expected, passes)
    for made in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert type(made) is LeanImbSAM
        own = [p for group in made.param_groups for p in group["params"]]
        step_through(made, own, passes)
        assert not equal(own, params)
    ordinary.load_state_dict(copy.deepcopy(other.state_dict()))
    other.load_state_dict(copy.deepcopy(ordinary.state_dict()))
    step_through(other, params, passes)
    step_through(ordinary, expected, passes)
    torch.testing.assert_close(params, expected, rtol=1e-13, atol=1e-14)


def test_momentum_in_another_layout():
    model = nn.Conv2d(3, 4, 3).double()
    optimizer = lean(model)
    ordinary = copy.deepcopy(model)
    expected = ImbSAM(
        torch.optim.SGD(ordinary.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY), rho=RHO
    )
    buffer = torch.randn_like(model.weight).to(memory_format=torch.channels_last)
    for own, m in ((optimizer, model), (expected, ordinary)):
        own.state[m.weight]["momentum_buffer"] = buffer.clone()
        for call in (own.first_step, own.second_step, own.third_step):
            m(torch.ones(1, 3, 5, 5, dtype=torch.float64)).square().sum().backward()
            call()
    assert distance(model, ordinary) < 1e-13


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        (lambda p: torch.optim.AdamW(p), TypeError, "base is AdamW, expected torch.optim.SGD"),
        (lambda p: torch.optim.SGD(p, 0.1), ValueError, r"param_groups\[0\]\['momentum'\] is 0"),
        (
            lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True),
            ValueError,
            r"param_groups\[0\]\['nesterov'\] is True, expected False",
        ),
    ],
)
def test_bases_that_it_cannot_update_are_refused(base, error, message):
    with pytest.raises(error, match=message):
        LeanImbSAM(base(parameters()))


def test_groups_that_become_unusable_are_refused_and_change_nothing():
    (_, _), (optimizer, params) = optimizers(SETTINGS["decay"])
    with pytest.raises(ValueError, match=r"param_groups\[2\]\['nesterov'\] is True"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "nesterov": True})
    assert len(optimizer.param_groups) == 2
    optimizer.param_groups[1]["momentum"] = 0
    for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
        fill(params, gradients(0))
        with pytest.raises(ValueError, match=r"param_groups\[1\]\['momentum'\] is 0"):
            call()
        assert equal(params, parameters()) and not optimizer.state


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_norm": 1.0}, "max_norm is 1.0, expected None with a LeanImbSAM"),
        ({"grad_scaler": torch.amp.GradScaler("cpu")}, "grad_scaler is GradScaler, expected None"),
        ({"cuda_graph": True}, "cuda_graph is True, expected False with a LeanImbSAM"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_needs_whole_gradients_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        stepping(network("group"), **settings)


def test_what_needs_whole_gradients_is_refused_in_the_calls_too():
    (_, _), (optimizer, params) = optimizers(SETTINGS["decay"])
    for option in ({"max_norm": 1.0}, {"grad_scaler": torch.amp.GradScaler("cpu")}):
        backward(params, gradients(1))
        optimizer.second_step()
        backward(params, gradients(2))
        with pytest.raises(ValueError, match="expected None with a LeanImbSAM"):
            optimizer.third_step(**option)
        assert equal(params, parameters())
    with pytest.raises(RuntimeError, match="LeanImbSAM holds no gradient"):
        optimizer.merge_held()
    stepping(network("group"), grad_scaler=torch.amp.GradScaler("cpu", enabled=False))


def test_data_parallel_models_are_refused(monkeypatch):
    monkeypatch.setattr("imbsam_fast.training.data_parallel.group_of", lambda models: object())
    with pytest.raises(ValueError, match="model is DistributedDataParallel, expected a model of"):
        stepping(network("group"))

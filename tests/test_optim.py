"""ImbSAM's phases: arithmetic, order, faults, and what a torch optimizer must do."""

from __future__ import annotations

import copy
import io
import os
import pickle
import signal
import warnings

import pytest
import torch
from torch import Tensor, nn

from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, SplitLoss, ops

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(4, 3, 3, 3), (4,), (7, 5), (1,), (33,)]


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype))
        for s in SHAPES
    ]


def gradients(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [p.detach() for p in parameters(dtype, seed + 100)]


def fill(params: list[nn.Parameter], grads: list[Tensor | None]) -> None:
    for p, g in zip(params, grads):
        p.grad = None if g is None else g.clone()


def one_step(optimizer: ImbSAM, params: list[nn.Parameter], step: int = 0) -> None:
    for phase, call in enumerate(
        (optimizer.first_step, optimizer.second_step, optimizer.third_step)
    ):
        fill(params, gradients(3 * step + phase, params[0].dtype))
        call()


def equal(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def snapshot(tensors: list) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def epsilon(grads: list[Tensor | None], rho: float) -> list[Tensor | None]:
    norm = torch.sqrt(sum(g.square().sum() for g in grads if g is not None))
    return [None if g is None else rho * g / norm for g in grads]


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9, "weight_decay": 5e-4},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.0, "weight_decay": 0.1},
        {"momentum": 0.9, "maximize": True, "weight_decay": 0.1},
    ],
    ids=lambda s: "-".join(s),
)
def test_sgd_base_steps_like_torch_sgd_on_the_merged_gradient(settings):
    params, expected = parameters(), parameters()
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1, **settings))
    sgd = torch.optim.SGD(expected, lr=0.1, **settings)
    for step in range(5):
        one_step(optimizer, params, step)
        g_h, g_p = gradients(3 * step), gradients(3 * step + 2)
        fill(expected, [h + p for h, p in zip(g_h, g_p)])
        sgd.step()
    torch.testing.assert_close(params, expected, rtol=1e-13, atol=1e-14)
    if settings["momentum"]:
        buffers = [
            [o.state[p]["momentum_buffer"] for p in own]
            for o, own in ((optimizer, params), (sgd, expected))
        ]
        torch.testing.assert_close(*buffers, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    "base", [torch.optim.AdamW, torch.optim.RMSprop, type("MySGD", (torch.optim.SGD,), {})]
)
def test_any_other_base_runs_its_own_step_on_the_merged_gradient(base):
    params, expected = parameters(), parameters()
    optimizer, plain = ImbSAM(base(params, lr=0.01)), base(expected, lr=0.01)
    for step in range(3):
        one_step(optimizer, params, step)
        fill(expected, [h + p for h, p in zip(gradients(3 * step), gradients(3 * step + 2))])
        plain.step()
    assert equal(params, expected)


def test_second_step_moves_along_the_gradient_by_rho_in_the_global_norm():
    params = parameters()
    before = snapshot(params)
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1), rho=0.3)
    fill(params, gradients(1))
    optimizer.second_step()
    assert optimizer.is_perturbed
    moved = [p - b for p, b in zip(params, before)]
    torch.testing.assert_close(moved, epsilon(gradients(1), 0.3), rtol=1e-12, atol=1e-14)


def test_adaptive_is_asam():
    params = parameters()
    before = snapshot(params)
    fill(params, gradients(1))
    ImbSAM(torch.optim.SGD(params, lr=0.1), rho=0.3, adaptive=True).second_step()
    scaled = epsilon([b * g for b, g in zip(before, gradients(1))], 0.3)
    expected = [b + b * e for b, e in zip(before, scaled)]
    torch.testing.assert_close(snapshot(params), expected, rtol=1e-12, atol=1e-14)


def test_groups_share_one_norm_and_keep_their_own_rho():
    params = parameters()
    before = snapshot(params)
    groups = [{"params": params[:2]}, {"params": params[2:], "rho": 0.5, "lr": 0.3}]
    optimizer = ImbSAM(torch.optim.SGD(groups, lr=0.1), rho=0.05)
    assert [g["rho"] for g in optimizer.param_groups] == [0.05, 0.5]
    fill(params, gradients(1))
    optimizer.second_step()
    unit = epsilon(gradients(1), 1.0)
    expected = [b + (0.05 if i < 2 else 0.5) * u for i, (b, u) in enumerate(zip(before, unit))]
    torch.testing.assert_close(snapshot(params), expected, rtol=1e-12, atol=1e-14)


def test_the_norm_spans_dtypes():
    halves, floats = parameters(torch.bfloat16), parameters(torch.float64, seed=1)
    params = halves + floats
    before = snapshot(floats)
    with pytest.warns(UserWarning, match="bfloat16 parameters round away"):
        optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1), rho=0.3)
    grads = gradients(1, torch.bfloat16) + gradients(2)
    fill(params, grads)
    optimizer.second_step()
    expected = [b + e for b, e in zip(before, epsilon([g.double() for g in grads], 0.3)[5:])]
    torch.testing.assert_close(snapshot(floats), expected, rtol=1e-12, atol=1e-14)


def test_a_gradient_missing_in_one_pass_is_zero():
    params, before = parameters(), parameters()
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1, weight_decay=0.1, momentum=0.9))
    h, t, p = gradients(0), gradients(1), gradients(2)
    # Parameter 0 has g_h alone, 1 has g_p without g_t, 2 g_t without g_p, 3 nothing, 4 only g_t.
    fill(params, [h[0], h[1], h[2], None, None])
    optimizer.first_step()
    fill(params, [None, None, t[2], None, t[4]])
    optimizer.second_step()
    fill(params, [None, p[1], None, None, None])
    optimizer.third_step()
    d = [h[0], h[1] + p[1], h[2]]
    expected = [b - 0.1 * (g + 0.1 * b) for b, g in zip(before, d)] + before[3:]
    torch.testing.assert_close(snapshot(params), snapshot(expected), rtol=1e-13, atol=1e-14)
    assert equal(params[3:], before[3:])
    assert all(("momentum_buffer" in optimizer.state[q]) == (i < 3) for i, q in enumerate(params))


def test_passes_may_be_left_out():
    """Without the head pass this is SAM; without the tail pass a step of the base."""
    params, expected = parameters(), parameters()
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1))
    fill(params, gradients(0))
    optimizer.second_step()
    fill(params, gradients(1))
    optimizer.third_step()
    fill(params, gradients(2))
    optimizer.first_step()
    optimizer.third_step()
    fill(params, gradients(3))
    optimizer.third_step()
    with torch.no_grad():
        for p, *g in zip(expected, gradients(1), gradients(2), gradients(3)):
            for each in g:
                p -= 0.1 * each
    torch.testing.assert_close(params, expected, rtol=1e-13, atol=1e-14)


def test_gradients_in_another_layout_are_copied_to_the_parameters():
    params, expected = parameters(), parameters()
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1, momentum=0.9))
    one_step(ImbSAM(torch.optim.SGD(expected, lr=0.1, momentum=0.9)), expected)
    for phase, call in enumerate(
        (optimizer.first_step, optimizer.second_step, optimizer.third_step)
    ):
        grads = gradients(phase)
        fill(params, grads)
        params[0].grad = grads[0].to(memory_format=torch.channels_last)
        params[2].grad = grads[2].t().contiguous().t()
        call()
    assert equal(params, expected)


def test_the_head_gradient_is_held_without_a_copy():
    params = parameters()
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1))
    fill(params, gradients(0))
    addresses = [p.grad.data_ptr() for p in params]
    optimizer.first_step()
    assert all(p.grad is None for p in params)
    assert [g.data_ptr() for g in optimizer._pending.held] == addresses


# ---------------------------------------------------------------- order and faults


@pytest.mark.filterwarnings("ignore:bfloat16 parameters")
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_restore_is_bit_exact_and_ends_the_step(dtype):
    params = parameters(dtype)
    before = snapshot(params)
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1, momentum=0.9), rho=10.0)
    fill(params, gradients(0, dtype))
    optimizer.first_step()
    fill(params, gradients(1, dtype))
    optimizer.second_step()
    assert not equal(params, before)
    optimizer.restore()
    assert equal(params, before)
    assert not optimizer.is_perturbed and not optimizer.state
    optimizer.restore()
    assert equal(params, before)
    one_step(optimizer, params)


def test_calls_out_of_order_are_refused_and_change_nothing():
    params = parameters()
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1))
    fill(params, gradients(0))
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="first_step was called twice"):
        optimizer.first_step()
    fill(params, gradients(1))
    optimizer.second_step()
    perturbed = snapshot(params)
    fill(params, gradients(2))
    for call, message in (
        (optimizer.first_step, "first_step was called twice"),
        (optimizer.second_step, "second_step was called twice"),
        (optimizer.state_dict, "state_dict in the middle of a step, where the weights are pert"),
        (lambda: optimizer.load_state_dict({}), "load_state_dict in the middle of a step"),
        (lambda: optimizer.add_param_group({"params": []}), "add_param_group in the middle"),
        (lambda: copy.deepcopy(optimizer), "pickling or copying the optimizer in the middle"),
        (lambda: pickle.dumps(optimizer), "pickling or copying the optimizer in the middle"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
        assert equal(params, perturbed)
    optimizer.third_step()

    expected = parameters()
    one_step(ImbSAM(torch.optim.SGD(expected, lr=0.1)), expected)
    assert equal(params, expected)


@pytest.mark.parametrize("bucket", [0, 1])
def test_a_failed_kernel_leaves_the_weights_bit_for_bit(monkeypatch, bucket):
    """Also when other groups were already perturbed, or already updated."""
    params = parameters()
    before = snapshot(params)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = ImbSAM(torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    calls = []
    perturb_ = ops.perturb_

    def failing(*args):
        calls.append(args)
        if len(calls) == bucket + 1:
            raise RuntimeError("injected")
        perturb_(*args)

    monkeypatch.setattr(ops, "perturb_", failing)
    fill(params, gradients(0))
    optimizer.first_step()
    fill(params, gradients(1))
    with pytest.raises(RuntimeError, match="injected"):
        optimizer.second_step()
    assert equal(params, before)
    assert not optimizer.is_perturbed


@pytest.mark.parametrize("operation", ["squared_norm", "perturb_"])
def test_ctrl_c_inside_a_phase_is_raised_when_the_weights_are_safe(monkeypatch, operation):
    params = parameters()
    before = snapshot(params)
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1))
    original = getattr(ops, operation)

    def interrupted(*args):
        result = original(*args)
        os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(ops, operation, interrupted)
    fill(params, gradients(1))
    with pytest.raises(KeyboardInterrupt):
        optimizer.second_step()
    assert equal(params, before)
    assert not optimizer.is_perturbed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sparse_gradients_are_refused():
    params = [nn.Parameter(torch.randn(10, 3)), nn.Parameter(torch.randn(5))]
    before = snapshot(params)
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1))
    params[0].grad = torch.zeros(10, 3).to_sparse()
    with pytest.raises(TypeError, match=r"gradient of parameter 0 is torch.sparse_coo"):
        optimizer.second_step()
    assert equal(params, before)


# ---------------------------------------------------------------- step(closure)


def classifier() -> tuple[nn.Module, SplitCrossEntropy, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    criterion = SplitCrossEntropy(ClassSplit.from_counts([500, 200, 50, 10]))
    return model, criterion, torch.randn(12, 6).double(), torch.arange(12) % 4


def test_step_with_a_closure_is_the_three_calls():
    model, criterion, x, y = classifier()
    expected = copy.deepcopy(model)
    optimizer = ImbSAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    by_hand = ImbSAM(torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9))
    for _ in range(3):
        result = optimizer.step(lambda: criterion(model(x), y))
        loss = criterion(expected(x), y)
        assert isinstance(result, SplitLoss)
        assert torch.equal(result.total, loss.total.detach()) and not result.head.requires_grad
        loss.head.backward(retain_graph=True)
        by_hand.first_step()
        loss.tail.backward()
        by_hand.second_step()
        criterion(expected(x), y).tail.backward()
        by_hand.third_step()
    assert equal(list(model.parameters()), list(expected.parameters()))


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_failed_closure_leaves_the_weights_bit_for_bit(failing_call):
    model, criterion, x, y = classifier()
    before = snapshot(model.parameters())
    optimizer = ImbSAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    calls = 0

    def closure() -> SplitLoss:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise MemoryError("injected")
        return criterion(model(x), y)

    with pytest.raises(MemoryError, match="injected"):
        optimizer.step(closure)
    assert equal(list(model.parameters()), before)
    assert not optimizer.state and not optimizer.is_perturbed


def test_step_without_a_closure_says_what_to_do():
    with pytest.raises(TypeError, match="step needs a closure that returns a SplitLoss"):
        ImbSAM(torch.optim.SGD(parameters(), lr=0.1)).step()


# ---------------------------------------------------------------- a torch optimizer


def test_groups_and_state_are_the_bases():
    params = parameters()
    sgd = torch.optim.SGD(params[:2], lr=0.1, momentum=0.9)
    optimizer = ImbSAM(sgd, rho=0.2)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is sgd.param_groups and optimizer.state is sgd.state
    optimizer.add_param_group({"params": params[2:], "lr": 0.3})
    assert [g["lr"] for g in sgd.param_groups] == [0.1, 0.3]
    assert [g["rho"] for g in sgd.param_groups] == [0.2, 0.2]
    one_step(optimizer, params)
    assert set(sgd.state) == set(params)


@pytest.mark.parametrize("on_base", [False, True])
def test_schedulers_work_on_either_without_a_warning(on_base):
    params = parameters()
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(
            optimizer.base if on_base else optimizer, step_size=1, gamma=0.5
        )
        one_step(optimizer, params)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_lr_may_be_a_tensor():
    params, expected = parameters(), parameters()
    one_step(ImbSAM(torch.optim.SGD(params, lr=torch.tensor(0.1, dtype=torch.float64))), params)
    one_step(ImbSAM(torch.optim.SGD(expected, lr=0.1)), expected)
    assert equal(params, expected)


def test_checkpoints_resume_bit_for_bit_and_interchange_with_sgd():
    params = parameters()
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1, momentum=0.9), rho=0.2)
    one_step(optimizer, params)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, file)
    one_step(optimizer, params, step=1)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(p.detach()) for p in saved["params"]]
    other = ImbSAM(torch.optim.SGD(resumed, lr=0.7, momentum=0.9))
    other.load_state_dict(saved["optimizer"])
    assert other.param_groups[0]["lr"] == 0.1 and other.param_groups[0]["rho"] == 0.2
    one_step(other, resumed, step=1)
    assert equal(resumed, params)

    sgd = torch.optim.SGD(parameters(), lr=0.5, momentum=0.9)
    sgd.load_state_dict(optimizer.state_dict())
    back = ImbSAM(torch.optim.SGD(parameters(), lr=0.5, momentum=0.9), rho=0.3)
    plain = sgd.state_dict()
    del plain["param_groups"][0]["rho"], plain["param_groups"][0]["adaptive"]
    back.load_state_dict(plain)
    assert back.param_groups[0]["rho"] == 0.3
    buffers = [
        [s["momentum_buffer"] for s in o.state_dict()["state"].values()] for o in (optimizer, back)
    ]
    assert equal(*buffers)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_step_alike_and_apart(copied):
    params = parameters()
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1, momentum=0.9), rho=0.2, adaptive=True)
    one_step(optimizer, params)
    twin = copied(optimizer)
    twins = twin.param_groups[0]["params"]
    before = snapshot(params)
    one_step(twin, twins, step=1)
    assert equal(params, before)
    one_step(optimizer, params, step=1)
    assert equal(params, twins)


def test_unusable_arguments_are_named():
    params = parameters()
    sgd = torch.optim.SGD(params, lr=0.1)
    for build, error, message in (
        (lambda: ImbSAM(params), TypeError, "base is list, expected a plain torch optimizer"),
        (lambda: ImbSAM(ImbSAM(sgd)), TypeError, "base is ImbSAM"),
        (lambda: ImbSAM(torch.optim.LBFGS(params)), TypeError, "base is LBFGS"),
        (lambda: ImbSAM(sgd, rho=-1), ValueError, "rho is -1, expected a finite number >= 0"),
        (lambda: ImbSAM(sgd, rho=float("nan")), ValueError, "rho is nan"),
        (lambda: ImbSAM(sgd, nn.Linear(1, 1)), ValueError, "rho is Linear.*takes no model"),
        (
            lambda: ImbSAM(torch.optim.SGD([nn.Parameter(torch.ones(2) * 1j)], lr=0.1)),
            TypeError,
            "parameter 0 is torch.complex64",
        ),
        (
            lambda: ImbSAM(torch.optim.SGD(params, lr=0.1, differentiable=True)),
            ValueError,
            "differentiable=True",
        ),
    ):
        with pytest.raises(error, match=message):
            build()
    optimizer = ImbSAM(torch.optim.SGD(parameters(), lr=0.1))
    with pytest.raises(ValueError, match="rho is 'big'"):
        optimizer.add_param_group({"params": parameters(seed=1), "rho": "big"})
    assert len(optimizer.param_groups) == 1

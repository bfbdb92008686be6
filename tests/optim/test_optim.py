"""ImbSAM's phases: arithmetic, and the step with a closure."""

from __future__ import annotations

import copy

import pytest
import torch
from phases import classifier, epsilon, equal, fill, gradients, one_step, parameters, snapshot

from imbsam_fast import ImbSAM, SplitLoss

pytestmark = pytest.mark.usefixtures("one_thread")


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
    "base", [torch.optim.NAdam, torch.optim.Adagrad, type("MySGD", (torch.optim.SGD,), {})]
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


def test_maximize_perturbs_towards_the_worst_loss_too():
    climbing, descending = parameters(), parameters()
    pairs = ((climbing, 1), (descending, -1))
    for params, sign in pairs:
        base = torch.optim.SGD(params, lr=0.1, momentum=0.9, maximize=sign > 0)
        optimizer = ImbSAM(base, rho=0.5)
        for phase, call in enumerate((optimizer.second_step, optimizer.third_step)):
            fill(params, [sign * g for g in gradients(phase)])
            call()
            moved = [p - start for p, start in zip(params, parameters())]
            assert max(float(d.detach().abs().max()) for d in moved) > 0.01
    for a, b in zip(*(params for params, _ in pairs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rho", [0.0, 5.0])
def test_autocast_forgets_casts_of_weights_that_moved(rho):
    """It keeps them until its outermost block ends, and does not see writes in place."""
    ends = []
    for outer in (True, False):
        model, criterion, x, y = classifier()
        optimizer = ImbSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho)

        def closure(model=model, criterion=criterion, x=x, y=y):
            with torch.autocast("cpu", torch.bfloat16):
                return criterion(model(x), y)

        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            optimizer.step(closure)
            optimizer.step(closure)
        ends.append(snapshot(list(model.parameters())))
    assert equal(*ends)


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


# ---------------------------------------------------------------- step(closure)


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

"""ImbSAM's phases out of order, failing and interrupted: the weights stay what they were."""

from __future__ import annotations

import copy
import os
import pickle
import signal

import pytest
import torch
from phases import equal, fill, gradients, one_step, parameters, snapshot
from torch import Tensor, nn

from imbsam_fast import ImbSAM, ops
from imbsam_fast.ops import reference
from imbsam_fast.ops.arguments import DTYPES
from imbsam_fast.optim import interrupts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.filterwarnings("ignore:bfloat16 parameters")
@pytest.mark.parametrize("dtype", DTYPES)
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
def test_a_failed_kernel_leaves_the_weights_bit_for_bit(by_launches, monkeypatch, bucket):
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
def test_ctrl_c_inside_a_phase_is_raised_when_the_weights_are_safe(
    by_launches, monkeypatch, operation
):
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


def test_second_step_needs_a_gradient():
    params = parameters()
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1))
    with pytest.raises(RuntimeError, match="second_step found no gradient"):
        optimizer.second_step()
    assert not optimizer.is_perturbed


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_other_signal_handlers_wait_for_a_safe_moment_too(by_launches, monkeypatch, name):
    params = parameters()
    before = snapshot(params)
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1))
    number = getattr(signal, name)
    perturb_ = ops.perturb_

    def interrupted(*args):
        perturb_(*args)
        os.kill(os.getpid(), number)

    def handler(signum, frame):
        raise TimeoutError(signum)

    monkeypatch.setattr(ops, "perturb_", interrupted)
    previous = signal.signal(number, handler)
    try:
        fill(params, gradients(0))
        with pytest.raises(TimeoutError, match=str(int(number))):
            optimizer.second_step()
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, previous)
    assert equal(params, before)
    assert not optimizer.is_perturbed


def test_ctrl_c_while_handlers_are_put_back_still_puts_back_all(monkeypatch):
    """Else SIGTERM would be collected for ever, and nothing could end the program."""

    def interrupted(number, handler):
        set_(number, handler)
        if handler is signal.default_int_handler:
            signal.raise_signal(signal.SIGINT)

    def handler(signum, frame):
        raise TimeoutError(signum)

    previous = signal.signal(signal.SIGTERM, handler)
    set_ = interrupts._signal.signal
    try:
        with pytest.raises(KeyboardInterrupt), interrupts.uninterrupted():
            monkeypatch.setattr(interrupts._signal, "signal", interrupted)
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        monkeypatch.undo()
        signal.signal(signal.SIGTERM, previous)


def test_a_group_that_is_refused_keeps_the_others_from_being_updated():
    params = parameters()
    before = snapshot(params)
    bad = {"params": params[2:], "lr": torch.tensor([0.1, 0.1], dtype=torch.float64)}
    base = torch.optim.SGD([{"params": params[:2]}, bad], lr=0.1, momentum=0.9, foreach=False)
    fill(params, gradients(0))
    with pytest.raises(ValueError, match=r"lr has shape \(2,\), expected one element"):
        ImbSAM(base).third_step()
    assert equal(params, before)
    assert not any(base.state.values())


def test_a_failed_first_step_is_not_the_first_step(by_launches, monkeypatch):
    """The first one takes its gradient undampened; so must the one after a failure."""
    ends = []
    for fails in (True, False):
        params = parameters()
        optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5))
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(ops, "sgd_update_", lambda *args: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    one_step(optimizer, params)
        for step in range(2):
            one_step(optimizer, params, step)
        ends.append(params)
    assert equal(*ends)


@pytest.mark.parametrize("operation", ["perturb_", "sgd_update_", "merge_"])
def test_the_reference_computes_before_it_writes(monkeypatch, operation):
    """It allocates as it computes: out of memory must not leave half of the lists written."""
    lists = [gradients(i) for i in range(5)]
    before = [snapshot(tensors) for tensors in lists]
    theta, saved, g_h, g_p, m = lists
    to, conversions = Tensor.to, []

    def failing(tensor, *args, **kwargs):
        conversions.append(tensor)
        if tensor is g_p[-1]:
            raise torch.OutOfMemoryError("injected")
        return to(tensor, *args, **kwargs)

    arguments = {
        "perturb_": (theta, g_p, torch.ones(1, dtype=torch.float64), 0.05),
        "sgd_update_": (
            theta, saved, g_h, g_p, m, torch.tensor(0.1), 0.9, 0.0, 0.0, False, False,
        ),
        "merge_": (theta, saved, g_h, g_p),
    }[operation]  # fmt: skip
    monkeypatch.setattr(Tensor, "to", failing)
    with pytest.raises(torch.OutOfMemoryError):
        getattr(reference, operation)(*arguments)
    monkeypatch.undo()
    assert conversions
    for tensors, original in zip(lists, before):
        assert equal(tensors, original)

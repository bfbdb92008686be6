"""A phase as one call of the compiled module: the same bits as launch by launch, whatever changes.

Nothing may be kept that a change between two steps, or two phases, makes wrong.
"""

from __future__ import annotations

import copy
import pickle
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from phases import equal, gradients
from torch import Tensor, nn
from two_groups import (
    BASES,
    everything,
    launch_by_launch,
    needs_single_calls,
    new,
    params_of,
    phase,
    steps,
)

from imbsam_fast import ImbSAM
from imbsam_fast.ops import native
from imbsam_fast.optim import one_call

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_single_calls]

# ---------------------------------------------------------------- what may change between steps


def _moved(optimizer: ImbSAM) -> None:
    for p in params_of(optimizer)[1:3]:
        p.data = p.data.clone()


def _other_layout(optimizer: ImbSAM) -> None:
    p = params_of(optimizer)[0]
    p.data = p.data.to(memory_format=torch.channels_last)


def _other_dtype(optimizer: ImbSAM) -> None:
    for p in params_of(optimizer):
        p.data = p.data.double()
    optimizer.state.clear()


def _other_parameter(optimizer: ImbSAM) -> None:
    group = optimizer.param_groups[0]
    group["params"][1] = nn.Parameter(group["params"][1].detach() + 1)


def _state_moved(optimizer: ImbSAM) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            if value is not None:
                state[name] = value.clone()


def _state_in_place(optimizer: ImbSAM) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            if value is not None and value.dim():
                value.data = value.data * 2


def _loaded(optimizer: ImbSAM) -> None:
    other = copy.deepcopy(optimizer)
    steps(other, 50)
    optimizer.load_state_dict(other.state_dict())


def _group_added(optimizer: ImbSAM) -> None:
    added = nn.Parameter(gradients(77, params_of(optimizer)[0].dtype)[0] * 0.1)
    optimizer.add_param_group({"params": [added], "lr": 0.03})


def _settings(**values: object) -> Callable[[ImbSAM], None]:
    return lambda optimizer: optimizer.param_groups[0].update(values)


def _frozen(optimizer: ImbSAM) -> None:
    params_of(optimizer)[1].requires_grad_(False)


CHANGES: dict[str, Callable[[ImbSAM], None]] = {
    "nothing": lambda optimizer: None,
    "weights moved": _moved,
    "another layout": _other_layout,
    "another dtype": _other_dtype,
    "another parameter": _other_parameter,
    "state moved": _state_moved,
    "memory of the state moved": _state_in_place,
    "state cleared": lambda optimizer: optimizer.state.clear(),
    "state loaded": _loaded,
    "a group added": _group_added,
    "lr": _settings(lr=0.02),
    "lr a tensor": _settings(lr=torch.tensor(0.02)),
    "maximize": _settings(maximize=True),
    "weight decay": _settings(weight_decay=0.3),
    "rho": _settings(rho=0.7),
    "rho 0": _settings(rho=0.0),
    "adaptive": _settings(adaptive=True),
    "not perturbed": _settings(perturb=False),
    "frozen": _frozen,
}


def _fresh(optimizer: ImbSAM) -> ImbSAM:
    """Another one with the same weights, settings and state, in other memory."""
    groups = [
        {**g, "params": [nn.Parameter(p.detach().clone(), p.requires_grad) for p in g["params"]]}
        for g in optimizer.param_groups
    ]
    base = type(optimizer.base)(groups, lr=0.1)
    fresh = ImbSAM(base, rho=0.1)
    for p, q in zip(params_of(optimizer), params_of(fresh)):
        for name, value in optimizer.state.get(p, {}).items():
            base.state[q][name] = value if value is None else value.clone()
    return fresh


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("base", BASES)
def test_a_change_between_steps_counts_at_once(base, change, monkeypatch):
    """The bits of an optimizer made after the change, and of one that launches by buckets."""
    optimizer = new(base)
    steps(optimizer, 0)
    change(optimizer)
    fresh, slow = _fresh(optimizer), _fresh(optimizer)
    steps(optimizer, 10)
    steps(fresh, 10)
    assert equal(everything(optimizer), everything(fresh))
    launch_by_launch(monkeypatch)
    steps(slow, 10)
    assert equal(everything(optimizer), everything(slow))


@pytest.mark.parametrize("base", BASES)
def test_phases_are_single_calls_once_there_is_state(base, single_calls):
    optimizer = new(base)
    steps(optimizer, 0, 1)
    assert single_calls == [True, base == "plain SGD"]  # without momentum there is no state
    single_calls.clear()
    steps(optimizer, 1)
    assert single_calls == [True] * 4


def test_the_settings_of_sgd_momentum(monkeypatch):
    def momentum(optimizer: ImbSAM) -> None:
        optimizer.param_groups[0].update(momentum=0.5, nesterov=True)
        optimizer.param_groups[1].update(momentum=0, dampening=0.5)

    test_a_change_between_steps_counts_at_once("SGD", momentum, monkeypatch)


@pytest.mark.parametrize("without", range(3), ids=["g_h", "g_t", "g_p"])
def test_a_parameter_without_a_gradient_in_one_pass(without, monkeypatch):
    def run() -> list[Tensor]:
        optimizer = new()
        steps(optimizer, 0, 1)
        for number in range(3):
            phase(optimizer, number, 1, without=2 if number == without else None)
        steps(optimizer, 2)
        return everything(optimizer)

    found = run()
    launch_by_launch(monkeypatch)
    assert equal(found, run())


@pytest.mark.parametrize("number", range(3), ids=["g_h", "g_t", "g_p"])
def test_gradients_in_another_layout(number, monkeypatch):
    def run() -> list[Tensor]:
        optimizer = new()
        steps(optimizer, 0, 1)
        for n in range(3):
            p = params_of(optimizer)[0]
            if n == number:
                for q, g in zip(params_of(optimizer), gradients(n, torch.float32)):
                    q.grad = g.clone()
                p.grad = p.grad.to(memory_format=torch.channels_last)
                (optimizer.first_step, optimizer.second_step, optimizer.third_step)[n]()
            else:
                phase(optimizer, n, 1)
        steps(optimizer, 2)
        return everything(optimizer)

    found = run()
    launch_by_launch(monkeypatch)
    assert equal(found, run())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_by_itself(copied):
    optimizer = new()
    steps(optimizer, 0)
    other = copied(optimizer)
    before = everything(optimizer)
    steps(other, 10)
    assert equal(before, everything(optimizer))
    steps(optimizer, 10)
    assert equal(everything(other), everything(optimizer))


def test_optimizers_in_turn():
    """Of one size: what the module remembers is memory's order alone."""
    together, apart = [new() for _ in range(3)], [new() for _ in range(3)]
    for i, optimizer in enumerate(apart):
        steps(optimizer, i)
    for step in range(2):
        for number in range(3):
            for i, optimizer in enumerate(together):
                phase(optimizer, number, i + step)
    assert all(equal(everything(a), everything(b)) for a, b in zip(together, apart))


# ---------------------------------------------------------------- what must be refused or restored


def test_gradients_in_the_memory_of_weights_are_refused():
    optimizer = new()
    steps(optimizer, 0)
    p, q = params_of(optimizer)[:2]
    inside_p = p.detach().view(-1)[:4]
    before = everything(optimizer)
    phase(optimizer, 0, 5)
    phase(optimizer, 1, 5)
    for r, g in zip(params_of(optimizer), gradients(0)):
        r.grad = g.float()
    q.grad = inside_p
    with pytest.raises(ValueError, match="overlap in memory"):
        optimizer.third_step()
    assert equal(before, everything(optimizer)) and not optimizer.is_perturbed


def test_weights_that_came_to_share_memory_are_refused():
    optimizer = new()
    steps(optimizer, 0)
    params = params_of(optimizer)
    whole = torch.randn(36 * 3 + 2)
    params[0].data, params[1].data = whole[:108].view(4, 3, 3, 3), whole[106:110]
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"theta\[0\] and theta\[1\] overlap in memory"):
        phase(optimizer, 1, 5)
    assert equal(before, everything(optimizer))


def test_a_failure_after_the_perturbation_restores():
    optimizer = new()
    steps(optimizer, 0)
    before = everything(optimizer)
    phase(optimizer, 0, 5)
    phase(optimizer, 1, 5)
    assert optimizer.is_perturbed and not equal(before, everything(optimizer))
    optimizer.restore()
    assert equal(before, everything(optimizer))


def test_a_launch_that_fails_after_another_was_perturbed(monkeypatch):
    """Here for want of the second group's rho, once the first group is written."""
    optimizer = new()
    steps(optimizer, 0)
    before = everything(optimizer)
    perturb_all = native.perturb_all

    def with_one_rho(*arguments: Any) -> bool:
        *lists, rho, adaptive, pending = arguments
        return perturb_all(*lists, rho[:1], adaptive, pending)

    monkeypatch.setattr(native, "perturb_all", with_one_rho)
    with pytest.raises(IndexError):
        phase(optimizer, 1, 5)
    assert equal(before, everything(optimizer)) and not optimizer.is_perturbed
    monkeypatch.undo()
    steps(optimizer, 10)


@pytest.mark.parametrize("name", ["perturb", "update"])
def test_ctrl_c_right_after_a_call(name, monkeypatch):
    """Perturbed weights are restored; an update that is done stays, with its state."""
    optimizer = new()
    steps(optimizer, 0)
    before = everything(optimizer)
    whole = copy.deepcopy(optimizer)
    steps(whole, 10, 1)
    call = getattr(one_call, name)

    def interrupted(*arguments: Any) -> Any:
        done = call(*arguments)
        assert done
        signal.raise_signal(signal.SIGINT)
        return done

    monkeypatch.setattr(one_call, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps(optimizer, 10, 1)
    expected = before if name == "perturb" else everything(whole)
    assert equal(expected, everything(optimizer)) and not optimizer.is_perturbed
    monkeypatch.undo()
    steps(optimizer, 20)


def test_versions_count_every_write():
    """A graph of the pass before must not be used after either write."""
    optimizer = new()
    steps(optimizer, 0)
    p = params_of(optimizer)[0]
    m = optimizer.state[p]["momentum_buffer"]
    versions = [(p._version, m._version)]
    for number in range(3):
        phase(optimizer, number, 5)
        versions.append((p._version, m._version))
    of_p, of_m = zip(*versions)
    assert of_p[0] == of_p[1] < of_p[2] < of_p[3]
    assert of_m[0] == of_m[2] < of_m[3]

"""What torch tests of its optimizers, over the same list of them, asked of ImbSAM around each.

Where ImbSAM differs, and why, is the table in docs/torch_contract.md.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import sys
import unittest
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from phases import equal, fill, gradients, snapshot
from torch import nn

from imbsam_fast import ImbSAM

if importlib.util.find_spec("expecttest") is None:  # torch's list imports it, for its own tests
    sys.modules["expecttest"] = ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase  # type: ignore[attr-defined]

from torch.testing._internal.common_optimizers import optim_db

pytestmark = pytest.mark.usefixtures("one_thread")

# Their step() needs a closure, or gradients that are sparse, or they have a rho of their own.
REFUSED = ("LBFGS", "SparseAdam", "Adadelta")
INFOS = [info for info in optim_db if info.optim_cls.__name__ not in REFUSED]


def settings_of(info: Any) -> list[dict[str, Any]]:
    """torch's own settings of this optimizer, but for what is refused by name."""
    inputs = info.optim_inputs_func(device="cpu")
    return [i.kwargs for i in inputs if not i.kwargs.get("differentiable")]


CASES = [
    pytest.param(info.optim_cls, settings, id=f"{info.optim_cls.__name__}-{i}")
    for info in INFOS
    for i, settings in enumerate(settings_of(info))
]
each_case = pytest.mark.parametrize(("optim", "settings"), CASES)
each_optimizer = pytest.mark.parametrize(
    ("optim", "settings"),
    [
        pytest.param(info.optim_cls, settings_of(info)[0], id=info.optim_cls.__name__)
        for info in INFOS
    ],
)


def weights(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(3, n, generator=generator).double()) for n in (4, 5)]


def pair(optim: type, settings: dict[str, Any]) -> tuple[list[nn.Parameter], Any, list, Any]:
    """ImbSAM around the optimizer, and the optimizer alone, on equal weights."""
    ours, alone = weights(), weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of settings of its own list
        base, plain = (optim(p, **copy.deepcopy(settings)) for p in (ours, alone))
    return ours, ImbSAM(base), alone, plain


def step_both(ours: list, optimizer: ImbSAM, alone: list, plain: Any, seed: int) -> None:
    grads = [p.detach() for p in weights(seed + 50)]
    fill(ours, grads)
    fill(alone, grads)
    optimizer.third_step()
    plain.step()


def assert_close(ours: list, alone: list) -> None:
    torch.testing.assert_close(ours, alone, rtol=1e-11, atol=1e-12)


@each_case
def test_a_step_without_the_other_passes_is_the_bases(optim, settings):
    both = pair(optim, settings)
    for seed in range(3):
        step_both(*both, seed)
    assert_close(both[0], both[2])
    assert not equal(both[0], weights())


@each_case
def test_without_any_gradient_nothing_happens_and_hooks_run(optim, settings):
    params, optimizer, _, _ = pair(optim, settings)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    ran = []
    optimizer.register_step_pre_hook(lambda *_: ran.append("pre"))
    optimizer.register_step_post_hook(lambda *_: ran.append("post"))
    optimizer.third_step()
    assert ran == ["pre", "post"] and equal(params, weights())
    assert str(optimizer.state_dict()["state"]) == str(state)


@each_optimizer
def test_zero_gradients_do_what_they_do_in_torch(optim, settings):
    both = pair(optim, settings)
    step_both(*both, 0)
    for params in (both[0], both[2]):
        fill(params, [torch.zeros_like(p) for p in params])
    both[1].third_step()
    both[3].step()
    assert_close(both[0], both[2])


@each_optimizer
def test_a_checkpoint_goes_on_where_it_was_also_in_the_base_alone(optim, settings):
    both = pair(optim, settings)
    step_both(*both, 0)
    file = io.BytesIO()
    torch.save(both[1].state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    _, other, _, alone = pair(optim, settings)
    for loads in (other, alone):
        for q, p in zip(loads.param_groups[0]["params"], both[0]):
            q.data.copy_(p)
        loads.load_state_dict(copy.deepcopy(saved))
    others, alones = (o.param_groups[0]["params"] for o in (other, alone))
    step_both(others, other, alones, alone, 1)
    fill(both[0], [p.detach() for p in weights(51)])
    both[1].third_step()
    # torch loads float32 state, as NAdam's products, in the dtype of the parameter.
    torch.testing.assert_close(others, both[0], rtol=1e-7, atol=1e-8)
    assert_close(alones, others)


@each_optimizer
def test_copies_and_text(optim, settings):
    params, optimizer, _, _ = pair(optim, settings)
    twin = copy.deepcopy(optimizer)
    assert "ImbSAM" in repr(optimizer) and "rho: 0.05" in repr(optimizer)
    fill(params, [p.detach() for p in weights(50)])
    optimizer.third_step()
    assert equal(twin.param_groups[0]["params"], weights()) and not equal(params, weights())


@each_optimizer
def test_a_learning_rate_that_is_changed_or_scheduled(optim, settings):
    ours, optimizer, alone, plain = pair(optim, settings)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (optimizer, plain)]
    for seed in range(2):
        step_both(ours, optimizer, alone, plain, seed)
        for schedule in schedules:
            schedule.step()
    assert_close(ours, alone)
    assert float(optimizer.param_groups[0]["lr"]) == float(plain.param_groups[0]["lr"])


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
def test_parameters_without_a_gradient_may_be_of_any_kind(kind):
    params = weights()
    frozen = nn.Parameter(torch.ones(4, dtype=kind)[::2], requires_grad=False)
    optimizer = ImbSAM(torch.optim.SGD([frozen, *params], lr=0.1, momentum=0.9))
    for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
        fill(params, [p.detach() for p in weights(50)])
        call()
    assert frozen.tolist() == [1, 1] and not equal(params, weights())


def test_the_gradient_is_gone_after_every_call():
    params = weights()
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1))
    for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
        fill(params, [p.detach() for p in weights(50)])
        call()
        assert all(p.grad is None for p in params)


def test_a_base_with_a_rho_of_its_own_is_refused():
    """Its groups have one 'rho', which would be taken for the radius."""
    with pytest.raises(ValueError, match="base is Adadelta, which has a setting 'rho' of its own"):
        ImbSAM(torch.optim.Adadelta(weights()))


def test_a_parameter_twice_strided_or_complex_is_refused_by_name():
    p = weights()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns, and updates it twice
        twice = torch.optim.SGD([p, p], lr=0.1)
    for base, error, message in (
        (twice, ValueError, "parameter 1 is parameter 0 again"),
        (torch.optim.SGD([nn.Parameter(torch.ones(4, 6)[:, ::2])], lr=0.1), ValueError, "dense"),
        (
            torch.optim.SGD([nn.Parameter(torch.ones(2, dtype=torch.complex64))], lr=0.1),
            TypeError,
            "complex64",
        ),
    ):
        with pytest.raises(error, match=message):
            ImbSAM(base)


@pytest.mark.parametrize("device", ["meta"])
def test_no_tensor_is_made_on_the_default_device(device):
    params, expected = weights(), weights()
    optimizers = [ImbSAM(torch.optim.SGD(p, lr=0.1, momentum=0.9)) for p in (params, expected)]
    for i, (list_, optimizer) in enumerate(zip((params, expected), optimizers)):
        torch.set_default_device(device if i == 0 else "cpu")
        try:
            for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
                fill(list_, [p.detach() for p in weights_on_cpu()])
                call(*((None, 1.0) if call == optimizer.third_step else ()))
        finally:
            torch.set_default_device(None)
    assert equal(params, expected)


def weights_on_cpu() -> list[nn.Parameter]:
    with torch.device("cpu"):
        return weights(50)


@pytest.mark.parametrize("optim", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_subclass_that_runs_operators_once_for_each_tensor_inside(optim):
    """It must not count two steps for one."""
    from torch.testing._internal.two_tensor import TwoTensor

    ends = []
    for wrap in (True, False):
        start, moves = parameters_and_gradients()
        p = nn.Parameter(TwoTensor(start, start.clone()) if wrap else start)
        optimizer = ImbSAM(optim([p], lr=0.1))
        for g in moves:
            p.grad = TwoTensor(g, g.clone()) if wrap else g.clone()
            optimizer.third_step()
        ends.append(p.detach().a if wrap else p.detach())
    torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-12)


def parameters_and_gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
    return snapshot(weights())[0], [snapshot(weights(s))[0] for s in (60, 61, 62)]


def test_state_is_made_for_distributed_checkpoints_and_for_nothing_else():
    """torch.distributed.checkpoint steps at learning rate 0 with gradients of 0."""
    params = weights()
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.0, momentum=0.9))
    for grads in (gradients(0)[:0], [p.detach() for p in weights(50)]):
        fill(params, grads)
        with pytest.raises(TypeError, match="step needs a closure"):
            optimizer.step()
        assert not optimizer.state
    fill(params, [torch.zeros_like(p) for p in params])
    assert optimizer.step(closure=None) is None
    assert [set(optimizer.state[p]) for p in params] == [{"momentum_buffer"}] * 2

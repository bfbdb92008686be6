"""What a torch optimizer must do: groups, state, schedulers, checkpoints, copies."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from fractions import Fraction

import numpy
import pytest
import torch
from phases import equal, one_step, parameters, snapshot
from torch import nn

from imbsam_fast import ImbSAM

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_groups_and_state_may_be_replaced():
    """As Accelerate does through its own optimizer."""
    params, others = parameters(), parameters(seed=1)
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1, momentum=0.9), rho=0.2)
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": others}]
    optimizer.state = type(optimizer.state)(dict)
    one_step(optimizer, others)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert set(optimizer.base.state) == set(others)
    assert equal(params, parameters()) and not equal(others, parameters(seed=1))


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
            r"param_groups\[0\]\['differentiable'\] is True",
        ),
    ):
        with pytest.raises(error, match=message):
            build()
    optimizer = ImbSAM(torch.optim.SGD(parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"param_group\['rho'\] is 'big'"):
        optimizer.add_param_group({"params": parameters(seed=1), "rho": "big"})
    assert len(optimizer.param_groups) == 1


def test_a_parameter_group_may_be_a_generator_and_is_refused_whole():
    params = parameters()
    optimizer = ImbSAM(torch.optim.SGD(params[:2], lr=0.1))
    optimizer.add_param_group({"params": (p for p in params[2:]), "rho": 0.2})
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 3]
    assert [group["rho"] for group in optimizer.param_groups] == [0.05, 0.2]
    gaps = nn.Parameter(torch.ones(4, 6)[:, ::2])
    for bad, error in (
        ([gaps], "expected a dense layout"),
        ([nn.Parameter(torch.ones(3, dtype=torch.complex64))], "complex64"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            optimizer.add_param_group({"params": bad})
        assert len(optimizer.param_groups) == 2
    with pytest.raises(ValueError, match="expected a dense layout"):
        ImbSAM(torch.optim.SGD([gaps], lr=0.1))


@pytest.mark.parametrize("change", ["add_param_group", "load_state_dict"])
def test_the_base_may_change_its_groups(change):
    params = parameters()
    sgd = torch.optim.SGD(params[:2], lr=0.1, momentum=0.9)
    plain = torch.optim.SGD(parameters()[:2], lr=0.2, momentum=0.9).state_dict()
    optimizer = ImbSAM(sgd, rho=0.3)
    if change == "add_param_group":
        sgd.add_param_group({"params": params[2:]})
    else:
        sgd.load_state_dict(plain)
    one_step(optimizer, params)
    assert all(group["rho"] == 0.3 for group in sgd.param_groups)


@pytest.mark.parametrize("through", ["wrapper", "base"])
def test_a_checkpoint_of_the_base_leaves_rho_alone(through):
    params = parameters()
    groups = [{"params": params[:2], "rho": 0.2}, {"params": params[2:], "adaptive": True}]
    optimizer = ImbSAM(torch.optim.SGD(groups, lr=0.1, momentum=0.9))
    groups = [{"params": p} for p in (parameters()[:2], parameters()[2:])]
    loads = optimizer if through == "wrapper" else optimizer.base
    loads.load_state_dict(torch.optim.SGD(groups, lr=0.7).state_dict())
    assert [group["rho"] for group in optimizer.param_groups] == [0.2, 0.05]
    assert [group["adaptive"] for group in optimizer.param_groups] == [False, True]
    assert optimizer.param_groups[0]["lr"] == 0.7


@pytest.mark.parametrize(
    "schedule", [torch.optim.lr_scheduler.OneCycleLR, torch.optim.lr_scheduler.CyclicLR]
)
def test_schedulers_that_cycle_the_momentum(schedule):
    params = parameters()
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1, momentum=0.9))
    settings = {"OneCycleLR": {"max_lr": 1.0, "total_steps": 9}}.get(
        schedule.__name__, {"base_lr": 0.1, "max_lr": 1.0}
    )
    scheduler = schedule(optimizer, **settings)
    before = optimizer.param_groups[0]["momentum"]
    for step in range(3):
        one_step(optimizer, params, step)
        scheduler.step()
    assert optimizer.base.param_groups[0]["momentum"] != before


def test_a_momentum_buffer_of_another_shape_is_refused():
    params = parameters()
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1, momentum=0.9))
    one_step(optimizer, params)
    optimizer.state[params[2]]["momentum_buffer"] = torch.ones(5, dtype=torch.float64)
    before = snapshot(params)
    with pytest.raises(ValueError, match=r"m\[2\] is .* \(5,\)"):
        one_step(optimizer, params)
    assert equal(params, before)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("rho", -1.0, "a finite number >= 0"), ("rho", True, "a finite number >= 0"),
     ("rho", float("inf"), "a finite number >= 0"), ("adaptive", 1, "True or False")],
)  # fmt: skip
def test_a_setting_that_became_unusable_is_refused_at_the_next_step(name, value, message):
    params = parameters()
    optimizer = ImbSAM(torch.optim.SGD(params, lr=0.1))
    before = snapshot(params)
    optimizer.param_groups[0][name] = value
    with pytest.raises(
        ValueError, match=rf"param_groups\[0\]\['{name}'\] is .*, expected {message}"
    ):
        one_step(optimizer, params)
    assert equal(params, before) and not optimizer.is_perturbed


def test_rho_may_be_any_real_number():
    ends = []
    for rho in (0.5, numpy.float32(0.5), Fraction(1, 2)):
        params = parameters()
        one_step(ImbSAM(torch.optim.SGD(params, lr=0.1), rho=rho), params)
        ends.append(params)
    assert equal(ends[0], ends[1]) and equal(ends[0], ends[2])

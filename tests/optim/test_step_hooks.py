"""Hooks that torch offers on optimizers: on the wrapper and on its base, fused or not."""

from __future__ import annotations

import pytest
import torch
from phases import classifier, equal, fill, gradients, one_step, parameters, snapshot
from torch.optim import SGD, Adagrad, AdamW
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from imbsam_fast import ImbSAM
from imbsam_fast.optim.lean import LeanImbSAM

pytestmark = pytest.mark.usefixtures("one_thread")

each_base = pytest.mark.parametrize("base", [SGD, AdamW, Adagrad])


@each_base
@pytest.mark.parametrize("form", ["three calls", "closure"])
def test_hooks_of_the_wrapper_run_once_a_step(base, form):
    model, criterion, x, y = classifier()
    params = list(model.parameters())
    optimizer = ImbSAM(base(params, lr=0.01))
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o, kwargs)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", o, kwargs)))
    for _ in range(2):
        seen.clear()
        if form == "closure":
            optimizer.step(lambda: criterion(model(x), y))
        else:
            for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
                fill(params, [torch.ones_like(p) for p in params])
                call()
        arguments = {"grad_scaler": None, "max_norm": None}
        assert seen == [("pre", optimizer, arguments), ("post", optimizer, arguments)]


def test_a_pre_hook_may_replace_the_arguments():
    ends = []
    for hooked in (True, False):
        params = parameters()
        optimizer = ImbSAM(SGD(params, lr=0.1))
        fill(params, gradients(0))
        if hooked:
            optimizer.register_step_pre_hook(
                lambda o, args, kwargs: (args, {**kwargs, "max_norm": 0.5})
            )
            optimizer.third_step()
        else:
            optimizer.third_step(max_norm=0.5)
        ends.append(params)
    assert equal(*ends) and not equal(ends[0], parameters())


def test_a_hook_that_fails_leaves_the_unperturbed_weights():
    params = parameters()
    optimizer = ImbSAM(SGD(params, lr=0.1))
    before = snapshot(params)
    optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        one_step(optimizer, params)
    assert equal(params, before) and not optimizer.is_perturbed


@each_base
def test_hooks_of_the_base_find_what_torch_gives_them(base):
    """The unperturbed weights, the merged gradient in p.grad, once a step; it may be changed."""
    params, expected = parameters(), parameters()
    optimizer, plain = ImbSAM(base(params, lr=0.01)), base(expected, lr=0.01)
    found = []

    def halve(o, args, kwargs):
        found.append(snapshot([*o.param_groups[0]["params"]]))
        found.append(snapshot([p.grad for p in o.param_groups[0]["params"]]))
        for p in o.param_groups[0]["params"]:
            p.grad.mul_(0.5)

    posts = []
    optimizer.base.register_step_pre_hook(halve)
    optimizer.base.register_step_post_hook(lambda *_: posts.append(1))
    for step in range(2):
        found.clear()
        before = snapshot(params)
        one_step(optimizer, params, step)
        merged = [h + p for h, p in zip(gradients(3 * step), gradients(3 * step + 2))]
        assert equal(found[0], before) and equal(found[1], merged) and len(found) == 2
        fill(expected, [g / 2 for g in merged])
        plain.step()
    assert posts == [1, 1] and equal(params, expected)


def test_the_lean_mode_runs_its_own_hooks_and_refuses_those_of_the_base():
    params = parameters()
    base = SGD(params, lr=0.1, momentum=0.9)
    optimizer = LeanImbSAM(base)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    fill(params, gradients(0))
    optimizer.first_step()
    optimizer.third_step()
    assert seen == ["pre", "post"]
    base.register_step_pre_hook(lambda *_: None)
    before = snapshot(params)
    fill(params, gradients(0))
    with pytest.raises(ValueError, match=r"base has step hooks.*, expected none"):
        optimizer.first_step()
    assert equal(params, before)


def test_hooks_of_all_optimizers_run_once_for_the_wrapper():
    from torch.optim.optimizer import register_optimizer_step_post_hook

    params = parameters()
    optimizer = ImbSAM(AdamW(params, lr=0.01))
    seen = []
    handle = register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append(o))
    try:
        one_step(optimizer, params)
    finally:
        handle.remove()
    assert seen == [optimizer]


def test_hooks_of_state_dicts():
    params = parameters()
    optimizer = ImbSAM(AdamW(params, lr=0.01), rho=0.2)
    one_step(optimizer, params)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, state: {"wrapped": state})
    saved = optimizer.state_dict()
    assert calls == ["save"] and set(saved) == {"wrapped"}

    other = ImbSAM(AdamW(parameters(), lr=0.5))
    other.register_load_state_dict_pre_hook(lambda o, state: state["wrapped"])
    other.register_load_state_dict_post_hook(lambda o: calls.append(o.param_groups[0]["lr"]))
    other.load_state_dict(saved)
    assert calls == ["save", 0.01] and other.param_groups[0]["rho"] == 0.2
    own = [s["exp_avg"] for s in other.state.values()]
    assert equal(own, [s["exp_avg"] for s in optimizer.state.values()])


@each_base
def test_global_hooks_run_once_a_step(base):
    """Around the step of the ImbSAM, whether its base takes a step of its own or not."""
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: seen.append(("pre", o))),
        register_optimizer_step_post_hook(lambda o, *_: seen.append(("post", o))),
    ]
    params = parameters()
    optimizer = ImbSAM(base(params, lr=0.01))
    try:
        for _ in range(2):
            one_step(optimizer, params)
            assert seen == [("pre", optimizer), ("post", optimizer)]
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    fill(params, gradients(0))
    optimizer.third_step()
    optimizer.base.step()
    assert not seen


def test_a_base_that_fails_leaves_the_global_hooks_where_they_were():
    seen = []
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append(1))
    try:
        params = parameters()
        optimizer = ImbSAM(Adagrad(params, lr=0.01))
        optimizer.base.register_step_pre_hook(lambda *_: 1 / 0)
        fill(params, gradients(0))
        with pytest.raises(ZeroDivisionError):
            optimizer.third_step()
        SGD(parameters(), lr=0.1).step()
        assert seen == [1, 1]
    finally:
        handle.remove()

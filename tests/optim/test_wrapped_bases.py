"""Bases that wrap others; groups that stay out; what is left behind, and saved mid-step."""

from __future__ import annotations

import copy
import io
import os
import signal
import weakref
from typing import Any

import pytest
import torch
from phases import classifier, epsilon, equal, fill, gradients, one_step, parameters, snapshot
from torch import nn
from torch.optim import SGD

from imbsam_fast import ImbSAM, LeanImbSAM, TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")


class Slow:
    """Lookahead: every second step the weights go back half of the way. No torch optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.steps, self.mode = optimizer, 0, "train"
        self.slow = [p.detach().clone() for p in self.params()]

    def params(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        if self.steps % 2 == 0:
            for p, s in zip(self.params(), self.slow):
                s.lerp_(p, 0.5)
                p.copy_(s)


class SlowWithCheckpoints(Slow):
    def state_dict(self) -> dict[str, Any]:
        own = {"steps": self.steps, "slow": snapshot(self.slow)}
        return {"own": own, "inner": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.slow = state["own"]["steps"], snapshot(state["own"]["slow"])
        self.optimizer.load_state_dict(state["inner"])

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


def lookahead(params: list, k: int = 2) -> Any:
    wrappers = pytest.importorskip("pytorch_optimizer")
    return wrappers.Lookahead(SGD(params, lr=0.1, momentum=0.9), k=k)


def schedule_free(params: list) -> Any:
    wrapper = pytest.importorskip("pytorch_optimizer").ScheduleFreeWrapper(SGD(params, lr=0.1))
    wrapper.train()
    return wrapper


def slow(params: list) -> Any:
    return Slow(SGD(params, lr=0.1, momentum=0.9))


def slow_with_checkpoints(params: list) -> Any:
    return SlowWithCheckpoints(SGD(params, lr=0.1, momentum=0.9))


each_base = pytest.mark.parametrize(
    "base", [slow, slow_with_checkpoints, lookahead, schedule_free], ids=lambda f: f.__name__
)


@each_base
def test_a_wrapper_takes_its_own_step_on_the_merged_gradient(base):
    params, expected = parameters(), parameters()
    optimizer, plain = ImbSAM(base(params), rho=0.5), base(expected)
    for step in range(5):
        one_step(optimizer, params, step)
        fill(expected, [h + p for h, p in zip(gradients(3 * step), gradients(3 * step + 2))])
        plain.step()
    torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-13)


@each_base
def test_its_checkpoints_hold_what_it_knows(base):
    params = parameters()
    optimizer = ImbSAM(base(params), rho=0.5)
    for step in range(3):
        one_step(optimizer, params, step)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    other = ImbSAM(base(resumed), rho=0.1)
    other.load_state_dict(saved)
    if base is slow:  # keeps something that no checkpoint knows
        other.base.steps, other.base.slow = optimizer.base.steps, snapshot(optimizer.base.slow)
    for step in range(3, 6):
        one_step(optimizer, params, step)
        one_step(other, resumed, step)
    torch.testing.assert_close(resumed, params, rtol=1e-12, atol=1e-13)
    assert other.param_groups[0]["rho"] == 0.5


def test_a_checkpoint_of_the_wrapper_alone_leaves_rho_alone_and_hooks_run():
    params = parameters()
    optimizer = ImbSAM(slow_with_checkpoints(params), rho=0.3)
    optimizer.register_state_dict_post_hook(lambda o, state: {"wrapped": state})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: state["wrapped"])
    optimizer.load_state_dict({"wrapped": slow_with_checkpoints(parameters()).state_dict()})
    assert optimizer.param_groups[0]["rho"] == 0.3 and set(optimizer.state_dict()) == {"wrapped"}


def test_train_and_eval_are_passed_on_but_not_while_perturbed():
    params = parameters()
    optimizer = ImbSAM(slow_with_checkpoints(params))
    optimizer.eval()
    assert optimizer.base.mode == "eval"
    optimizer.train()
    assert optimizer.base.mode == "train"
    ImbSAM(SGD(parameters(), lr=0.1)).eval()  # has none: nothing to do
    fill(params, gradients(0))
    optimizer.second_step()
    with pytest.raises(RuntimeError, match=r"eval\(\) in the middle of a step"):
        optimizer.eval()


def test_a_wrapper_around_an_imbsam_is_told_how_to_nest():
    model, criterion, _, _ = classifier()
    around = Slow(ImbSAM(SGD(model.parameters(), lr=0.1)))
    for build in (lambda: TrainStep(model, criterion, around), lambda: ImbSAM(around)):
        with pytest.raises(
            TypeError, match=r"Slow around an ImbSAM.*the other way round: ImbSAM\(Slow"
        ):
            build()
    with pytest.raises(TypeError, match="optimizer is SGD, expected an ImbSAM"):
        TrainStep(model, criterion, SGD(model.parameters(), lr=0.1))


def test_the_constructors_of_other_packages_get_an_answer():
    params = parameters()
    with pytest.raises(
        TypeError, match=r"base = torch.optim.SGD\(params, lr=0.1\)\n *optimizer = ImbSAM\("
    ):
        ImbSAM((p for p in params), SGD, lr=0.1)
    with pytest.raises(TypeError, match=r"ImbSAM got lr, expected .* settings go to the base"):
        ImbSAM(SGD(params, lr=0.1), lr=0.1)


# ---------------------------------------------------------------- what is left behind


@pytest.mark.parametrize("wrap", [ImbSAM, LeanImbSAM, "TrainStep"])
def test_memory_is_free_when_everything_was_let_go(wrap):
    model, criterion, x, y = classifier()
    alive = weakref.ref(model.weight)
    optimizer = (ImbSAM if wrap == "TrainStep" else wrap)(
        SGD(model.parameters(), lr=0.1, momentum=0.9)
    )
    step = TrainStep(model, criterion, optimizer)
    step(x, y)
    del model, optimizer, step
    assert alive() is None


def test_wrapping_a_base_again_and_again_leaves_nothing_on_it():
    base = SGD(parameters(), lr=0.1)
    for _ in range(50):
        optimizer = ImbSAM(base)
    assert len(base._optimizer_load_state_dict_pre_hooks) == 1
    assert len(base._optimizer_load_state_dict_post_hooks) == 1
    del optimizer
    assert not base._optimizer_load_state_dict_pre_hooks


# ---------------------------------------------------------------- groups that stay out


@pytest.mark.parametrize("stay", [{"perturb": False}, {"rho": 0.0}])
@pytest.mark.parametrize("optimizer", [ImbSAM, LeanImbSAM])
def test_a_group_is_left_out_of_the_perturbation_and_of_its_norm(stay, optimizer):
    """SAM-ON is this with the normalisation layers' parameters in the other group."""
    params, before = parameters(), parameters()
    groups = [{"params": params[:2]}, {"params": params[2:], **stay}]
    wrapped = optimizer(SGD(groups, lr=0.1, momentum=0.9), rho=0.3)
    fill(params, gradients(1))
    wrapped.second_step()
    moved = [b + e for b, e in zip(before, epsilon(gradients(1)[:2], 0.3))]
    torch.testing.assert_close(snapshot(params[:2]), snapshot(moved), rtol=1e-12, atol=1e-14)
    assert equal(params[2:], before[2:])
    fill(params, gradients(2))
    wrapped.third_step()
    expected = [b - 0.1 * g for b, g in zip(before, gradients(2))]
    torch.testing.assert_close(snapshot(params), snapshot(expected), rtol=1e-12, atol=1e-14)


def test_with_no_group_perturbed_a_step_is_the_bases():
    params, expected = parameters(), parameters()
    optimizer, plain = ImbSAM(SGD(params, lr=0.1), rho=0.0), SGD(expected, lr=0.1)
    fill(params, [g * float("inf") for g in gradients(1)])  # goes nowhere
    optimizer.second_step()
    assert bool(optimizer.perturbation_is_finite()) and equal(params, expected)
    fill(params, gradients(2))
    fill(expected, gradients(2))
    optimizer.third_step()
    plain.step()
    torch.testing.assert_close(params, expected, rtol=1e-13, atol=1e-14)


def test_perturb_is_checked_saved_and_kept_by_a_checkpoint_without_it():
    groups = [{"params": parameters()[:2], "perturb": False}, {"params": parameters()[2:]}]
    optimizer = ImbSAM(SGD(groups, lr=0.1))
    saved = optimizer.state_dict()
    assert [group["perturb"] for group in saved["param_groups"]] == [False, True]
    for group in saved["param_groups"]:
        del group["perturb"]
    optimizer.load_state_dict(saved)
    assert [group["perturb"] for group in optimizer.param_groups] == [False, True]
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['perturb'\] is 1, expected True or"):
        ImbSAM(SGD([{"params": parameters(), "perturb": 1}], lr=0.1))


# ---------------------------------------------------------------- saving in the middle of a step


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
@pytest.mark.parametrize("when", [1, 2])
def test_a_handler_saves_the_unperturbed_weights_in_any_forward(when):
    """As Lightning's requeueing on SLURM does on SIGUSR1."""
    model, criterion, x, y = classifier()
    optimizer = ImbSAM(SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.5)
    step = TrainStep(model, criterion, optimizer, plan="joint")
    step(x, y)
    before = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    files: list[io.BytesIO] = []
    forwards = []

    def save(*_: object) -> None:
        files.append(io.BytesIO())
        weights, state = optimizer.unperturbed_weights(model), optimizer.unperturbed_state_dict()
        torch.save({"model": weights, "optimizer": state}, files[-1])
        if when == 2:
            with pytest.raises(RuntimeError, match=r"unperturbed_state_dict\(\) and unperturbed_w"):
                optimizer.state_dict()

    def fire(*_: object) -> None:
        forwards.append(1)
        if len(forwards) == when:
            os.kill(os.getpid(), signal.SIGUSR1)

    handle, previous = model.register_forward_pre_hook(fire), signal.signal(signal.SIGUSR1, save)
    try:
        step(x, y)
    finally:
        signal.signal(signal.SIGUSR1, previous)
        handle.remove()
    saved = torch.load(io.BytesIO(files[0].getvalue()), weights_only=True)
    assert equal([*saved["model"].values()], [*before["model"].values()])
    buffers = [
        [s["momentum_buffer"] for s in d["optimizer"]["state"].values()] for d in (saved, before)
    ]
    assert equal(*buffers) and not equal([*model.state_dict().values()], [*saved["model"].values()])


def test_unperturbed_weights_of_master_weights_are_their_rounding():
    model = nn.Linear(3, 2).bfloat16()
    optimizer = ImbSAM(SGD(model.parameters(), lr=0.1), rho=5.0, master_weights=True)
    before = snapshot(model.parameters())
    fill(list(model.parameters()), [torch.ones_like(p) for p in model.parameters()])
    optimizer.second_step()
    assert not equal(list(model.parameters()), before)
    assert equal([*optimizer.unperturbed_weights(model).values()], before)

"""ImbSAM around the fused bases: the same steps, the same state, the same flags as torch."""

from __future__ import annotations

import importlib
import io

import pytest
import torch
from bases import CLASSES, class_id
from compiles import needs_a_compiler
from phases import equal, fill, gradients, one_step, parameters, snapshot
from torch.optim import AdamW

from imbsam_fast import ImbSAM, ops
from imbsam_fast.optim import bases

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = ("step", "exp_avg", "exp_avg_sq")


def plain_step(optimizer: torch.optim.Optimizer, params: list, step: int) -> None:
    """The base alone on the merged gradient of `one_step`."""
    fill(params, [h + p for h, p in zip(gradients(3 * step), gradients(3 * step + 2))])
    optimizer.step()


def state_of(optimizer: torch.optim.Optimizer, names: tuple[str, ...] = STATE) -> list:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p][name] for p in params for name in names]


def own_state(optimizer: torch.optim.Optimizer) -> list:
    """All that the optimizer keeps, parameter by parameter, in the order of the names."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [v for p in params for _, v in sorted(optimizer.state[p].items()) if v is not None]


each_configuration = pytest.mark.parametrize(("base", "settings"), CLASSES, ids=class_id)


@pytest.mark.parametrize("lr", ["number", "tensor"])
@each_configuration
def test_a_hundred_steps_like_torch_on_the_merged_gradient(base, settings, lr):
    params, expected = parameters(), parameters()
    if lr == "tensor":
        settings = {**settings, "lr": torch.tensor(settings["lr"], dtype=torch.float64)}
    optimizer, plain = ImbSAM(base(params, **settings)), base(expected, **settings)
    assert bases.reason_not_fused(optimizer.base) is None
    for step in range(100):
        one_step(optimizer, params, step)
        plain_step(plain, expected, step)
    torch.testing.assert_close(params, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(own_state(optimizer), own_state(plain), rtol=1e-11, atol=1e-12)


@each_configuration
def test_checkpoints_interchange_with_torch_both_ways(base, settings):
    params, theirs = parameters(), parameters()
    optimizer, plain = ImbSAM(base(params, **settings), rho=0.2), base(theirs, **settings)
    one_step(optimizer, params)
    plain_step(plain, theirs, 0)
    files = []
    for state in (optimizer.state_dict(), plain.state_dict()):
        files.append(io.BytesIO())
        torch.save(state, files[-1])
        files[-1].seek(0)
    ours_saved, theirs_saved = (torch.load(file, weights_only=True) for file in files)
    ours_loaded = ImbSAM(base(theirs, **{**settings, "lr": 0.5}), rho=0.3)
    ours_loaded.load_state_dict(theirs_saved)
    group = ours_loaded.param_groups[0]
    assert group["lr"] == settings["lr"] and group["rho"] == 0.3
    plain_loaded = base(params, **{**settings, "lr": 0.5})
    plain_loaded.load_state_dict(ours_saved)
    for step in range(1, 4):
        one_step(ours_loaded, theirs, step)
        plain_step(plain_loaded, params, step)
    torch.testing.assert_close(params, theirs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(own_state(ours_loaded), own_state(plain_loaded))


@each_configuration
def test_what_is_not_finite_skips_the_step(base, settings):
    """The first one too: what there is of state then is that of no step."""
    params, expected = parameters(torch.float32), parameters(torch.float32)
    optimizer, plain = ImbSAM(base(params, **settings)), ImbSAM(base(expected, **settings))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(1))
    for step in range(2):
        before = snapshot(params), snapshot(own_state(optimizer))
        for phase, call in enumerate((optimizer.first_step, optimizer.second_step)):
            fill(params, [4 * g for g in gradients(phase, torch.float32)])
            call()
        bad = gradients(2, torch.float32)
        bad[1][0] = float("inf")
        fill(params, bad)
        optimizer.third_step(scaler)
        assert equal(params, before[0])
        if step == 0:
            assert not any(t.any() for t in own_state(optimizer))
        else:
            assert equal(own_state(optimizer), before[1])
        for o, p in ((optimizer, params), (plain, expected)):
            one_step(o, p, step)
        assert equal(params, expected) and equal(own_state(optimizer), own_state(plain))


@needs_a_compiler
@pytest.mark.slow  # compiles
@pytest.mark.parametrize("base", bases.FUSED, ids=class_id)
def test_the_phases_compile_as_full_graphs(base):
    importlib.import_module("torch.distributed.tensor")  # then tensors are looked at for shards
    torch._dynamo.reset()
    settings = next(settings for kind, settings in CLASSES if kind is base)
    ends = []
    whole = not torch.__version__.startswith("2.6.")  # which traces no generator's context
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=whole, backend="aot_eager")):
        params = parameters(torch.float32)
        optimizer = ImbSAM(base(params, **{**settings, "lr": torch.tensor(0.01)}))
        phases = [
            wrap(f) for f in (optimizer.first_step, optimizer.second_step, optimizer.third_step)
        ]
        for step in range(3):
            for phase, call in enumerate(phases):
                fill(params, gradients(3 * step + phase, torch.float32))
                call()
        ends.append([*params, *own_state(optimizer)])
    torch._dynamo.reset()
    assert equal(*ends)


@pytest.mark.parametrize("kind", bases.FUSED, ids=class_id)
def test_differentiable_and_bad_numbers_are_refused(kind):
    for name in bases.FUSED[kind].numbers:
        base = kind(parameters(), lr=0.01)
        value = base.param_groups[0][name]
        many = isinstance(value, tuple)
        base.param_groups[0][name] = (value[0], float("nan")) if many else float("nan")
        where = rf"\['{name}'\]" + (r"\[1\]" if many else "")
        with pytest.raises(ValueError, match=rf"param_groups\[0\]{where} is nan, expected a"):
            ImbSAM(base)
    with pytest.raises(ValueError, match=r"\['differentiable'\] is True, expected False"):
        ImbSAM(kind(parameters(), lr=0.01, differentiable=True))


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}, {"capturable": True}])
def test_flags_of_the_base_choose_no_other_update(flags):
    ends, states = [], []
    for settings in (flags, {}):
        params = parameters(torch.float32)
        base = AdamW(params, lr=0.01, **settings)
        for step in range(3):
            one_step(ImbSAM(base), params, step)
        ends.append(params)
        states.append(state_of(base))
    assert equal(*ends) and equal(*states)


def test_flags_of_sgd_choose_no_other_update():
    ends = []
    for flags in ({"foreach": True}, {"fused": True}, {}):
        params = parameters(torch.float32)
        one_step(ImbSAM(torch.optim.SGD(params, lr=0.1, momentum=0.9, **flags)), params)
        ends.append(params)
    assert equal(ends[0], ends[2]) and equal(ends[1], ends[2])


def test_differentiable_is_refused_in_any_group():
    params = parameters()
    base = AdamW([{"params": params[:2]}, {"params": params[2:], "differentiable": True}])
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['differentiable'\] is True"):
        ImbSAM(base)


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_new_state_has_the_kind_of_step_that_torch_makes(float64_by_default):
    """float64 on the CPU then, but float32 where it may be on a GPU."""
    for flags in ({}, {"fused": True}, {"capturable": True}):
        params, theirs = parameters(torch.float32), parameters(torch.float32)
        optimizer = ImbSAM(AdamW(params, **flags))
        one_step(optimizer, params)
        # torch has capturable for GPUs only, but makes the same state for it as for fused.
        plain = AdamW(theirs, fused=bool(flags))
        fill(theirs, gradients(0, torch.float32))
        plain.step()
        assert [(s.dtype, s.shape, s.device) for s in state_of(optimizer)] == [
            (s.dtype, s.shape, s.device) for s in state_of(plain)
        ]


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_skipped_first_step_leaves_initialised_state_and_no_count(amsgrad):
    params, expected = parameters(torch.float32), parameters(torch.float32)
    optimizer = ImbSAM(AdamW(params, lr=0.01, amsgrad=amsgrad))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(1))
    before = snapshot(params)
    for phase, call in enumerate((optimizer.first_step, optimizer.second_step)):
        fill(params, [4 * g for g in gradients(phase, torch.float32)])
        call()
    bad = [4 * g for g in gradients(2, torch.float32)]
    bad[1][0] = float("inf")
    fill(params, bad)
    optimizer.third_step(scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0 and equal(params, before)
    for state in optimizer.state.values():
        assert all(not t.any() for t in state.values())
    plain = ImbSAM(AdamW(expected, lr=0.01, amsgrad=amsgrad))
    for o, p in ((optimizer, params), (plain, expected)):
        one_step(o, p)
    assert equal(params, expected) and equal(state_of(optimizer), state_of(plain))


def test_parameters_have_counts_of_their_own():
    """A parameter without a gradient is not updated, and takes no step."""
    params, expected = parameters(), parameters()
    optimizer, plain = ImbSAM(AdamW(params, lr=0.01)), AdamW(expected, lr=0.01)
    for step in range(3):
        given = [i for i in range(len(params)) if i != 1 or step == 1]
        for phase, call in enumerate(
            (optimizer.first_step, optimizer.second_step, optimizer.third_step)
        ):
            grads = gradients(3 * step + phase)
            fill(params, [g if i in given else None for i, g in enumerate(grads)])
            call()
        h, p = gradients(3 * step), gradients(3 * step + 2)
        fill(expected, [h[i] + p[i] if i in given else None for i in range(len(params))])
        plain.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 1, 3, 3, 3]
    torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-13)


def test_a_failed_kernel_leaves_weights_and_state(by_launches, monkeypatch):
    params = parameters()
    base = AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=0.01)
    optimizer = ImbSAM(base)
    one_step(optimizer, params)
    before, state = snapshot(params), snapshot(state_of(optimizer))
    base.param_groups[1]["lr"] = torch.tensor([0.1, 0.1])
    with pytest.raises(ValueError, match=r"adam_update_: lr has shape \(2,\)"):
        one_step(optimizer, params, 1)
    assert equal(params, before) and equal(state_of(optimizer), state)
    base.param_groups[1]["lr"] = 0.01
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(ops, "adam_update_", lambda *args: 1 / 0)
        one_step(optimizer, params, 1)
    assert equal(params, before) and equal(state_of(optimizer), state)


def test_state_in_another_layout_or_shape():
    params, expected = parameters(), parameters()
    optimizer, plain = ImbSAM(AdamW(params, lr=0.01)), ImbSAM(AdamW(expected, lr=0.01))
    for o, p in ((optimizer, params), (plain, expected)):
        one_step(o, p)
    state = optimizer.state[params[0]]
    state["exp_avg"] = state["exp_avg"].to(memory_format=torch.channels_last)
    for o, p in ((optimizer, params), (plain, expected)):
        one_step(o, p, 1)
    assert equal(params, expected) and equal(state_of(optimizer), state_of(plain))
    optimizer.state[params[2]]["exp_avg_sq"] = torch.ones(5, dtype=torch.float64)
    before = snapshot(params)
    with pytest.raises(ValueError, match=r"v\[2\] is .* \(5,\)"):
        one_step(optimizer, params)
    assert equal(params, before)


def test_sparse_and_complex_are_refused():
    params = parameters()
    optimizer = ImbSAM(AdamW(params, lr=0.01))
    before = snapshot(params)
    for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
        fill(params, gradients(0))
        params[2].grad = gradients(0)[2].to_sparse()
        with pytest.raises(TypeError, match=r"gradient of parameter 2 is torch.sparse_coo"):
            call()
        assert equal(params, before) and not optimizer.state
    complex_ = torch.nn.Parameter(torch.ones(2) * 1j)
    with pytest.raises(TypeError, match=r"parameter 0 is torch.complex64"):
        optimizer.add_param_group({"params": [complex_]})


def test_betas_that_are_tensors_take_the_bases_own_step():
    params, expected = parameters(), parameters()
    betas = tuple(torch.tensor(b, dtype=torch.float64) for b in (0.9, 0.999))
    optimizer = ImbSAM(AdamW(params, lr=0.01, betas=betas))
    plain = AdamW(expected, lr=0.01, betas=betas)
    one_step(optimizer, params)
    plain_step(plain, expected, 0)
    assert equal(params, expected)

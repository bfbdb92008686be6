"""ImbSAM(master_weights=True): float32 weights of half-precision parameters."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings

import pytest
import torch
from bases import CLASSES, class_id
from phases import equal, fill, gradients, one_step, parameters, snapshot
from torch import Tensor, nn
from torch.optim import SGD, Adagrad

from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.optim.lean import LeanImbSAM

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = [torch.bfloat16, torch.float16]
BASES = {
    f"{kind.__name__} {class_id(settings)}": functools.partial(kind, **settings)
    for kind, settings in CLASSES
}
each_base = pytest.mark.parametrize("base", BASES)
each_half = pytest.mark.parametrize("dtype", HALF, ids=str)


def masters(optimizer: ImbSAM) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p]["master_weight"] for p in params]


def pair(base: str, dtype: torch.dtype) -> tuple[ImbSAM, list, ImbSAM, list]:
    """Half-precision parameters with master weights, and float32 ones of the same values."""
    params = parameters(dtype)
    floats = [nn.Parameter(p.detach().float()) for p in params]
    optimizer = ImbSAM(BASES[base](params), master_weights=True)
    return optimizer, params, ImbSAM(BASES[base](floats)), floats


def step_both(optimizer: ImbSAM, params: list, plain: ImbSAM, floats: list, step: int) -> None:
    for phase in range(3):
        grads = gradients(3 * step + phase, params[0].dtype)
        for o, p in ((optimizer, params), (plain, floats)):
            fill(p, [g.to(p[0].dtype) for g in grads])
            (o.first_step, o.second_step, o.third_step)[phase]()


@each_base
@each_half
def test_the_master_weights_are_those_of_float32_training(base, dtype):
    """Bit for bit, where gradients do not depend on the weights."""
    optimizer, params, plain, floats = pair(base, dtype)
    for step in range(20):
        step_both(optimizer, params, plain, floats, step)
        assert equal(masters(optimizer), floats)
        assert equal(params, [w.to(dtype) for w in floats])
    for p, f in zip(params, floats):
        for name, value in plain.state[f].items():
            assert torch.equal(optimizer.state[p][name], value), name


@each_half
def test_the_perturbation_is_that_of_the_master_weights(dtype):
    optimizer, params, plain, floats = pair("SGD momentum-weight_decay", dtype)
    fill(params, gradients(4, dtype))
    optimizer.second_step()
    optimizer.restore()
    assert not optimizer.state and equal(params, parameters(dtype))
    step_both(optimizer, params, plain, floats, 0)
    for o, p in ((optimizer, params), (plain, floats)):
        fill(p, [g.to(p[0].dtype) for g in gradients(4, dtype)])
        o.second_step()
    assert optimizer.is_perturbed and equal(params, [f.to(dtype) for f in floats])
    kept = snapshot(masters(optimizer))
    optimizer.restore()
    assert equal(masters(optimizer), kept) and equal(params, [w.to(dtype) for w in kept])


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 6)).to(dtype)


def trained(dtype: torch.dtype, master_weights: bool, steps: int = 40) -> Tensor:
    """All weights after training at a small learning rate, which half dtypes cannot resolve."""
    model = network(torch.bfloat16).to(dtype)
    criterion = SplitCrossEntropy(ClassSplit.from_counts([500, 300, 200, 50, 20, 5]))
    base = SGD(model.parameters(), lr=1e-3, momentum=0.9)
    step = TrainStep(model, criterion, ImbSAM(base, master_weights=master_weights), plan="split")
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(32, 12, generator=generator).bfloat16().to(dtype)
        step(x, torch.randint(0, 6, (32,), generator=generator))
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


@pytest.mark.filterwarnings("ignore:bfloat16 parameters")
def test_bfloat16_training_follows_float32_to_its_rounding():
    exact = trained(torch.float32, master_weights=False)
    with_master = trained(torch.bfloat16, master_weights=True)
    without = trained(torch.bfloat16, master_weights=False)
    # A weight is off by half a unit in its last place, and by what the forward passes round.
    unit = 2.0**-8 * exact.abs().clamp(min=2.0**-6)
    assert ((with_master - exact).abs() / unit).mean() < 0.5
    assert (without - exact).abs().mean() > 1.5 * (with_master - exact).abs().mean()


def test_without_master_weights_most_of_epsilon_is_lost():
    """Of a million elements; with them all of it is there on average, rounded without bias."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1_000_000, generator=generator)
    g_t = torch.randn(1_000_000, generator=generator).bfloat16()
    epsilon = 0.05 * g_t.float() / g_t.float().norm()

    def projected(master_weights: bool) -> tuple[float, float]:
        """The share of moved elements, and of epsilon, in what the weights moved by."""
        p = nn.Parameter(start.bfloat16())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = ImbSAM(SGD([p], lr=0.1), rho=0.05, master_weights=master_weights)
        if master_weights:  # as after some training: the parameter is the rounding
            optimizer.state[p]["master_weight"] = start.clone()
        before = p.detach().float()
        p.grad = g_t.clone()
        optimizer.second_step()
        moved = p.detach().float() - before
        share = float((moved @ epsilon) / (epsilon @ epsilon))
        return float((moved != 0).float().mean()), share

    moved, share = projected(master_weights=False)
    assert moved < 0.05 and share < 0.5
    moved, share = projected(master_weights=True)
    assert 0.8 < share < 1.2


@each_base
def test_checkpoints_keep_float32_and_resume_bit_for_bit(base):
    optimizer, params, _, _ = pair(base, torch.bfloat16)
    for step in range(3):
        one_step(optimizer, params, step)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(p.detach()) for p in saved["params"]]
    other = ImbSAM(BASES[base](resumed), master_weights=True)
    other.load_state_dict(saved["optimizer"])
    assert equal(masters(other), masters(optimizer))
    for o, p in ((optimizer, params), (other, resumed)):
        one_step(o, p, 3)
    assert equal(masters(other), masters(optimizer)) and equal(resumed, params)


@each_base
def test_a_load_through_the_base_keeps_float32_too(base):
    optimizer, params, _, _ = pair(base, torch.bfloat16)
    one_step(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    expected = [m.clone() for m in masters(optimizer)]
    one_step(optimizer, params, 1)
    optimizer.base.load_state_dict(saved)
    assert equal(masters(optimizer), expected)
    one_step(optimizer, params, 1)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_the_option(copied):
    optimizer, params, _, _ = pair("AdamW weight_decay", torch.float16)
    one_step(optimizer, params)
    twin = copied(optimizer)
    for o in (optimizer, twin):
        one_step(o, o.param_groups[0]["params"], 1)
    assert equal(masters(twin), masters(optimizer))


@pytest.mark.filterwarnings("ignore:bfloat16 parameters")
@each_base
def test_state_without_master_weights_is_taken_over(base):
    """The moments in float32, and master weights from the parameters."""
    params, twins = parameters(torch.bfloat16), parameters(torch.bfloat16)
    plain = ImbSAM(BASES[base](params))
    one_step(plain, params)
    optimizer = ImbSAM(BASES[base](twins), master_weights=True)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    with torch.no_grad():
        torch._foreach_copy_(twins, params)
    one_step(optimizer, twins, 1)
    assert all(t.dtype == torch.float32 for s in optimizer.state.values() for t in s.values())
    switched = ImbSAM(plain.base, master_weights=True)
    one_step(switched, params, 1)
    assert equal(masters(switched), masters(optimizer)) and equal(params, twins)


def test_parameters_that_someone_changes_are_followed():
    """And where they were not changed, the master weights keep their precision."""
    optimizer, params, plain, floats = pair("SGD weight_decay", torch.bfloat16)
    step_both(optimizer, params, plain, floats, 0)
    for tensors in (params, floats):
        with torch.no_grad():
            tensors[0].zero_()
            tensors[2][0, 0] = 7.0
    step_both(optimizer, params, plain, floats, 1)
    assert equal(masters(optimizer), floats)


def test_parameters_of_float32_have_none():
    halves, floats = parameters(torch.bfloat16), parameters(torch.float32, seed=1)
    optimizer = ImbSAM(BASES["AdamW weight_decay"]([*halves, *floats]), master_weights=True)
    twins = parameters(torch.float32, seed=1)
    plain = ImbSAM(BASES["AdamW weight_decay"](twins))
    for call, other in ((optimizer.first_step, plain.first_step),
                        (optimizer.third_step, plain.third_step)):  # fmt: skip
        fill(halves, gradients(0, torch.bfloat16))
        fill(floats, gradients(1, torch.float32))
        fill(twins, gradients(1, torch.float32))
        call(), other()
    assert equal(floats, twins)
    assert all("master_weight" not in optimizer.state[p] for p in floats)
    assert all("master_weight" in optimizer.state[p] for p in halves)


def test_what_is_not_finite_skips_the_step():
    optimizer, params, _, _ = pair("AdamW weight_decay", torch.float16)
    one_step(optimizer, params)
    kept, before = snapshot(masters(optimizer)), snapshot(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(1))
    for call in (optimizer.first_step, optimizer.second_step):
        fill(params, gradients(0, torch.float16))
        call()
    bad = gradients(2, torch.float16)
    bad[0][0] = float("nan")
    fill(params, bad)
    optimizer.third_step(scaler)
    assert equal(masters(optimizer), kept) and equal(params, before)
    assert [s["step"].item() for s in optimizer.state.values()] == [1.0] * len(params)


def test_other_bases_and_hooks_are_refused():
    params = parameters(torch.bfloat16)
    for base in (Adagrad(params), type("MySGD", (SGD,), {})(params, lr=0.1)):
        with pytest.raises(ValueError, match=r"base is .*, expected with master_weights=True one"):
            ImbSAM(base, master_weights=True)
    with pytest.raises(ValueError, match="master_weights is True, expected False with a Lean"):
        LeanImbSAM(SGD(params, lr=0.1, momentum=0.9), master_weights=True)
    base = SGD(params, lr=0.1)
    optimizer = ImbSAM(base, master_weights=True)
    before = snapshot(params)
    base.register_step_post_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"base has step hooks.*, expected with master_weights"):
        one_step(optimizer, params)
    assert equal(params, before) and not optimizer.is_perturbed


def test_no_warning_with_them():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImbSAM(SGD(parameters(torch.bfloat16), lr=0.1), master_weights=True)
    with pytest.warns(UserWarning, match="use master_weights=True"):
        ImbSAM(SGD(parameters(torch.bfloat16), lr=0.1))

"""Random configurations of training steps against Algorithm 1 in float64, by plain autograd.

Networks, class splits, losses, plans and options in every combination that goes together. The
300 are the same in every run.
"""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from draws import examples, group_settings, momenta
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from imbsam_fast import (
    ClassSplit,
    ImbSAM,
    SplitCrossEntropy,
    SplitLoss,
    TrainStep,
    frozen_batch_norm_statistics,
    split_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 5
COUNTS = [200, 150, 100, 30, 5]


# ---------------------------------------------------------------- what is drawn


SPLITS = {
    "imbsam": lambda: ClassSplit.from_counts(COUNTS, eta=100),
    "released": lambda: ClassSplit.from_counts(COUNTS, eta=30, inclusive=False),
    "sam": ClassSplit.all_tail,
    "sgd": ClassSplit.none,
    "focal": lambda: ClassSplit.focal(COUNTS, gamma=2.0, lam=0.8),
    "re-weighted": lambda: ClassSplit(torch.zeros(5), torch.tensor([1.0, 1, 1, 3, 3])),
    "no weight": lambda: ClassSplit(
        torch.tensor([1.0, 0, 2, 0, 0]), torch.tensor([0.0, 0, 1, 3, 0])
    ),
}

BASES = {
    "SGD": torch.optim.SGD,
    # A large eps: gradients that are rounding errors must not become whole steps.
    "Adam": functools.partial(torch.optim.Adam, eps=1e-2),
    "AdamW": functools.partial(torch.optim.AdamW, eps=1e-2),
    "RMSprop": functools.partial(torch.optim.RMSprop, eps=1e-2),
}


@dataclass
class Config:
    """One training: everything but the numbers in the batches, which depend on `seed`."""

    form: str
    base: str
    sgd: dict[str, Any]
    groups: list[dict[str, Any]]
    net: dict[str, Any]
    split: str
    loss: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    steps: int = 2
    seed: int = 0


nets = st.fixed_dictionaries(
    {
        "first": st.sampled_from(["linear", "transposed", "convolution", "channels_last"]),
        "norm": st.sampled_from(["layer", "none", "batch", "frozen batch"]),
        "middle": st.sampled_from(["one", "twice", "tied"]),
        "unused": st.booleans(),
        "frozen": st.sampled_from(["", "bias", "first", "last.weight"]),
    }
)
losses = st.fixed_dictionaries(
    {"kind": st.sampled_from(["cross-entropy", "per sample"])},
    optional={
        "label_smoothing": st.sampled_from([0.1, 1.0]),
        "ignore_index": st.sampled_from([-100, 2]),
        "tail_weight": st.sampled_from([2.0, 0.5]),
        "weight": st.just([1.0, 0.5, 2.0, 0.0, 1.5]),
    },
)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    config = Config(
        form=draw(st.sampled_from(["auto", "joint", "split", "closure", "calls"])),
        base=draw(st.sampled_from(["SGD", "SGD", *BASES])),
        sgd=draw(momenta),
        groups=draw(st.lists(group_settings, min_size=1, max_size=3)),
        net=draw(nets),
        split=draw(st.sampled_from(list(SPLITS))),
        loss=draw(losses),
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
        steps=draw(st.integers(2, 3)),
        seed=draw(st.integers(0, 2**16)),
    )
    independent = config.net["norm"] != "batch"
    if config.form == "split" and not independent:
        config.form = "joint"
    if config.form != "closure":
        config.options["max_norm"] = draw(st.sampled_from([None, None, 0.2]))
        config.options["scaled"] = draw(st.booleans())
    if config.form in ("auto", "joint", "split"):
        sizes = [None, None, 1, 3, 100] if independent else [None]
        config.options["micro_batch_size"] = draw(st.sampled_from(sizes))
        config.options["batch_norm"] = draw(st.sampled_from(["once", "twice"]))
    return config


# ---------------------------------------------------------------- the network and its data


class Net(nn.Module):
    """Two to four layers; rows influence each other only where norm is "batch"."""

    def __init__(self, first: str, norm: str, middle: str, unused: bool, frozen: str) -> None:
        super().__init__()
        images = first in ("convolution", "channels_last")
        self.first = nn.Conv2d(2, 6, 3, padding=1) if images else nn.Linear(4, 6)
        norms = {"layer": nn.LayerNorm(6), "none": nn.Identity()}
        self.norm = norms.get(norm) or nn.BatchNorm1d(6)
        self.middle, self.again = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last = nn.Linear(6, CLASSES)
        if middle == "tied":
            self.again.weight = self.middle.weight
        elif middle == "twice":
            self.again = self.middle
        else:
            self.again = nn.Identity()
        self.unused = nn.Linear(3, 2) if unused else None
        if first == "transposed":
            for layer in (self.first, self.last):
                layer.weight.data = layer.weight.data.t().contiguous().t()
        if first == "channels_last":
            self.first.to(memory_format=torch.channels_last)
        for name, p in self.named_parameters():
            p.requires_grad_(not (frozen and frozen in name))
        if norm == "frozen batch":
            self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.dim() == 4:
            x = x.mean(dim=(2, 3))
        x = self.middle(torch.tanh(self.norm(x)))
        return self.last(torch.tanh(self.again(torch.tanh(x))))


def batch(config: Config, step: int) -> tuple[Tensor, Tensor]:
    """Rows of all classes, of head classes or of tail classes, some of them ignored."""
    generator = torch.Generator().manual_seed(10 * config.seed + step)
    first = config.net["first"]
    shape = (2, 3, 4) if first in ("convolution", "channels_last") else (4,)
    x = torch.randn(7, *shape, generator=generator, dtype=torch.float64)
    if first == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    low, high = [(0, 5), (0, 5), (0, 2), (3, 5)][int(torch.randint(4, (), generator=generator))]
    y = torch.randint(low, high, (7,), generator=generator)
    if "ignore_index" in config.loss:
        y[torch.rand(7, generator=generator) < 0.3] = config.loss["ignore_index"]
    return x, y


def made_groups(config: Config, model: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters of a model, dealt out to the groups in turn."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    dealt = [trainable[i :: len(config.groups)] for i in range(len(config.groups))]
    return [{"params": p, **group} for p, group in zip(dealt, config.groups) if p]


def made_base(config: Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    settings = config.sgd if config.base == "SGD" else {}
    return BASES[config.base](groups, **settings)


# ---------------------------------------------------------------- Algorithm 1, by plain autograd


def reference_losses(
    config: Config, model: nn.Module, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """head and tail of docs/design.md section 2, row by row."""
    split = SPLITS[config.split]()
    ignored = config.loss.get("ignore_index", -100)
    cross_entropy = {"label_smoothing": config.loss.get("label_smoothing", 0.0)}
    if "weight" in config.loss:
        cross_entropy["weight"] = torch.tensor(config.loss["weight"], dtype=torch.float64)
    logits = model(x)
    head = tail = 0.0 * logits.sum()
    b = max(1, sum(int(k) != ignored for k in y))
    for z, k in zip(logits, y):
        if k == ignored:
            continue
        loss = F.cross_entropy(z[None], k[None], reduction="none", **cross_entropy).squeeze() / b
        of_class = 0 if split.num_classes is None else int(k)
        head = head + split.plain[of_class] * loss
        tail = tail + config.loss.get("tail_weight", 1.0) * split.sharp[of_class] * loss
    return head, tail


def reference_step(
    config: Config, model: nn.Module, base: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> None:
    """One step in float64; `base` is torch's own and takes the merged gradient."""
    theta = [(p, group) for group in base.param_groups for p in group["params"]]
    params = [p for p, _ in theta]
    head, tail = reference_losses(config, model, x, y)
    once = {k: v.clone() for k, v in model.named_buffers()}
    g_h = torch.autograd.grad(head, params, retain_graph=True, allow_unused=True)
    g_t = torch.autograd.grad(tail, params, allow_unused=True)
    start = [p.detach().clone() for p in params]
    scaled = [
        g if g is None or not group.get("adaptive") else p.detach().abs() * g
        for (p, group), g in zip(theta, g_t)
    ]
    # A group that stays at theta does not count in the norm.
    scaled = [None if group.get("rho") == 0 else t for (_, group), t in zip(theta, scaled)]
    norm = sum((t.square().sum() for t in scaled if t is not None), torch.zeros(())).sqrt()
    with torch.no_grad():
        for (p, group), g, t in zip(theta, g_t, scaled):
            if t is not None and norm > 0:
                direction = p.abs() * t if group.get("adaptive") else g
                sign = -1 if group.get("maximize") else 1
                p += sign * group.get("rho", 0.05) * direction / norm
    _, tail = reference_losses(config, model, x, y)
    g_p = torch.autograd.grad(tail, params, allow_unused=True)
    if config.options.get("batch_norm", "once") == "once" or not norm > 0:
        model.load_state_dict(once, strict=False)
    with torch.no_grad():
        for p, s, h, q in zip(params, start, g_h, g_p):
            p.copy_(s)
            p.grad = None if h is None else h + q
    if config.options.get("max_norm"):
        torch.nn.utils.clip_grad_norm_(params, config.options["max_norm"])
    base.step()


# ---------------------------------------------------------------- the same with the package


def criterion_of(config: Config) -> nn.Module:
    split, loss = SPLITS[config.split](), dict(config.loss)
    weight = torch.tensor(loss.pop("weight")) if "weight" in loss else None
    if loss.pop("kind") == "cross-entropy":
        return SplitCrossEntropy(split, weight, **loss)
    ignored = {"ignore_index": loss["ignore_index"]} if "ignore_index" in loss else {}
    per_sample = nn.CrossEntropyLoss(
        weight, reduction="none", label_smoothing=loss.pop("label_smoothing", 0.0), **ignored
    )
    return split_loss(per_sample.to(config.dtype), split, **loss)


class Trainee:
    """A model that the package trains by the form that the configuration names."""

    def __init__(self, config: Config, model: nn.Module) -> None:
        self.config, self.model = config, model
        self.optimizer = ImbSAM(made_base(config, made_groups(config, model)))
        self.criterion = criterion_of(config)
        options = dict(config.options)
        self.scaler = torch.amp.GradScaler("cpu", 8.0) if options.pop("scaled", False) else None
        self.max_norm = options.get("max_norm")
        self.train_step = None
        if config.form in ("auto", "joint", "split"):
            self.train_step = TrainStep(
                model,
                self.criterion,
                self.optimizer,
                config.form,
                grad_scaler=self.scaler,
                **options,
            )

    def step(self, x: Tensor, y: Tensor) -> None:
        if self.train_step is not None:
            self.train_step(x, y)
        elif self.config.form == "closure":
            self.optimizer.step(lambda: self.loss(x, y))
        else:
            self.calls(x, y)

    def loss(self, x: Tensor, y: Tensor) -> SplitLoss:
        frozen = frozen_batch_norm_statistics(self.model)
        with frozen if self.optimizer.is_perturbed else nullcontext():
            return self.criterion(self.model(x), y)

    def calls(self, x: Tensor, y: Tensor) -> None:
        scale = self.scaler.scale if self.scaler else lambda loss: loss
        loss = self.loss(x, y)
        scale(loss.head).backward(retain_graph=True)
        self.optimizer.first_step()
        scale(loss.tail).backward()
        self.optimizer.second_step()
        scale(self.loss(x, y).tail).backward()
        self.optimizer.third_step(self.scaler, self.max_norm)
        if self.scaler:
            self.scaler.update()


@examples(300)
@given(configs())
def test_training_agrees_with_algorithm_1(config):
    torch.manual_seed(config.seed)
    expected = Net(**config.net).double()
    model = copy.deepcopy(expected).to(config.dtype)
    base, trainee = made_base(config, made_groups(config, expected)), Trainee(config, model)
    for step in range(config.steps):
        x, y = batch(config, step)
        reference_step(config, expected, base, x, y)
        trainee.step(x.to(config.dtype), y)
        assert not trainee.optimizer.is_perturbed
        assert all(p.grad is None for p in model.parameters())
    # Clipping multiplies by a float32 factor.
    double = config.dtype == torch.float64
    atol = (1e-6 if config.options.get("max_norm") else 1e-11) if double else 2e-4
    for (name, found), truth in zip(model.state_dict().items(), expected.state_dict().values()):
        torch.testing.assert_close(
            found.double(), truth.double(), rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )

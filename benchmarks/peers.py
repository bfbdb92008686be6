"""What else a user could pick for the steps of ImbSAM, of SAM and of SGD, and for the loss.

The authors' code and the losses that `imbsam-fast bench` shows too: imbsam_fast/bench/peers.py.
n is the bytes of all weights; "moved" counts reads and writes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from imbsam_fast import ClassSplit
from imbsam_fast.bench.optimizers import (
    AUTHORS,
    AUTHORS_FUSED,
    IMBSAM,
    RHO,
    Contender,
    Rules,
    Workspace,
    authors,
    imbsam,
    ours,
)
from imbsam_fast.bench.peers import RowWeights
from imbsam_fast.ops.dispatch import backend_name

AUTHORS_FOREACH = "authors' sequence, SGD(foreach=True)"
EAGER = "eager foreach, fused SGD"
EAGER_HOST = "eager foreach, scale on the host, fused SGD"
COMPILED = "torch.compile, hand-fused"
DAVDA = "davda54-style SAM, fused SGD"
PYTORCH_OPTIMIZER = "pytorch_optimizer's SAM, fused SGD"
PLAIN_SGD = "SGD(fused=True)"
MERGED_FUSED = "merge_, then AdamW(fused=True)"
MERGED_FOREACH = "merge_, then AdamW(foreach=True)"
AUTHORS_ADAMW = "authors' sequence, AdamW"
AUTHORS_ADAMW_FUSED = "authors' sequence, AdamW(fused=True)"
COMPILED_ROW_WEIGHTS = "torch.compile, row weights"

# What is left out of one ImbSAM step for the other two.
SAM = Rules("SAM optimizer step", ("second_step", "third_step"), 10)
SGD = Rules("SGD optimizer step", ("third_step",), 5)
# The same step around AdamW, whose update moves 8n: norm 1, perturb 4.
ADAMW = Rules("ImbSAM optimizer step, AdamW", IMBSAM.calls, 13)

# Compiling takes a time proportional to the number of tensors: about a minute and a half for 161
# on one core, which is hours for 10,000.
MOST_COMPILED_TENSORS = 200


# ---------------------------------------------------------------- ImbSAM


class EagerForeach:
    """The fewest passes over memory in eager PyTorch: the head gradient is taken, not copied.

    bytes: 17n moved: 6n to perturb (norm 1, scaling 2, theta + epsilon 3); 11n to restore (3),
    add (3) and update by SGD(fused=True) (5). With the scale on the host, which a GPU would
    have to wait for, 15n: epsilon is not written.
    """

    def __init__(
        self, base: torch.optim.Optimizer, rho: float, scale_on_host: bool = False
    ) -> None:
        self.base, self.rho, self.scale_on_host = base, rho, scale_on_host
        self.params: list[Tensor] = [p for group in base.param_groups for p in group["params"]]

    @torch.no_grad()
    def first_step(self) -> None:
        self.held = take_gradients(self.params)

    @torch.no_grad()
    def second_step(self) -> None:
        self.epsilon = take_gradients(self.params)
        norm = torch.stack(torch._foreach_norm(self.epsilon)).norm()
        scale = self.rho / (norm + 1e-16)
        if self.scale_on_host:
            self.alpha = scale.item()
        else:
            torch._foreach_mul_(self.epsilon, scale)
            self.alpha = 1.0
        torch._foreach_add_(self.params, self.epsilon, alpha=self.alpha)

    @torch.no_grad()
    def third_step(self) -> None:
        torch._foreach_sub_(self.params, self.epsilon, alpha=self.alpha)
        torch._foreach_add_([p.grad for p in self.params], self.held)
        self.held = self.epsilon = None
        self.base.step()
        self.base.zero_grad()


class Compiled:
    """Our own fusion, written by hand for torch.compile: one graph a phase.

    bytes: 11n moved: norm 1; perturb 4, the unperturbed weights kept in the gradients' memory;
    update 6. One group of torch.optim.SGD's settings, without dampening and nesterov.
    """

    def __init__(self, base: torch.optim.SGD, rho: float) -> None:
        self.rho, self.settings = rho, base.param_groups[0]
        self.params: list[Tensor] = self.settings["params"]
        self.m = [base.state[p]["momentum_buffer"] for p in self.params]

    @torch.no_grad()
    def first_step(self) -> None:
        self.held = take_gradients(self.params)

    @torch.no_grad()
    def second_step(self) -> None:
        self.saved = take_gradients(self.params)
        _compiled_perturb(self.params, self.saved, self.rho)

    @torch.no_grad()
    def third_step(self) -> None:
        g_p = take_gradients(self.params)
        s = self.settings
        _compiled_update(
            self.params, self.saved, self.held, g_p, self.m,
            s["lr"], s["momentum"], s["weight_decay"],
        )  # fmt: skip
        self.held = self.saved = None


def _perturb(theta: Sequence[Tensor], g_t: Sequence[Tensor], rho: float) -> None:
    norm = torch.stack([g.square().sum() for g in g_t]).sum().sqrt()
    scale = rho / (norm + 1e-16)
    for t, g in zip(theta, g_t):
        saved = t.clone()
        t.add_(scale * g)
        g.copy_(saved)


def _update(theta, saved, g_h, g_p, m, lr: float, momentum: float, weight_decay: float) -> None:
    for t, start, h, p, velocity in zip(theta, saved, g_h, g_p, m):
        velocity.mul_(momentum).add_(h + p + weight_decay * start)
        t.copy_(start - lr * velocity)


_compiled_perturb = torch.compile(_perturb, fullgraph=True, dynamic=False)
_compiled_update = torch.compile(_update, fullgraph=True, dynamic=False)


def take_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    gradients = [p.grad for p in params]
    for p in params:
        p.grad = None
    return gradients  # type: ignore[return-value]


# ---------------------------------------------------------------- SAM, SGD


class Davda54:
    """SAM in the manner of the much used davda54/sam: old weights kept aside, then put back.

    bytes: 13n moved: clone 2, norm 1, scaling 2, theta + epsilon 3, SGD(fused=True) 5.
    """

    def __init__(self, base: torch.optim.Optimizer, rho: float) -> None:
        self.base, self.rho = base, rho
        self.params: list[Tensor] = [p for group in base.param_groups for p in group["params"]]

    @torch.no_grad()
    def second_step(self) -> None:
        norm = torch.norm(torch.stack([p.grad.norm() for p in self.params]))  # type: ignore
        scale = self.rho / (norm + 1e-12)
        for p in self.params:
            self.base.state[p]["old_p"] = p.detach().clone()
            p.add_(p.grad * scale)
        self.base.zero_grad()

    @torch.no_grad()
    def third_step(self) -> None:
        for p in self.params:
            p.data = self.base.state[p].pop("old_p")
        self.base.step()
        self.base.zero_grad()


class PytorchOptimizer:
    """The SAM of the package pytorch_optimizer (extra `bench`).

    bytes: 17n moved: norm 1, clone 2, scaling 4, theta + epsilon 3, restore 2, SGD 5.
    """

    def __init__(self, base: torch.optim.SGD, rho: float) -> None:
        import pytorch_optimizer

        s = base.param_groups[0]
        self.sam = pytorch_optimizer.SAM(
            s["params"], torch.optim.SGD, rho=rho, lr=s["lr"], momentum=s["momentum"],
            weight_decay=s["weight_decay"], fused=s["fused"],
        )  # fmt: skip
        for p in s["params"]:
            self.sam.base_optimizer.state[p].update(base.state[p])

    def second_step(self) -> None:
        self.sam.first_step(zero_grad=True)

    def third_step(self) -> None:
        self.sam.second_step(zero_grad=True)


class PlainSGD:
    """bytes: 5n moved by SGD(fused=True): the price of no sharpness."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base

    def third_step(self) -> None:
        self.base.step()
        self.base.zero_grad()


class OwnStep(torch.optim.AdamW):
    """AdamW by its own step(), on the gradient that ImbSAM merged for it: as every other base."""


# ---------------------------------------------------------------- who takes part


def imbsam_contenders(tensors: int) -> dict[str, Contender]:
    """Every contestant that can take an ImbSAM step on that many tensors, ours first."""

    def eager(base: torch.optim.SGD, _: Workspace) -> EagerForeach:
        return EagerForeach(base, RHO)

    def eager_host(base: torch.optim.SGD, _: Workspace) -> EagerForeach:
        return EagerForeach(base, RHO, scale_on_host=True)

    found = {
        ours(): imbsam(backend_name("cpu"), IMBSAM.moves),
        AUTHORS: authors(),
        AUTHORS_FOREACH: authors(foreach=True),
        AUTHORS_FUSED: authors(fused=True),
        EAGER: Contender(eager, 17, fused=True),
        EAGER_HOST: Contender(eager_host, 15, fused=True),
    }
    if tensors <= MOST_COMPILED_TENSORS:
        found[COMPILED] = Contender(lambda base, _: Compiled(base, RHO), 11)
    return found


def sam_contenders() -> dict[str, Contender]:
    found = {
        ours(): imbsam(backend_name("cpu"), SAM.moves),
        DAVDA: Contender(lambda base, _: Davda54(base, RHO), 13, fused=True),
    }
    if importlib.util.find_spec("pytorch_optimizer") is None:
        print(f"left out: {PYTORCH_OPTIMIZER}, not installed (extra `bench`)")
    else:
        found[PYTORCH_OPTIMIZER] = Contender(
            lambda base, _: PytorchOptimizer(base, RHO), 17, fused=True
        )
    return found


def sgd_contenders() -> dict[str, Contender]:
    return {
        ours(): imbsam(backend_name("cpu"), SGD.moves),
        PLAIN_SGD: Contender(lambda base, _: PlainSGD(base), 5, fused=True),
    }


def adamw_contenders() -> dict[str, Contender]:
    """ImbSAM steps around AdamW, ours first.

    bytes: merge_ moves 5n, what the authors do before their base's step 16n. AdamW(fused=True)
    moves 7n: it reads theta, g, m and v and writes theta, m and v. foreach and the loop over
    tensors go operation by operation, 20n: decay 2, m 3, v 2 + 3, root 2, its bias correction 2,
    eps 2, update 4.
    """
    adamw, fewest = torch.optim.AdamW, ADAMW.moves
    ours_ = imbsam(backend_name("cpu"))
    theirs = authors()
    return {
        ours(): ours_._replace(moves=fewest, adamw=adamw),
        MERGED_FUSED: ours_._replace(moves=5 + 5 + 7, fused=True, adamw=OwnStep),
        MERGED_FOREACH: ours_._replace(moves=5 + 5 + 20, foreach=True, adamw=OwnStep),
        AUTHORS_ADAMW: theirs._replace(moves=16 + 20, adamw=adamw),
        AUTHORS_ADAMW_FUSED: theirs._replace(moves=16 + 7, fused=True, adamw=adamw),
    }


# ---------------------------------------------------------------- the loss


def compiled_row_weights(split: ClassSplit, logits: Tensor, targets: Tensor) -> Any:
    """`RowWeights` compiled for batches like this one, and for two backward passes."""
    criterion = torch.compile(RowWeights(split), fullgraph=True, dynamic=False)
    with torch._functorch.config.patch(donated_buffer=False):
        loss = criterion(logits, targets)
        torch.autograd.grad(loss.head, logits, retain_graph=True)
        torch.autograd.grad(loss.tail, logits)
    return criterion

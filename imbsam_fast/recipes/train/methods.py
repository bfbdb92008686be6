"""The optimizers that recipes compare, as one training step each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...losses import SplitCrossEntropy, split_loss
from ...optim import ImbSAM
from ...split import ClassSplit
from ...training.cuda_graph import GraphedSteps, constants_of
from ...training.plans import StepResult
from ...training.train_step import TrainStep
from ..settings.config import PERTURBING, RunConfig
from .losses import row_losses
from .schedule import place_lr


class StepOptions(NamedTuple):
    """What a training step runs in."""

    autocast: AbstractContextManager | None = None
    grad_scaler: torch.amp.GradScaler | None = None


PLAIN_OPTIONS = StepOptions()


class Trainer(NamedTuple):
    """A model's optimizer and one step of it, `step(images, targets)`."""

    optimizer: torch.optim.Optimizer
    step: Callable[[Tensor, Tensor], StepResult]


def sharpness_split(config: RunConfig, counts: Sequence[int]) -> ClassSplit:
    """The class weights `plain` and `sharp` of `config.optimizer`.

    SAM with a tail weight r is the paper's re-weighted SAM (Table 3): sharp is 1 for head and r
    for tail classes.
    """
    split = config.split(counts)
    r = config.tail_weight
    if config.optimizer == "focal-sam":
        return ClassSplit.focal(counts, config.gamma, config.lam)
    if config.optimizer == "imbsam":
        return ClassSplit(split.plain, r * split.sharp, split.counts)
    if config.optimizer == "sam":
        weights = split.plain + r * split.sharp
        return ClassSplit(torch.zeros_like(weights), weights, split.counts)
    weights = split.plain + (r if config.optimizer == "sgd-weighted" else 1.0) * split.sharp
    return ClassSplit(weights, torch.zeros_like(weights), split.counts)


def make_trainer(
    model: nn.Module,
    config: RunConfig,
    counts: Sequence[int],
    class_weight: Tensor | None = None,
    options: StepOptions = PLAIN_OPTIONS,
) -> Trainer:
    """The step of `config.optimizer`. SGD is a plain PyTorch loop; only its graphs are ours.

    Only trainable parameters are trained. `class_weight`, (K,), is a factor on every row's loss,
    as for a class-balanced loss; no loss but cross-entropy has one.
    """
    sgd = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        config.lr,
        config.momentum,
        weight_decay=config.weight_decay,
        fused=True if config.cuda_graph else None,  # which reads its rate on the device
    )
    device = torch.device(config.device)
    if config.cuda_graph:
        place_lr(sgd, device)
    split = sharpness_split(config, counts)
    if config.optimizer not in PERTURBING:
        weights = split.plain if class_weight is None else split.plain * class_weight.cpu()
        weight = None if (weights == 1).all() else weights.float().to(config.device)
        loss = _mean_loss(config, counts, weight)
        plain = _plain_step(model, sgd, loss, options)
        if config.cuda_graph:
            known = partial(constants_of, model, sgd, options.grad_scaler)
            return Trainer(sgd, GraphedSteps(plain, device, known))
        return Trainer(sgd, plain)
    # On the device: a graph cannot copy its class weights there.
    criterion: nn.Module = SplitCrossEntropy(split, class_weight).to(config.device)
    if config.loss != "ce":
        criterion = split_loss(row_losses(config, counts), split)
    plan = config.plan
    if config.cuda_graph and plan == "auto":  # which chooses by the batch, as no graph can
        plan = "joint"
    optimizer = ImbSAM(sgd, config.rho)
    step = TrainStep(
        model,
        criterion,
        optimizer,
        plan,
        config.batch_norm,
        autocast=options.autocast,
        grad_scaler=options.grad_scaler,
        sample=config.sample,
        sample_seed=config.seed,
        perturb_every=config.perturb_every,
        cuda_graph=config.cuda_graph,
    )
    return Trainer(optimizer, step)


def make_momentum(sgd: torch.optim.SGD) -> None:
    """Zeros where a fused SGD has no momentum yet, with which its first step is the same.

    torch's own is not initialised where a gradient scaler skips the first step.
    """
    for group in sgd.param_groups:
        if not (group["fused"] and group["momentum"]):
            continue
        for p in group["params"]:
            if sgd.state[p].get("momentum_buffer") is None:
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _mean_loss(
    config: RunConfig, counts: Sequence[int], class_weight: Tensor | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Logits (N, K) and labels (N,) to the mean loss; `class_weight` (K,) is a row's factor."""
    if config.loss == "ce" and class_weight is None:
        return F.cross_entropy
    rows = row_losses(config, counts)
    if class_weight is None:
        return lambda logits, targets: rows(logits, targets).mean()
    # Over the batch size, not over the sum of weights, as ImbSAM divides.
    return lambda logits, targets: (class_weight[targets] * rows(logits, targets)).mean()


def _plain_step(
    model: nn.Module,
    sgd: torch.optim.SGD,
    mean_loss: Callable[[Tensor, Tensor], Tensor],
    options: StepOptions,
) -> Callable[[Tensor, Tensor], StepResult]:
    autocast = options.autocast or nullcontext()
    scaler = options.grad_scaler or torch.amp.GradScaler(enabled=False)

    def step(images: Tensor, targets: Tensor) -> StepResult:
        make_momentum(sgd)
        with autocast:
            logits = model(images)
            loss = mean_loss(logits, targets.to(images.device, non_blocking=True))
        scaler.scale(loss).backward()
        scaler.step(sgd)
        scaler.update()
        sgd.zero_grad()
        loss = loss.detach()
        return StepResult(loss, head=loss, tail=torch.zeros_like(loss), logits=logits.detach())

    return step

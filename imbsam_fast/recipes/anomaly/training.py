"""What the detectors share in training: base optimizers and the step of a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...losses import split_loss
from ...optim import ImbSAM
from ...split import ClassSplit
from ...training.train_step import TrainStep
from .losses import PerSampleLoss

BASES = ("sgd", "adam", "rmsprop")
KERAS_RHO, KERAS_EPSILON = 0.9, 1e-7
PARALLEL_FROM = 2**15  # numbers in a tensor from which torch uses another thread

# (features, labels) -> the loss before the step, ()
Step = Callable[[Tensor, Tensor], Tensor]


class Method(NamedTuple):
    """How a network is trained, with any loss."""

    optimizer: str  # "sgd", "sam" or "imbsam"
    base: str  # one of BASES
    lr: float
    momentum: float  # of the base "sgd"
    rho: float
    tail_weight: float  # factor on the anomalies' loss, for SGD too; SAM's is 1
    plan: str  # of TrainStep


def make_base(method: Method, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
    """The base optimizer over parameter groups that carry their own weight decay.

    RMSprop has Keras's constants, which are not torch's, and as Keras up to 2.10 adds epsilon to
    the root of the mean square; Keras since 2.11 adds it to the mean square itself.
    """
    groups = list(groups)
    if method.base == "sgd":
        return torch.optim.SGD(groups, method.lr, method.momentum)
    if method.base == "adam":
        return torch.optim.Adam(groups, method.lr)
    return torch.optim.RMSprop(groups, method.lr, KERAS_RHO, KERAS_EPSILON)


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Inside the block, numbers below float32's 1.2e-38 are zero where this thread computes.

    Some processors take several times as long for them, and weight decay under RMSprop takes the
    weights of units that are never active that low. The mode is a thread's: torch's other threads
    stay as they are.
    """
    # A thread takes over the mode of the one that starts it, and would keep it after the block.
    torch.ones(torch.get_num_threads() * 2 * PARALLEL_FROM)
    smallest = torch.full((1,), torch.finfo(torch.float32).tiny)
    before = not (smallest / 2).any()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def anomalies_are_tail() -> ClassSplit:
    """Class 0, unlabelled rows, is head; class 1, labelled anomalies, is tail."""
    return ClassSplit(plain=torch.tensor([1.0, 0.0]), sharp=torch.tensor([0.0, 1.0]))


def make_step(
    method: Method, network: nn.Module, loss: PerSampleLoss, base: torch.optim.Optimizer
) -> Step:
    """The training step of `method`. With the optimizer "sgd" it is the base's own step."""
    if method.optimizer == "sam":
        criterion = split_loss(loss, ClassSplit.all_tail())
    else:
        criterion = split_loss(loss, anomalies_are_tail(), method.tail_weight)
    if method.optimizer == "sgd":
        return _plain_step(network, criterion, base)
    step = TrainStep(network, criterion, ImbSAM(base, method.rho), method.plan)
    return lambda features, labels: step(features, labels).loss


def _plain_step(network: nn.Module, criterion: nn.Module, base: torch.optim.Optimizer) -> Step:
    def step(features: Tensor, labels: Tensor) -> Tensor:
        loss = criterion(network(features), labels).total
        base.zero_grad()
        loss.backward()
        base.step()
        return loss.detach()

    return step


def shuffled_batches(rows: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """Row numbers of one epoch in random order, `size` at a time.

    A rest of one row, or of fewer than size / 4, joins the batch before it. BatchNorm cannot
    normalise one row, and the statistics of a few are noise that the epoch would end with.
    """
    batches = list(torch.randperm(rows, generator=generator).split(size))
    if len(batches) > 1 and len(batches[-1]) < max(2, size // 4):
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def balanced_batches(
    labels: Tensor, size: int, count: int, generator: torch.Generator
) -> list[Tensor]:
    """`count` batches of row numbers, drawn with replacement, unlabelled and anomaly in turn."""
    unlabelled, anomalies = ((labels == k).nonzero().squeeze(1) for k in (0, 1))

    def drawn(rows: Tensor, number: int) -> Tensor:
        return rows[torch.randint(len(rows), (count, number), generator=generator)]

    batches = torch.empty(count, size, dtype=torch.int64)
    batches[:, ::2] = drawn(unlabelled, (size + 1) // 2)
    batches[:, 1::2] = drawn(anomalies, size // 2)
    return list(batches)

"""The contestants of `imbsam-fast bench`: parameter shapes, optimizer operations, losses.

What returns operations also makes their data, before `bench_measure.measure` starts a clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import native, ops, peers
from .bench import Report
from .bench_measure import COPY, Contestant, Operation, Stopwatch
from .dispatch import backend_name, use_backend
from .losses import SplitCrossEntropy, SplitLoss
from .optim import ImbSAM
from .split import ClassSplit

Shape = tuple[int, ...]

TAIL_FRACTION = 0.43  # of the rows of an iNaturalist 2018 batch, eta = 100
STEP = "ImbSAM optimizer step"
AUTHORS = "authors' sequence, SGD"
AUTHORS_FUSED = "authors' sequence, SGD(fused=True)"
LR, MOMENTUM, WEIGHT_DECAY, RHO = 0.1, 0.9, 5e-4, 0.05


def ours() -> str:
    """The name of the contestant that runs the backend chosen for the CPU."""
    return f"imbsam-fast, {backend_name('cpu')}"


def backends() -> dict[str, str]:
    """Contestant name -> backend, the chosen one first."""
    return {f"imbsam-fast, {b}": b for b in (backend_name("cpu"), "reference")}


# ---------------------------------------------------------------- parameter shapes


def resnet50_shapes(num_classes: int = 8142) -> list[Shape]:
    """The parameters of ResNet-50 in their order: 161 tensors, 40.2M elements for 8,142 classes."""
    shapes = _conv_and_norm(64, 3, 7)
    width_in = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += _conv_and_norm(width, width_in, 1)
            shapes += _conv_and_norm(width, width, 3)
            shapes += _conv_and_norm(4 * width, width, 1)
            if block == 0:
                shapes += _conv_and_norm(4 * width, width_in, 1)
            width_in = 4 * width
    return [*shapes, (num_classes, width_in), (num_classes,)]


def resnet32_shapes(num_classes: int = 100) -> list[Shape]:
    """The parameters of the CIFAR ResNet-32: 95 tensors, 0.5M elements."""
    shapes = _conv_and_norm(16, 3, 3)
    width_in = 16
    for width in (16, 32, 64):
        for _ in range(5):
            shapes += _conv_and_norm(width, width_in, 3) + _conv_and_norm(width, width, 3)
            width_in = width
    return [*shapes, (num_classes, width_in), (num_classes,)]


def _conv_and_norm(out: int, width_in: int, kernel: int) -> list[Shape]:
    return [(out, width_in, kernel, kernel), (out,), (out,)]


def elements(shapes: Sequence[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def describe(shapes: Sequence[Shape]) -> str:
    return f"{len(shapes)} tensors, {elements(shapes) / 1e6:.1f}M"


# ---------------------------------------------------------------- the machine


def copy_operations(size: int = 160_000_000) -> list[Operation]:
    """The memory bandwidth of this machine, on more bytes than its caches hold.

    bytes: size read, size written
    """
    source, destination = (torch.full((size // 4,), x) for x in (1.0, 2.0))
    threads = torch.get_num_threads()

    def streaming(watch: Stopwatch) -> None:
        with watch.lap("copy"):
            native._C.stream_copy(destination.data_ptr(), source.data_ptr(), size, threads)

    def torch_copy(watch: Stopwatch) -> None:
        with watch.lap("copy"):
            destination.copy_(source)

    contestants: dict[str, Contestant] = {"past the caches": streaming, "torch copy_": torch_copy}
    if native._C is None:
        del contestants["past the caches"]
    return [Operation(COPY, f"{size / 1e6:.0f} MB", contestants, bytes=2 * size)]


# ---------------------------------------------------------------- the optimizer


def phase_operations(shapes: Sequence[Shape], calls: int = 1) -> list[Operation]:
    """The operators of one step on their own, gradients kept: the kernels and their checks.

    bytes: squared_norm 1n read; perturb_ 2n read, 2n written; sgd_update_ 4n read, 2n written
    """
    n = 4 * elements(shapes)
    theta, saved, g_t, g_h, g_p, m = (_random(shapes, x) for x in (0.02, 0.02, *[1e-3] * 4))
    partials = ops.squared_norm(g_t)
    lr = torch.tensor(LR, dtype=torch.float64)

    def squared_norm() -> None:
        ops.squared_norm(g_t)

    def perturb_() -> None:
        ops.perturb_(theta, g_t, partials, RHO)

    def sgd_update_() -> None:
        ops.sgd_update_(theta, saved, g_h, g_p, m, lr, MOMENTUM, 0.0, WEIGHT_DECAY, False, False)

    def on_backend(call: Callable[[], None], backend: str) -> Contestant:
        def contestant(watch: Stopwatch) -> None:
            with use_backend(backend), watch.lap("call"):
                for _ in range(calls):
                    call()

        return contestant

    return [
        Operation(
            call.__name__,
            describe(shapes),
            {name: on_backend(call, backend) for name, backend in backends().items()},
            bytes=count * n,
            calls=calls,
        )
        for call, count in ((squared_norm, 1), (perturb_, 4), (sgd_update_, 6))
    ]


def step_operation(shapes: Sequence[Shape], calls: int = 1) -> Operation:
    """The three calls of one step, with gradients freed as in training.

    Before each call, and not timed, the gradients are made as a backward pass makes them: new
    tensors in `p.grad`, the last parameter's first. Nothing else refers to them, so that every
    contestant frees 3n inside its own calls.

    bytes: 11n, whoever does it: squared_norm 1n, perturb_ 4n, sgd_update_ 6n. The authors'
    sequence moves 21n with the fused SGD and 27n with the default one.
    """
    params = [p.requires_grad_() for p in _random(shapes, 0.02)]
    gradients = _random(shapes, 1e-3)

    def taking(optimizer: ImbSAM | peers.AuthorsSequence, backend: str) -> Contestant:
        def contestant(watch: Stopwatch) -> None:
            for _ in range(calls):
                for call in (optimizer.first_step, optimizer.second_step, optimizer.third_step):
                    for p, g in zip(reversed(params), reversed(gradients)):
                        p.grad = g.clone()
                    with use_backend(backend), watch.lap(call.__name__):
                        call()

        return contestant

    contestants = {name: taking(ImbSAM(sgd(params), RHO), b) for name, b in backends().items()}
    for name, base in ((AUTHORS, sgd(params)), (AUTHORS_FUSED, sgd(params, fused=True))):
        contestants[name] = taking(peers.AuthorsSequence(base, RHO), backend_name("cpu"))
    return Operation(STEP, describe(shapes), contestants, 11 * 4 * elements(shapes), calls)


def sgd(params: Sequence[Tensor], fused: bool | None = None) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=fused)


def _random(shapes: Sequence[Shape], scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.empty(shape).normal_(0, scale, generator=generator) for shape in shapes]


# ---------------------------------------------------------------- the loss


def long_tail_batch(
    rows: int, classes: int, tail_fraction: float = TAIL_FRACTION
) -> tuple[ClassSplit, Tensor]:
    """A split with every second class tail, and int64 targets (rows,), a share of them tail."""
    counts = torch.full((classes,), 1000)
    counts[1::2] = 10
    targets = torch.randint(0, classes // 2, (rows,)) * 2
    targets[torch.randperm(rows)[: round(tail_fraction * rows)]] += 1
    return ClassSplit.from_counts(counts), targets


def loss_operations(rows: int, classes: int, total_bytes: int = 64_000_000) -> list[Operation]:
    """The two losses, alone and with both gradients for the logits, on rotated logits.

    Forward and backwards is what a joint plan runs: one forward, the gradient of the head loss
    (graph kept), the gradient of the tail loss.

    bytes: forward NK read; with gradients NK more read (each row has weight in one part only)
    and 2NK written
    """
    split, targets = long_tail_batch(rows, classes)
    size = 4 * rows * classes
    batches = [
        torch.randn(rows, classes, requires_grad=True)
        for _ in range(min(max(2, math.ceil(total_bytes / size)), 256))
    ]

    def forward(criterion: Callable[..., SplitLoss], logits: Tensor) -> None:
        criterion(logits, targets)

    def with_gradients(criterion: Callable[..., SplitLoss], logits: Tensor) -> None:
        loss = criterion(logits, targets)
        torch.autograd.grad(loss.head, logits, retain_graph=True)
        torch.autograd.grad(loss.tail, logits)

    def taking(call: Callable, criterion: Callable[..., SplitLoss], backend: str) -> Contestant:
        def contestant(watch: Stopwatch) -> None:
            with use_backend(backend), watch.lap("call"):
                for logits in batches:
                    call(criterion, logits)

        return contestant

    criteria: dict[str, tuple[Callable[..., SplitLoss], str]] = {
        name: (SplitCrossEntropy(split), b) for name, b in backends().items()
    }
    criteria["authors' boolean masks"] = (peers.BooleanMasking(split), "reference")
    criteria["cross_entropy, row weights"] = (peers.RowWeights(split), "reference")
    return [
        Operation(
            name,
            f"{rows} x {classes}",
            {who: taking(call, *criterion) for who, criterion in criteria.items()},
            bytes=count * size,
            calls=len(batches),
        )
        for name, call, count in (
            ("loss forward", forward, 1),
            ("loss forward, head and tail backward", with_gradients, 4),
        )
    ]


# ---------------------------------------------------------------- the command


def default_operations(quick: bool) -> list[Operation]:
    shapes = resnet32_shapes() if quick else resnet50_shapes()
    return [
        *copy_operations(1_000_000 if quick else 160_000_000),
        *phase_operations(shapes),
        step_operation(shapes),
        *(loss_operations(8, 32, 4096) if quick else loss_operations(512, 8142)),
    ]


def step_summary(report: Report) -> list[str]:
    """One line for every size at which the optimizer step was measured."""
    lines = []
    for t in report.timings:
        if (t.operation, t.contestant) != (STEP, ours()):
            continue
        fused, default = (report.ms(STEP, c, t.size) / t.ms for c in (AUTHORS_FUSED, AUTHORS))
        lines.append(
            f"{STEP} ({t.size}): {fused:.2f} times faster than the authors' sequence with "
            f"SGD(fused=True), {default:.2f} times with default SGD, at "
            f"{t.percent_of_copy or math.nan:.0f} % of the streaming copy"
        )
    return lines


def loss_summary(report: Report) -> list[str]:
    lines = []
    for t in report.timings:
        if t.operation.startswith("loss") and t.contestant == ours():
            masks, weights = (
                report.ms(t.operation, c, t.size) / t.ms
                for c in ("authors' boolean masks", "cross_entropy, row weights")
            )
            lines.append(
                f"{t.operation} ({t.size}): {masks:.2f} times faster than the authors' boolean "
                f"masks, {weights:.2f} times than cross_entropy with row weights"
            )
    return lines


def default_summary(report: Report) -> list[str]:
    return step_summary(report) + loss_summary(report)

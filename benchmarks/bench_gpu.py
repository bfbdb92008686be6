"""The optimizer phases and the loss on an NVIDIA GPU, beside their peers and the copy bandwidth.

python -m benchmarks.bench_gpu --json FILE [--rounds N]

Times are of the device, between CUDA events, so that waiting for the host counts where a
contestant is launched slower than it runs. In every round each contestant runs once, in a new
order; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from imbsam_fast import SplitCrossEntropy, bench_cases, bench_shapes, dispatch, ops, peers
from imbsam_fast.env import environment

LR, MOMENTUM, WEIGHT_DECAY, RHO = 0.1, 0.9, 5e-4, 0.05
WARM_UP = 3
TRITON = "imbsam-fast, triton"
Call = Callable[[], object]


@dataclass
class Phase:
    """A call that is timed, and what comes before it and is not."""

    call: Call
    prepare: Call = lambda: None


@dataclass
class Contest:
    """Contestants that do the same, each in one or more phases."""

    name: str
    bytes: int  # that have to move, whoever moves them
    contestants: dict[str, list[Phase]]


@dataclass
class Result:
    contest: str
    contestant: str
    ms: float  # median
    launches: int  # kernels and copies on the device
    gb_per_s: float
    percent_of_copy: float
    samples_ms: list[float] = field(repr=False)


# ---------------------------------------------------------------- the optimizer


class Optimizer:
    """One step on gradients that stay; `n` bytes in all parameters."""

    def __init__(self, shapes: list[tuple[int, ...]], device: str) -> None:
        def random_list(scale: float) -> list[Tensor]:
            return [scale * torch.randn(shape, device=device) for shape in shapes]

        self.theta, self.m = random_list(0.02), random_list(1e-3)
        self.g_h, self.g_t, self.g_p = (random_list(1e-3) for _ in range(3))
        self.lr = torch.tensor(LR, device=device)
        self.bytes = sum(t.numel() * t.element_size() for t in self.theta)

    def fused_kernels(self) -> None:
        """bytes: 11n; g_t becomes the saved weights, as in training."""
        partials = ops.squared_norm(self.g_t)
        ops.perturb_(self.theta, self.g_t, partials, RHO)
        ops.sgd_update_(
            self.theta, self.g_t, self.g_h, self.g_p, self.m, self.lr, MOMENTUM, 0.0,
            WEIGHT_DECAY, False, False,
        )  # fmt: skip

    def foreach(self) -> None:
        """The best of eager PyTorch: 17n."""
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.g_t)))
        torch._foreach_mul_(self.g_t, RHO / (norm + 1e-16))
        torch._foreach_add_(self.theta, self.g_t)
        torch._foreach_sub_(self.theta, self.g_t)
        torch._foreach_add_(self.g_p, self.g_h)
        torch._fused_sgd_(
            self.theta, self.g_p, self.m, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM, lr=LR,
            dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip

    def perturb_for_compile(self) -> None:
        """The formulas a tensor at a time, in place, for Inductor to fuse."""
        norm = torch.stack([g.square().sum() for g in self.g_t]).sum().sqrt()
        scale = RHO / (norm + 1e-16)
        for t, g in zip(self.theta, self.g_t):
            saved = t.clone()
            t.add_(scale * g)
            g.copy_(saved)

    def update_for_compile(self) -> None:
        for t, saved, h, p, m in zip(self.theta, self.g_t, self.g_h, self.g_p, self.m):
            m.mul_(MOMENTUM).add_(h + p + WEIGHT_DECAY * saved)
            t.copy_(saved - LR * m)

    def authors(self, fused: bool) -> list[Phase]:
        """Their three calls, each on gradients that `zero_grad` took from the one before."""
        params = [t.clone().requires_grad_() for t in self.theta]
        base = torch.optim.SGD(
            params, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=fused
        )
        optimizer = peers.AuthorsSequence(base, RHO)

        def gradients() -> None:
            for p, g in zip(params, self.g_h):
                p.grad = g

        calls = (optimizer.first_step, optimizer.second_step, optimizer.third_step)
        return [Phase(call, gradients) for call in calls]


def on_backend(call: Call, backend: str) -> Call:
    def run() -> None:
        with dispatch.use_backend(backend):
            call()

    return run


def captured(call: Call) -> Call:
    """`call` as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def compiled(call: Call, static: list[Tensor]) -> Call:
    """`call` by Inductor, in a CUDA graph of its own making."""
    for tensor in static:
        torch._dynamo.mark_static_address(tensor)
    return torch.compile(call, mode="reduce-overhead")


def optimizer_contest(shapes: list[tuple[int, ...]], device: str, graphs: bool = True) -> Contest:
    """`graphs`: with the contestants that only a GPU can run."""
    x = Optimizer(shapes, device)
    contestants = {
        "imbsam-fast": [Phase(x.fused_kernels)],
        "authors' sequence": x.authors(fused=False),
        "authors' sequence, fused SGD": x.authors(fused=True),
        "foreach and fused SGD": [Phase(x.foreach)],
    }
    if dispatch.available(device)["triton"] is None:
        contestants[TRITON] = [Phase(on_backend(x.fused_kernels, "triton"))]
    if graphs:
        contestants["imbsam-fast, captured"] = [Phase(captured(x.fused_kernels))]
        contestants["foreach and fused SGD, captured"] = [Phase(captured(x.foreach))]
        y = Optimizer(shapes, device)
        lists = [*y.theta, *y.g_h, *y.g_t, *y.g_p, *y.m]
        # Two calls: a forward pass needs the perturbed weights that lie between them.
        contestants["compiled, reduce-overhead"] = [
            Phase(compiled(call, lists)) for call in (y.perturb_for_compile, y.update_for_compile)
        ]
        if find_spec("amp_C") is not None:
            contestants["apex"] = [Phase(apex_step(Optimizer(shapes, device)))]
    return Contest(f"optimizer, {bench_shapes.describe(shapes)}", 11 * x.bytes, contestants)


def apex_step(x: Optimizer) -> Call:
    """The phases from apex's multi-tensor kernels, where it is installed."""
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier as apply

    overflow = torch.zeros(1, dtype=torch.int32, device=x.lr.device)

    def step() -> None:
        norm, _ = apply(amp_C.multi_tensor_l2norm, overflow, [x.g_t], False)
        torch._foreach_mul_(x.g_t, RHO / (norm + 1e-16))
        apply(amp_C.multi_tensor_axpby, overflow, [x.theta, x.g_t, x.theta], 1.0, 1.0, -1)
        apply(amp_C.multi_tensor_axpby, overflow, [x.theta, x.g_t, x.theta], 1.0, -1.0, -1)
        apply(amp_C.multi_tensor_axpby, overflow, [x.g_h, x.g_p, x.g_p], 1.0, 1.0, -1)
        apply(
            amp_C.multi_tensor_sgd, overflow, [x.g_p, x.theta, x.m], WEIGHT_DECAY, MOMENTUM,
            0.0, LR, False, False, False, 1.0,
        )  # fmt: skip

    return step


# ---------------------------------------------------------------- the loss


def loss_contest(
    rows: int, classes: int, dtype: torch.dtype, device: str, graphs: bool = True
) -> Contest:
    """bytes: one forward and the backwards of both parts, each row having weight in one of them:
    2 reads of the logits for the forward and the gradients, 2 writes.
    """
    split, targets = bench_cases.long_tail_batch(rows, classes)
    targets = targets.to(device)
    logits = torch.randn(rows, classes, device=device, dtype=dtype).requires_grad_()
    # Plain modules hold their class weights as attributes: on the device before the clock runs.
    masks, weights = peers.BooleanMasking(split), peers.RowWeights(split)
    masks.is_tail = masks.is_tail.to(device)
    weights.plain, weights.sharp = weights.plain.to(device), weights.sharp.to(device)
    ours = SplitCrossEntropy(split).to(device)

    def both(criterion: Callable) -> list[Phase]:
        def run() -> None:
            loss = criterion(logits, targets)
            torch.autograd.grad(loss.head, logits, retain_graph=True)
            torch.autograd.grad(loss.tail, logits)

        return [Phase(run)]

    def one(criterion: Callable) -> list[Phase]:
        return [Phase(lambda: torch.autograd.grad(criterion(logits, targets), logits))]

    contestants = {
        "imbsam-fast": both(ours),
        "authors' boolean masks": both(masks),
        "cross_entropy, row weights": both(weights),
        "F.cross_entropy, one backward": one(F.cross_entropy),
    }
    if dispatch.available(device)["triton"] is None:
        contestants[TRITON] = [Phase(on_backend(phase.call, "triton")) for phase in both(ours)]
    if graphs and find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        contestants["Liger, one backward"] = one(LigerCrossEntropyLoss())
    bytes_ = 4 * logits.numel() * logits.element_size()
    return Contest(f"loss, {rows} x {classes}, {dtype}", bytes_, contestants)


# ---------------------------------------------------------------- timing


def device_ms(phases: list[Phase]) -> float:
    total = 0.0
    for phase in phases:
        phase.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        phase.call()
        end.record()
        torch.cuda.synchronize()
        total += start.elapsed_time(end)
    return total


def launches(phases: list[Phase]) -> int:
    """What the profiler sees on the device."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for phase in phases:
            phase.prepare()
            phase.call()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


def copy_gb_per_s(rounds: int, size: int = 2**29) -> float:
    """bytes: size read, size written"""
    source, destination = (torch.ones(size // 4, device="cuda") for _ in range(2))
    copy = [Phase(lambda: destination.copy_(source))]
    samples = [device_ms(copy) for _ in range(WARM_UP + rounds)]
    return 2 * size / statistics.median(samples[WARM_UP:]) / 1e6


def measure(contest: Contest, rounds: int, limit: float) -> Iterator[Result]:
    samples: dict[str, list[float]] = {name: [] for name in contest.contestants}
    order = random.Random(0)
    for number in range(-WARM_UP, rounds):
        for name in order.sample(list(samples), len(samples)):
            ms = device_ms(contest.contestants[name])
            if number >= 0:
                samples[name].append(ms)
    for name, phases in contest.contestants.items():
        ms = statistics.median(samples[name])
        rate = contest.bytes / ms / 1e6
        percent = 100 * rate / limit
        yield Result(contest.name, name, ms, launches(phases), rate, percent, samples[name])


def contests() -> Iterator[Contest]:
    for shapes in (bench_shapes.resnet32_shapes(), bench_shapes.resnet50_shapes()):
        yield optimizer_contest(shapes, "cuda")
    for rows, classes in ((512, 8142), (4096, 131_072)):
        for dtype in (torch.float32, torch.bfloat16):
            yield loss_contest(rows, classes, dtype, "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    if args.rounds < 1:
        raise SystemExit(f"--rounds is {args.rounds}, expected at least 1")
    reason = dispatch.available("cuda")["native"]
    if reason is not None:
        raise SystemExit(f"no GPU to measure on: {reason}")
    limit = copy_gb_per_s(args.rounds)
    print(f"device copy: {limit:.0f} GB/s")
    results: list[Result] = []
    for contest in contests():
        print(contest.name)
        for result in measure(contest, args.rounds, limit):
            results.append(result)
            print(
                f"  {result.contestant:34} {result.ms:9.4f} ms {result.launches:5} launches "
                f"{result.gb_per_s:7.0f} GB/s {result.percent_of_copy:5.1f} % of the copy"
            )
        torch.cuda.empty_cache()
    report = {
        "environment": environment(),
        "rounds": args.rounds,
        "copy_gb_per_s": limit,
        "results": [asdict(result) for result in results],
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

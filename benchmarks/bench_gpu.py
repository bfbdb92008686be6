"""The optimizer phases and the loss on an NVIDIA GPU, beside their peers and the copy bandwidth.

python -m benchmarks.bench_gpu --json FILE [--rounds N]
python -m benchmarks.bench_gpu --json FILE --dry-run
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_timing import WARM_UP, Call, Contest, Phase, run_script
from imbsam_fast import SplitCrossEntropy, ops
from imbsam_fast.bench import peers
from imbsam_fast.bench.cases import long_tail_batch
from imbsam_fast.bench.shapes import describe, resnet32_shapes, resnet50_shapes
from imbsam_fast.ops import dispatch

LR, MOMENTUM, WEIGHT_DECAY, RHO = 0.1, 0.9, 5e-4, 0.05
TRITON = "imbsam-fast, triton"


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


def captured(call: Call, device: str) -> Call:
    """`call` as one CUDA graph; on the CPU, which has none, as it is."""
    if device == "cpu":
        return call
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


def compiled(call: Call, static: list[Tensor], device: str) -> Call:
    """`call` by Inductor, in a CUDA graph of its own making; on the CPU it is traced alone."""
    for tensor in static:
        torch._dynamo.mark_static_address(tensor)
    if device == "cpu":
        return torch.compile(call, backend="aot_eager")
    return torch.compile(call, mode="reduce-overhead")


def optimizer_contest(shapes: list[tuple[int, ...]], device: str) -> Contest:
    x = Optimizer(shapes, device)
    contestants: dict[str, Callable[[], list[Phase]]] = {
        "imbsam-fast": lambda: [Phase(x.fused_kernels)],
        "authors' sequence": lambda: x.authors(fused=False),
        "authors' sequence, fused SGD": lambda: x.authors(fused=True),
        "foreach and fused SGD": lambda: [Phase(x.foreach)],
        "imbsam-fast, captured": lambda: [Phase(captured(x.fused_kernels, device))],
        "foreach and fused SGD, captured": lambda: [Phase(captured(x.foreach, device))],
        "compiled, reduce-overhead": lambda: compiled_phases(Optimizer(shapes, device), device),
    }
    if dispatch.available(device)["triton"] is None:
        contestants[TRITON] = lambda: [Phase(on_backend(x.fused_kernels, "triton"))]
    if device == "cuda" and find_spec("amp_C") is not None:
        contestants["apex"] = lambda: [Phase(apex_step(Optimizer(shapes, device)))]
    return Contest(contestants, bytes=11 * x.bytes)


def compiled_phases(x: Optimizer, device: str) -> list[Phase]:
    """Two calls: a forward pass needs the perturbed weights that lie between them."""
    lists = [*x.theta, *x.g_h, *x.g_t, *x.g_p, *x.m]
    calls = (x.perturb_for_compile, x.update_for_compile)
    return [Phase(compiled(call, lists, device)) for call in calls]


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


def loss_contest(rows: int, classes: int, dtype: torch.dtype, device: str) -> Contest:
    """bytes: one forward and the backwards of both parts, each row having weight in one of them:
    2 reads of the logits for the forward and the gradients, 2 writes.
    """
    split, targets = long_tail_batch(rows, classes)
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

    def liger() -> list[Phase]:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        return one(LigerCrossEntropyLoss())

    def ours_in_triton() -> list[Phase]:
        return [Phase(on_backend(phase.call, "triton")) for phase in both(ours)]

    contestants: dict[str, Callable[[], list[Phase]]] = {
        "imbsam-fast": lambda: both(ours),
        "authors' boolean masks": lambda: both(masks),
        "cross_entropy, row weights": lambda: both(weights),
        "F.cross_entropy, one backward": lambda: one(F.cross_entropy),
    }
    if dispatch.available(device)["triton"] is None:
        contestants[TRITON] = ours_in_triton
    if device == "cuda" and find_spec("liger_kernel") is not None:
        contestants["Liger, one backward"] = liger
    return Contest(contestants, bytes=4 * logits.numel() * logits.element_size())


def soft_loss_contest(rows: int, classes: int, dtype: torch.dtype, device: str) -> Contest:
    """Mixup with smoothed labels: every row has weight in both parts.

    bytes: a forward and two backwards, which read logits and q, and two gradients, written.
    """
    split, targets = long_tail_batch(rows, classes)
    one, two = F.one_hot(targets, classes), F.one_hot(targets.flip(0), classes)
    q = (0.9 * (0.7 * one + 0.3 * two) + 0.1 / classes).to(device)
    labels = q.to(dtype)
    logits = torch.randn(rows, classes, device=device, dtype=dtype).requires_grad_()
    ours = SplitCrossEntropy(split).to(device)

    def both() -> None:
        loss = ours(logits, q)
        torch.autograd.grad(loss.head, logits, retain_graph=True)
        torch.autograd.grad(loss.tail, logits)

    def one_backward() -> None:
        torch.autograd.grad(F.cross_entropy(logits, labels), logits)

    contestants: dict[str, Callable[[], list[Phase]]] = {
        "imbsam-fast": lambda: [Phase(both)],
        "its definition in torch": lambda: [Phase(on_backend(both, "reference"))],
        "F.cross_entropy, one backward": lambda: [Phase(one_backward)],
    }
    if dispatch.available(device)["triton"] is None:
        contestants[TRITON] = lambda: [Phase(on_backend(both, "triton"))]
    per_element = 5 * logits.element_size() + 3 * q.element_size()
    return Contest(contestants, bytes=per_element * logits.numel())


# ---------------------------------------------------------------- what runs


def contests(device: str) -> Iterator[tuple[str, Callable[[], Contest]]]:
    """On the CPU small ones: `bench_gpu --dry-run`."""
    on_gpu = device == "cuda"
    small = [(30, 4), (5,), (2, 3, 3)]
    networks = (resnet32_shapes(), resnet50_shapes())
    for shapes in networks if on_gpu else (small,):
        yield f"optimizer, {describe(shapes)}", partial(optimizer_contest, shapes, device)
    sizes = ((512, 8142), (4096, 131_072)) if on_gpu else ((8, 32),)
    for kind, make in (("loss", loss_contest), ("loss of distributions", soft_loss_contest)):
        for rows, classes in sizes if make is loss_contest else sizes[:1]:
            for dtype in (torch.float32, torch.bfloat16):
                name = f"{kind}, {rows} x {classes}, {dtype}"
                yield name, partial(make, rows, classes, dtype, device)


if __name__ == "__main__":
    sys.exit(run_script(__doc__.splitlines()[0], contests, rounds=50))

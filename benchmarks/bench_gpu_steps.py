"""Whole training steps of real networks on an NVIDIA GPU: images per second and peak memory.

    python -m benchmarks.bench_gpu_steps --json FILE [--rounds N]
    python -m benchmarks.bench_gpu_steps --json FILE --dry-run

Synthetic images, bfloat16 autocast, channels_last, 43 % tail rows as in a batch of iNaturalist
2018. The split plan takes part where it is exact. What a CUDA graph holds stays allocated, so
captured steps are a contest of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu_timing import Contest, Phase, run_script
from imbsam_fast import ClassSplit, ImbSAM, SplitCrossEntropy, TrainStep
from imbsam_fast.bench import peers
from imbsam_fast.bench.cases import TAIL_FRACTION, long_tail_batch
from imbsam_fast.training.cuda_graph import GraphedSteps

LR, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 5e-4
ROOMY = 100e9  # bytes of device memory from which ResNet-50 trains on 512 images

Batch = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor], object]


class Network(NamedTuple):
    name: str
    make: Callable[[], nn.Module]
    pixels: int  # height and width of an image
    classes: int
    rows: int  # in a batch
    split_is_exact: bool


def networks(device: str) -> Iterator[Network]:
    if device == "cpu":
        yield from small_networks()
        return
    import torchvision

    from imbsam_fast.recipes.models.cifar_resnet import CifarResNet

    rows = 512 if torch.cuda.get_device_properties(0).total_memory > ROOMY else 256
    imagenet = torchvision.models
    yield Network("ResNet-32", lambda: CifarResNet(32, 100), 32, 100, 128, False)
    yield Network("ResNet-50", lambda: imagenet.resnet50(num_classes=8142), 224, 8142, rows, False)
    yield Network(
        "ConvNeXt-T", lambda: imagenet.convnext_tiny(num_classes=8142), 224, 8142, rows, True
    )
    yield Network("ViT-B/16", lambda: imagenet.vit_b_16(num_classes=8142), 224, 8142, rows, True)


def small_networks() -> Iterator[Network]:
    """Of the same families, for a dry run."""
    from torchvision.models import ConvNeXt, ResNet, VisionTransformer
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.resnet import Bottleneck

    from imbsam_fast.recipes.models.cifar_resnet import CifarResNet

    blocks = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)]
    small: dict[str, tuple[Callable[[], nn.Module], bool]] = {
        "ResNet-8": (lambda: CifarResNet(8, 10), False),
        "small ResNet": (lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10), False),
        "small ConvNeXt": (lambda: ConvNeXt(blocks, num_classes=10), True),
        "small ViT": (lambda: VisionTransformer(32, 16, 1, 2, 32, 64, num_classes=10), True),
    }
    for name, (make, split_is_exact) in small.items():
        yield Network(name, make, 32, 10, 8, split_is_exact)


# ---------------------------------------------------------------- the steps


class Autocast(nn.Module):
    """`model` under bfloat16 autocast, for loops that know nothing of it.

    torch.compile would take a graph that it made for another contestant, with as many backwards as
    that one has; `contestant` is read in `forward`, so that each has graphs of its own.
    """

    def __init__(self, model: nn.Module, device: str, contestant: str) -> None:
        super().__init__()
        self.model, self.device, self.contestant = model, device, contestant

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.contestant != ""):
            return self.model(images).float()


def sgd(model: nn.Module, device: str) -> torch.optim.SGD:
    # As a tensor, which a CUDA graph can follow.
    lr = torch.tensor(LR, device=device)
    fused = device == "cuda"
    return torch.optim.SGD(model.parameters(), lr, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=fused)


class Steps:
    """Makes the contestants of one network, each with a copy of the model of its own."""

    def __init__(self, network: Network, device: str) -> None:
        self.network, self.device = network, device
        torch.manual_seed(0)
        self.split, self.targets = long_tail_batch(network.rows, network.classes, TAIL_FRACTION)
        images = torch.randn(network.rows, 3, network.pixels, network.pixels, device=device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.original = network.make().to(device, memory_format=torch.channels_last)

    def model(self, compiled: bool = False, contestant: str = "SGD") -> nn.Module:
        model = Autocast(deepcopy(self.original), self.device, contestant)
        if not compiled:
            return model
        backend = "inductor" if self.device == "cuda" else "aot_eager"  # a dry run only traces
        return torch.compile(model, backend=backend)  # type: ignore[return-value]

    def phases(self, step: Step) -> list[Phase]:
        return [Phase(lambda: step(self.images, self.targets))]

    def plain(self, compiled: bool = False, cuda_graph: bool = False) -> list[Phase]:
        model = self.model(compiled)
        targets = self.targets.to(self.device)
        step: Step = peers.plain_training_step(model, sgd(model, self.device))
        if cuda_graph:
            step = GraphedSteps(step, torch.device(self.device))
        return [Phase(lambda: step(self.images, targets))]

    def authors(self) -> list[Phase]:
        model = self.model()
        masks = peers.BooleanMasking(self.split)
        masks.is_tail = masks.is_tail.to(self.device)
        targets = self.targets.to(self.device)
        sequence = peers.AuthorsSequence(sgd(model, self.device))
        step = peers.authors_training_step(model, masks, sequence)
        return [Phase(lambda: step(self.images, targets))]

    def ours(
        self, plan: str, split: ClassSplit | None = None, compiled: bool = False, **options: object
    ) -> list[Phase]:
        model = self.model(compiled, f"{'SAM' if split else 'ImbSAM'} {plan}")
        criterion = SplitCrossEntropy(split or self.split).to(self.device)
        optimizer = ImbSAM(sgd(model, self.device))
        return self.phases(TrainStep(model, criterion, optimizer, plan, **options))  # type: ignore[arg-type]


# ---------------------------------------------------------------- contests


def eager(network: Network, device: str) -> Contest:
    make = Steps(network, device)
    contestants = {
        "SGD": make.plain,
        "SAM, TrainStep joint": partial(make.ours, "joint", ClassSplit.all_tail()),
        "authors' loop": make.authors,
        "ImbSAM, TrainStep joint": partial(make.ours, "joint"),
        "ImbSAM, TrainStep sampled 0.25": partial(make.ours, "sampled"),
    }
    if network.split_is_exact:
        contestants["ImbSAM, TrainStep split"] = partial(make.ours, "split")
    return Contest(contestants, images=network.rows)


def compiled(network: Network, device: str) -> Contest:
    torch._dynamo.reset()  # it makes no more than a few graphs of one forward
    make = Steps(network, device)
    ours = partial(make.ours, compiled=True)
    contestants = {
        "SGD": partial(make.plain, compiled=True),
        "SAM, TrainStep joint": partial(ours, "joint", ClassSplit.all_tail()),
        "ImbSAM, TrainStep joint": partial(ours, "joint"),
    }
    if network.split_is_exact:
        contestants["ImbSAM, TrainStep split"] = partial(ours, "split")
    return Contest(contestants, images=network.rows)


def captured(network: Network, device: str) -> Contest:
    """In a dry run the same step without a graph, which the CPU has not."""
    make, graphs = Steps(network, device), device == "cuda"
    ours = partial(make.ours, cuda_graph=graphs)
    contestants = {
        "SGD": partial(make.plain, cuda_graph=graphs),
        "ImbSAM, TrainStep joint": partial(ours, "joint"),
        "ImbSAM, TrainStep sampled 0.25": partial(ours, "sampled"),
    }
    if network.split_is_exact:
        contestants["ImbSAM, TrainStep split"] = partial(ours, "split")
    return Contest(contestants, images=network.rows)


KINDS = {"eager": eager, "CUDA graph": captured, "torch.compile": compiled}


def contests(device: str) -> Iterator[tuple[str, Callable[[], Contest]]]:
    for kind, make in KINDS.items():  # of all networks, before the next takes its time to compile
        for network in networks(device):
            size = f"{network.rows} x 3 x {network.pixels}², {network.classes} classes"
            yield f"{network.name}, {size}: {kind}", partial(make, network, device)


if __name__ == "__main__":
    sys.exit(run_script(__doc__.splitlines()[0], contests, rounds=20))

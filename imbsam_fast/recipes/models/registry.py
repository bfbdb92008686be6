"""The networks of the image recipes, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .cifar_resnet import CifarResNet
from .convnet import ConvNet, make_norm
from .names import CIFAR_RESNETS, check_norm


def make_model(name: str, num_classes: int, norm: str, seed: int) -> nn.Module:
    """The network `name`, one of MODELS, with weights that depend on `seed` alone.

    It takes images (N, 3, H, W). `norm` replaces the BatchNorm of convnet and the residual
    networks, "batch" leaves it. Raises ValueError for a network without BatchNorm to replace.
    """
    check_norm(name, norm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "convnet":
            return ConvNet(norm, num_classes, channels=3)
        if name in CIFAR_RESNETS:
            return CifarResNet(CIFAR_RESNETS[name], num_classes, norm)
        return _from_torchvision(name, num_classes, norm)


def check_image_size(name: str, norm: str, num_classes: int, size: tuple[int, int]) -> None:
    """Raise ValueError unless the network `name` takes images of that height and width."""
    with torch.device("meta"):
        model = make_model(name, num_classes, norm, seed=0)
        images = torch.empty(2, 3, *size)
    for layer in model.modules():
        layer.register_forward_hook(_check_not_empty)
    try:
        model(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model is {name!r}, expected one that takes images of {size[0]}x{size[1]} pixels "
            f"({reason})"
        ) from error


def _check_not_empty(layer: nn.Module, inputs: object, outputs: object) -> None:
    """For kernels larger than an image, which older versions of torch do not refuse on "meta"."""
    if isinstance(outputs, torch.Tensor) and outputs.numel() == 0:
        raise ValueError(f"the output of {type(layer).__name__} is empty")


def classifier(model: nn.Module) -> nn.Linear:
    """The last linear layer of a network of MODELS, which gives the logits."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` where `old` is inside `model`."""
    name = next(name for name, m in model.named_modules() if m is old)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _from_torchvision(name: str, num_classes: int, norm: str) -> nn.Module:
    from torchvision import models

    settings: dict[str, Callable[[int], nn.Module]] = {}
    if norm != "batch":
        settings["norm_layer"] = lambda channels: make_norm(norm, channels)
    if name == "resnet34-cifar":  # as the authors released it
        model = models.resnet34(num_classes=num_classes, **settings)
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
        return model
    return models.get_model(name, weights=None, num_classes=num_classes, **settings)

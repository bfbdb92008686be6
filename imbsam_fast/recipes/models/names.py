"""What the networks are called; without torch, so that a command line can list them."""

from __future__ import annotations

NORMS = ("batch", "group")
DEPTHS = (8, 14, 20, 32, 44, 56)  # of the residual networks for 32x32 images, 6n + 2
CIFAR_RESNETS = {f"resnet{depth}": depth for depth in DEPTHS}
TORCHVISION_MODELS = ("resnet50", "resnext50_32x4d", "convnext_tiny", "vit_b_16")
MODELS = ("convnet", *CIFAR_RESNETS, "resnet34-cifar", *TORCHVISION_MODELS)


def needs_torchvision(name: str) -> bool:
    """Whether the network `name` is made by torchvision."""
    return name in (*TORCHVISION_MODELS, "resnet34-cifar")


def check_norm(name: str, norm: str) -> None:
    """Raise ValueError where the network `name` cannot have `norm`."""
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}, expected one of {', '.join(NORMS)}")
    if norm != "batch" and not name.startswith(("convnet", "resn")):
        raise ValueError(f"norm is {norm!r}, expected 'batch': {name} has no BatchNorm")

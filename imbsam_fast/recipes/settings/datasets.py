"""The data sets of the recipes and their settings, published where they are.

data/datasets.py reads them.
"""

from __future__ import annotations

from typing import Any

from .config import FULL, SMALL, Dataset

# The rarest digit has 174 images, so every class can give 124 after the test split.
DIGITS_PER_CLASS = 124

# Ours. The paper's eta, 100, would make nine of the ten classes tail; 20 makes the Few classes
# tail, with 12 % of the images.
DIGITS_DEFAULTS: dict[str, Any] = {
    "data_dir": "",
    "largest_class": DIGITS_PER_CLASS,
    "eta": 20.0,
    "model": "convnet",
    "epochs": 60,
    "batch_size": 32,
    "lr": 0.05,
    "weight_decay": 5e-4,
}
# CIFAR100-LT's, from the code of the baselines.
CIFAR_DEFAULTS: dict[str, Any] = {
    "model": "resnet32",
    "batch_size": 64,
    "lr": 0.01,
    "weight_decay": 1e-3,
}
# The paper states model, batch size and epochs; lr 0.2 for 512 images and the rest are those of
# a known recipe, here in proportion to the batch.
IMAGENET_LT_DEFAULTS: dict[str, Any] = {
    "model": "resnext50_32x4d",
    "batch_size": 64,
    "lr": 0.025,
    "weight_decay": 5e-4,
    "color_jitter": 0.4,
}
INATURALIST_DEFAULTS: dict[str, Any] = {
    "model": "resnet50",
    "batch_size": 512,
    "lr": 0.2,
    "weight_decay": 1e-4,
}

DATASETS = {
    "digits": Dataset(
        "scikit-learn's handwritten digits, made long-tailed",
        DIGITS_DEFAULTS,
        files=False,
        mirrored=False,
        package="sklearn",
    ),
    "cifar10-lt": Dataset(
        "CIFAR-10, made long-tailed",
        CIFAR_DEFAULTS,
        # Ten times the images, ten times the borders of the groups; eta as in a first look.
        variants={
            SMALL: {},
            FULL: {"largest_class": 5000, "group_borders": (200, 1000), "eta": 400.0},
        },
    ),
    "cifar100-lt": Dataset("CIFAR-100, made long-tailed", CIFAR_DEFAULTS),
    "packed": Dataset(
        "images of your own, packed by `imbsam-fast pack`", CIFAR_DEFAULTS, long_tailed=False
    ),
    "imagenet-lt": Dataset(
        "ImageNet-LT",
        IMAGENET_LT_DEFAULTS,
        lists=True,
    ),
    "inaturalist2018": Dataset(
        "iNaturalist 2018",
        INATURALIST_DEFAULTS,
        lists=True,
    ),
}

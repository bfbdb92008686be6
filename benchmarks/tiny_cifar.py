"""Packed archives as of CIFAR100-LT, of a few images that are noise.

python -m benchmarks.tiny_cifar DIR

For the dry run of a training on the real ones, which the package does not bring.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from imbsam_fast.recipes.data.pack import pack
from imbsam_fast.recipes.data.packed import CIFAR_FILES

CLASSES, PIXELS = 100, 32
IMAGES = (4, 1)  # of a class, for training and for testing


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for name, images in zip(CIFAR_FILES[CLASSES], IMAGES):
        with tempfile.TemporaryDirectory() as folder:
            for label in range(CLASSES):
                of_class = Path(folder) / f"class {label:02}"
                of_class.mkdir()
                for i in range(images):
                    pixels = random.integers(0, 256, (PIXELS, PIXELS, 3), np.uint8)
                    Image.fromarray(pixels).save(of_class / f"{i}.png")
            pack(Path(folder), directory / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""How the data sets of settings/datasets.py are read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..settings.config import RunConfig
from . import cifar, digits, packed
from .files import FileImages, FileOptions
from .images import (
    DataError,
    LongTailImages,
    MemoryImages,
    Statistics,
    class_counts,
    long_tailed,
)
from .listed_files import check_files, read_lists

# Pixels from 0 to 16 become -1 to 1.
DIGITS_STATISTICS: Statistics = ((8 / 255,) * 3, (8 / 255,) * 3)
IMAGENET_STATISTICS: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INATURALIST_STATISTICS: Statistics = ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))

# The first one that is there is read.
IMAGENET_LT_FILES = (("ImageNet_LT_train.txt", "ImageNet_LT_test.txt"),)
INATURALIST_FILES = (
    ("iNaturalist18_train.txt", "iNaturalist18_val.txt"),
    ("train2018.json", "val2018.json"),
)


def load(config: RunConfig) -> LongTailImages:
    """The images that `config` names. Raises DataError."""
    return LOADERS[config.dataset](config)


def _counts(config: RunConfig, num_classes: int) -> list[int]:
    """Training images of each class."""
    try:
        return digits.long_tail_counts(config.largest_class, config.imbalance_factor, num_classes)
    except ValueError as error:
        raise DataError(str(error)) from error


def _digits(config: RunConfig) -> LongTailImages:
    """Grey images in three equal channels. No augmentation: a digit mirrored is another sign."""
    pixels, targets = digits.read()
    every = [digits.MAX_PER_CLASS] * digits.NUM_CLASSES
    train, test = digits.split_rows(targets, digits.TEST_PER_CLASS, every, seed=0)
    rgb = pixels.unsqueeze(1).expand(-1, 3, -1, -1)
    images = MemoryImages(rgb, targets, DIGITS_STATISTICS, padding=0, mirrored=False)
    counts = _counts(config, digits.NUM_CLASSES)
    names = [f"digit {k}" for k in range(digits.NUM_CLASSES)]
    return long_tailed(images.subset(train), images.subset(test), counts, config.validation, names)


def _cifar(config: RunConfig, num_classes: int) -> LongTailImages:
    directory = Path(config.data_dir)
    counts = _counts(config, num_classes)
    folder, archives = cifar.folder(num_classes), packed.CIFAR_FILES[num_classes]
    if (directory / folder).exists():
        return cifar.load(directory, num_classes, counts, config.validation)
    if (directory / archives[0]).exists():
        return packed.load_cifar(directory, num_classes, counts, config.validation)
    raise DataError(
        f"--data-dir is '{directory}', expected a directory that holds {folder}, or "
        f"{' and '.join(archives)}"
    )


def _packed(config: RunConfig) -> LongTailImages:
    return packed.load_own(Path(config.data_dir))


def _image_files(
    config: RunConfig, known: tuple[tuple[str, str], ...], statistics: Statistics
) -> LongTailImages:
    directory = Path(config.data_dir)
    root = Path(config.image_root) if config.image_root else directory
    if not root.is_dir():
        option = "--image-root" if config.image_root else "--data-dir"
        raise DataError(f"{option} is '{root}', expected a directory")
    found = [pair for pair in known if (directory / pair[0]).exists()]
    train_file, test_file = (found or known)[0]
    names = [config.train_list or train_file, config.test_list or test_file]
    if config.validation_list:
        names.append(config.validation_list)
    read, num_classes = read_lists([directory / name for name in names], root)
    check_files(read, root, config.check_files, config.skip_corrupt)
    options = FileOptions(
        config.image_size, statistics, config.color_jitter, config.skip_corrupt, config.workers
    )
    train, test, *held_out = (FileImages(images, options) for images in read)
    return LongTailImages(
        train,
        test,
        held_out[0] if held_out else None,
        class_counts(train.targets, num_classes),
        read[0].class_names,
    )


LOADERS: dict[str, Callable[[RunConfig], LongTailImages]] = {
    "digits": _digits,
    "cifar10-lt": partial(_cifar, num_classes=10),
    "cifar100-lt": partial(_cifar, num_classes=100),
    "packed": _packed,
    "imagenet-lt": partial(_image_files, known=IMAGENET_LT_FILES, statistics=IMAGENET_STATISTICS),
    "inaturalist2018": partial(
        _image_files, known=INATURALIST_FILES, statistics=INATURALIST_STATISTICS
    ),
}

"""What is looked at in lists of image files before the first epoch."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import lists
from .images import DataError, check_every_class
from .lists import ImageList

SAMPLE = 1000  # training images that are looked for unless all are
THREADS = 16  # since a network's file system answers one question after the other


def read_lists(files: Sequence[Path], root: Path) -> tuple[list[ImageList], int]:
    """The lists in `files`, training first, and the number of classes, the same in all.

    Files that stand in two lists or twice in one are a warning. Raises DataError for lists that
    do not fit together.
    """
    read = [lists.read(file, root) for file in files]
    train = read[0]
    for file, images in zip(files[1:], read[1:]):
        lists.check_same_classes(files[0], train, file, images)
    num_classes = max(max(images.labels) for images in read) + 1
    if train.categories is not None:
        num_classes = len(train.categories)
    for file, images in zip(files, read):
        lists.check_every_category(images, file)
        check_every_class(images.labels, num_classes, f"'{file}'")
        note = lists.check_duplicates(images, file)
        if note:
            warnings.warn(note, stacklevel=2)
    for file, images in zip(files[1:], read[1:]):
        shared = lists.shared_files(train, images.paths)
        if shared:
            warnings.warn(
                f"{len(shared)} files of '{file}' are in '{files[0]}' too, '{shared[0]}' among "
                "them: what they say of accuracy is what was learned by heart",
                stacklevel=2,
            )
    return read, num_classes


def check_files(read: Sequence[ImageList], root: Path, whole: bool, skip: bool) -> None:
    """Look for all files of testing and validation, and for SAMPLE of the training ones.

    Args:
        read: the lists, training first.
        root: what their paths are relative to.
        whole: look for every training image.
        skip: only warn, unless nothing at all is there.

    Raises DataError where a file is missing.
    """
    train = read[0].paths
    if not whole and len(train) > SAMPLE:
        train = random.Random(0).sample(train, SAMPLE)
    paths = [*train, *(path for images in read[1:] for path in images.paths)]
    with ThreadPoolExecutor(THREADS) as pool:
        there = list(pool.map(os.path.exists, paths, chunksize=64))
    missing = [path for path, found in zip(paths, there) if not found]
    if not missing:
        return
    message = (
        f"'{missing[0]}' does not exist, nor do {len(missing) - 1:,} others of the {len(paths):,} "
        f"that were looked for; --image-root, now '{root}', says what the paths in the lists are "
        "relative to"
    )
    if not skip or len(missing) == len(paths):
        raise DataError(message)
    warnings.warn(message, stacklevel=2)

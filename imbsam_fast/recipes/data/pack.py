"""Makes the archives that packed.py reads, from a folder or a list of image files."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from . import lists
from .decoding import opened
from .images import DataError, check_every_class
from .lists import ImageList
from .workers import read_image


class Packed(NamedTuple):
    """What was written."""

    images: int
    classes: int
    size: tuple[int, int]  # height and width
    bytes: int  # of the image files inside


def pack(
    source: Path,
    out: Path,
    root: Path | None = None,
    size: int | None = None,
    ticked: Callable[[int, int], None] = lambda done, of: None,
) -> Packed:
    """Write the images of `source` and their classes into the archive `out`.

    Args:
        source: a folder with a folder for each class, or a list of image files.
        out: where it is put, as a whole.
        root: what the paths of a list are relative to; None for where the list is.
        size: make every image a square of so many pixels, as lossless WebP: the shorter side is
            resized to it and the centre cropped. None keeps the files, which must be of one size.
        ticked: called with how many images are done, and of how many.

    Raises DataError for what cannot be read or written, with `out` as it was.
    """
    images = _folder(source) if source.is_dir() else lists.read(source, root or source.parent)
    names = images.class_names or [str(k) for k in range(max(images.labels) + 1)]
    check_every_class(images.labels, len(names), f"'{source}'")
    files: list[bytes] = []
    shape: tuple[int, int] | None = None
    for content, found in _contents(images.paths, size):
        if shape not in (None, found):
            raise DataError(
                f"'{images.paths[len(files)]}' has {found[0]}x{found[1]} pixels and those before "
                f"it have {shape[0]}x{shape[1]}, expected all alike; --image-size makes them so"
            )
        files.append(content)
        shape = found
        ticked(len(files), len(images.paths))
    assert shape is not None
    _write(out, files, images.labels, names)
    return Packed(len(files), len(names), shape, sum(map(len, files)))


def _folder(source: Path) -> ImageList:
    """Classes are the folders in order of their names; what begins with a dot is left out."""
    classes = sorted(p.name for p in source.iterdir() if p.is_dir() and p.name[0] != ".")
    if not classes:
        raise DataError(f"'{source}' has no folders, expected one with the images of each class")
    paths, labels = [], []
    for k, name in enumerate(classes):
        found = [p for p in (source / name).rglob("*") if p.is_file() and p.name[0] != "."]
        paths += [str(path) for path in sorted(found)]
        labels += [k] * len(found)
    return ImageList(paths, labels, classes)


def _contents(paths: Sequence[str], size: int | None) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Each image as the bytes of a file, with its height and width."""
    for path in paths:
        try:
            if size is None:
                content = Path(path).read_bytes()
                picture = opened(content)
                picture.pixels()  # to see that it is whole
                yield content, (picture.height, picture.width)
            else:
                yield _lossless(path, size), (size, size)
        except (OSError, ValueError) as error:
            raise DataError(f"'{path}' cannot be read as an image ({error})") from error


def _lossless(path: str, size: int) -> bytes:
    from PIL import Image

    pixels = torch.empty(size, size, 3, dtype=torch.uint8)
    read_image(path, pixels, numbers=None, short_side=size)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "WEBP", lossless=True)
    return file.getvalue()


def _write(out: Path, files: Sequence[bytes], labels: Sequence[int], names: Sequence[str]) -> None:
    temporary = out.with_name(f".{out.name}.new")
    try:
        with temporary.open("wb") as file:
            np.savez(
                file,
                files=np.frombuffer(b"".join(files), np.uint8),
                offsets=np.cumsum([0, *map(len, files)], dtype=np.int64),
                labels=np.array(labels, dtype=np.int64),
                class_names=np.array(names),
            )
        os.replace(temporary, out)
    except OSError as error:
        raise DataError(f"cannot write '{out}': {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)

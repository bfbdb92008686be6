"""Lists of labelled image files, in the formats of ImageNet-LT and iNaturalist 2018."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from .images import DataError


class ImageList(NamedTuple):
    """Image files and their classes, in the order of the file they come from."""

    paths: list[str]
    labels: list[int]
    class_names: list[str] | None


def read(file: Path, root: Path) -> ImageList:
    """`path label` lines, or iNaturalist's JSON where the name ends in .json.

    Paths in the file are relative to `root`. Raises DataError, with file and line, for what is
    missing or cannot be read; the images themselves are not looked at.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(
            f"'{file}' does not exist, expected a list of `path label` lines or an iNaturalist "
            "JSON file; see --train-list and --test-list"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{file}' cannot be read: {error}") from error
    images = _from_json(file, text) if file.suffix == ".json" else _from_lines(file, text)
    if not images.paths:
        raise DataError(f"'{file}' lists no image, expected at least one")
    return images._replace(paths=[str(root / path) for path in images.paths])


def _from_lines(file: Path, text: str) -> ImageList:
    paths, labels = [], []
    for i, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        words = line.rsplit(maxsplit=1)  # a path may have spaces
        if len(words) < 2 or not words[1].isdecimal():
            raise DataError(f"line {i} of '{file}' is {line!r}, expected a path and a class number")
        paths.append(words[0].strip())
        labels.append(int(words[1]))
    return ImageList(paths, labels, None)


def _from_json(file: Path, text: str) -> ImageList:
    """COCO's layout: images (id, file_name), annotations (image_id, category_id), categories."""
    try:
        content = json.loads(text)
        paths = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(paths[a["image_id"]], a["category_id"]) for a in content["annotations"]]
        categories = {category["id"]: category["name"] for category in content["categories"]}
        # Categories are numbered 0 .. K - 1 in 2018's files; another numbering keeps its order.
        numbers = {category: k for k, category in enumerate(sorted(categories))}
        labels = [numbers[category] for _, category in pairs]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"'{file}' is damaged ({type(error).__name__}: {error}), expected JSON with images, "
            "annotations and categories as in train2018.json; copy it again"
        ) from error
    names = [str(categories[category]) for category in sorted(categories)]
    return ImageList([path for path, _ in pairs], labels, names)

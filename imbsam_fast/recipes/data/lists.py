"""Lists of labelled image files, in the formats of ImageNet-LT and iNaturalist 2018."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .images import DataError


class ImageList(NamedTuple):
    """Image files and their classes, in the order of the file they come from."""

    paths: list[str]
    labels: list[int]
    class_names: list[str] | None
    categories: list[int] | None = None  # of JSON: the id of each class, rising


def read(file: Path, root: Path) -> ImageList:
    """`path label` lines, or iNaturalist's JSON where the name ends in .json.

    Paths in the file are relative to `root`. Categories of JSON are numbered from 0 in the order of
    their ids. Raises DataError, with file and line, for what is missing or cannot be read; the
    images themselves are not looked at.
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
    is_json = file.suffix.lower() == ".json" or text[:1] == "{"
    images = _from_json(file, text) if is_json else _from_lines(file, text)
    if not images.paths:
        raise DataError(f"'{file}' lists no image, expected at least one")
    return images._replace(paths=[str(root / path) for path in images.paths])


def check_same_classes(train_file: Path, train: ImageList, file: Path, images: ImageList) -> None:
    """Raise DataError unless a label means the same class in both lists."""
    if images.categories != train.categories:
        ids = [_ids(one, len(set(two.categories or ()))) for one, two in
               ((train, images), (images, train))]  # fmt: skip
        if ids[0] != ids[1]:
            raise DataError(_difference("category ids", train_file, ids[0], file, ids[1]))
    elif train.class_names != images.class_names:
        names = [_named(train), _named(images)]
        raise DataError(_difference("categories", train_file, names[0], file, names[1]))


def _ids(images: ImageList, classes: int) -> list[str]:
    """What stands for the classes; `path label` lines number as many as the other list has."""
    found = range(classes) if images.categories is None else images.categories
    return [str(k) for k in found]


def _named(images: ImageList) -> list[str]:
    ids, names = images.categories or [], images.class_names or []
    return [f"{k} {name}" for k, name in zip(ids, names)]


def _difference(
    what: str, train_file: Path, train: Sequence[str], file: Path, other: Sequence[str]
) -> str:
    return (
        f"'{train_file}' and '{file}' have different {what}, expected the same: "
        f"{few([k for k in train if k not in set(other)])} only in the first, "
        f"{few([k for k in other if k not in set(train)])} only in the second"
    )


def few(names: Sequence[str]) -> str:
    """The first three of `names`, and how many more there are; "none" for none."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "none") + more


def check_every_category(images: ImageList, file: Path) -> None:
    """Raise DataError where a category of JSON has no image, wherever its id stands."""
    if images.categories is None or images.class_names is None:
        return
    present = set(images.labels)
    empty = [k for k in range(len(images.categories)) if k not in present]
    if empty:
        listed = [f"{images.categories[k]} ({images.class_names[k]})" for k in empty]
        raise DataError(
            f"'{file}' has no image of the categories {few(listed)}, expected at least one of each "
            "of its categories"
        )


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
        if "images" in content and not content.get("annotations"):
            raise DataError(
                f"'{file}' has images but no annotations, so their classes are not known: "
                "test2018.json is a competition's; expected a file such as val2018.json"
            )
        paths = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(paths[a["image_id"]], a["category_id"]) for a in content["annotations"]]
        categories = {category["id"]: category["name"] for category in content["categories"]}
        ids = sorted(categories)
        numbers = {category: k for k, category in enumerate(ids)}
        labels = [numbers[category] for _, category in pairs]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"'{file}' is damaged ({type(error).__name__}: {error}), expected JSON with images, "
            "annotations and categories as in train2018.json; copy it again"
        ) from error
    names = [str(categories[category]) for category in ids]
    return ImageList([path for path, _ in pairs], labels, names, ids)


def check_duplicates(images: ImageList, file: Path) -> str | None:
    """What to say of files that are listed more than once, which count as often as they are.

    Raises DataError for one that is listed with two classes.
    """
    seen: dict[str, int] = {}
    again = 0
    for path, label in zip(images.paths, images.labels):
        before = seen.setdefault(path, label)
        if before != label:
            raise DataError(
                f"'{file}' lists '{path}' with the classes {before} and {label}, expected one"
            )
    again = len(images.paths) - len(seen)
    return f"'{file}' lists {again} files more than once; each line counts" if again else None


def shared_files(train: ImageList, others: Iterable[str]) -> list[str]:
    """Those of `others` that are training images too."""
    known = set(train.paths)
    return [path for path in others if path in known]

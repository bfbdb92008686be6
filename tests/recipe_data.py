"""Tiny data in the formats that the recipes read: 8 images a class, and rows of features."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IMAGES = 8  # a class


def pixels(n: int, label: int, seed: int, size: int = 32) -> Tensor:
    """uint8 (n, 3, size, size): noise around a colour that the class decides."""
    generator = torch.Generator().manual_seed(1000 * seed + label)
    colour = torch.tensor([(label * step) % 200 for step in (40, 90, 130)]).view(1, 3, 1, 1)
    noise = torch.randint(0, 56, (n, 3, size, size), generator=generator)
    return (colour + noise).to(torch.uint8)


def jpeg(image: Tensor) -> bytes:
    """A JPEG file of uint8 (3, H, W)."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG")
    return buffer.getvalue()


def packed(directory: Path, per_class: list[int], test_per_class: int = 2) -> Path:
    """The packed JPEG archives of CIFAR10-LT."""
    directory.mkdir(parents=True, exist_ok=True)
    counts = {"cifar10_train_if100": per_class, "cifar10_test": [test_per_class] * 10}
    for seed, (name, numbers) in enumerate(counts.items()):
        files, labels = [], []
        for label, n in enumerate(numbers):
            files += [jpeg(image) for image in pixels(n, label, seed)]
            labels += [label] * n
        offsets = np.cumsum([0, *map(len, files)])
        np.savez(
            directory / f"{name}.npz",
            jpeg=np.frombuffer(b"".join(files), np.uint8),
            offsets=offsets.astype(np.int64),
            labels=np.array(labels),
            class_names=np.array([f"class {k}" for k in range(10)]),
        )
    return directory


def class_folders(directory: Path, counts: list[int], seed: int) -> Path:
    """PNG files in a folder for each class."""
    from PIL import Image

    for label, n in enumerate(counts):
        folder = directory / f"class {label:0{len(str(len(counts) - 1))}d}"
        folder.mkdir(parents=True)
        for i, image in enumerate(pixels(n, label, seed)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return directory


def cifar(directory: Path, num_classes: int, monkeypatch) -> Path:
    """A folder as torchvision unpacks it, and its checksums in torchvision's own tables."""
    from torchvision import datasets

    dataset = datasets.CIFAR10 if num_classes == 10 else datasets.CIFAR100
    folder = directory / dataset.base_folder
    folder.mkdir(parents=True)
    labels_key = "labels" if num_classes == 10 else "fine_labels"

    def write(name: str, content: dict) -> list[str]:
        buffer = io.BytesIO()
        pickle.dump(content, buffer, protocol=2)
        (folder / name).write_bytes(buffer.getvalue())
        return [name, hashlib.md5(buffer.getvalue()).hexdigest()]

    def batch(name: str, seed: int, per_class: int) -> list[str]:
        images = torch.cat([pixels(per_class, k, seed) for k in range(num_classes)])
        labels = [k for k in range(num_classes) for _ in range(per_class)]
        return write(name, {"data": images.flatten(1).numpy(), labels_key: labels})

    names = [f"class {k}" for k in range(num_classes)]
    key = dataset.meta["key"]
    meta_file, md5 = write(dataset.meta["filename"], {key: names})
    train_list = [batch("data_batch_1" if num_classes == 10 else "train", 0, IMAGES)]
    monkeypatch.setattr(dataset, "train_list", train_list)
    monkeypatch.setattr(
        dataset, "test_list", [batch("test_batch" if num_classes == 10 else "test", 1, 2)]
    )
    monkeypatch.setattr(dataset, "meta", {"filename": meta_file, "key": key, "md5": md5})
    return directory


def image_files(directory: Path, counts: list[int], names: tuple[str, str], root: str) -> Path:
    """JPEG files under `root` and their `path label` lists (train, test)."""
    for seed, name in enumerate(names):
        lines = []
        for label, count in enumerate(counts):
            n = count if seed == 0 else 2
            for i, image in enumerate(pixels(n, label, seed, size=40)):
                path = directory / root / f"{Path(name).stem} {label}" / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(jpeg(image))
                lines.append(f"{path.relative_to(directory / root)} {label}")
        (directory / name).write_text("\n".join(lines) + "\n")
    return directory


def as_json(directory: Path, lists: tuple[str, str], names: tuple[str, str]) -> Path:
    """`path label` lists turned into iNaturalist's JSON files, category ids not from 0."""
    for source, name in zip(lists, names):
        pairs = [line.rsplit(" ", 1) for line in (directory / source).read_text().splitlines()]
        labels = sorted({int(label) for _, label in pairs})
        content = {
            "images": [{"id": 7 + i, "file_name": path} for i, (path, _) in enumerate(pairs)],
            "annotations": [
                {"id": i, "image_id": 7 + i, "category_id": 100 + int(label)}
                for i, (_, label) in enumerate(pairs)
            ],
            "categories": [{"id": 100 + k, "name": f"species {k}"} for k in reversed(labels)],
        }
        (directory / name).write_text(json.dumps(content))
        (directory / source).unlink()
    return directory


def features(rows: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows with 8 features, of which every fifth is an anomaly with larger ones."""
    rng = np.random.default_rng(seed)
    y = (np.arange(rows) % 5 == 0).astype(np.int64)
    return (rng.normal(size=(rows, 8)) + 1.5 * y[:, None]).astype(np.float32), y

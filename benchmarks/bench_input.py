"""Image files to batches: decoders alone, one image, and passes with 1, 2 and 4 workers.

    python -m benchmarks.bench_input [--rounds N] [--json FILE] [--quick]

Times are those of one image. Decoders and single images are timed in CPU time, on one thread;
passes by the clock, since workers share the cores with whatever else runs, and their CPU time is
beside them. The files are made here: photographs' sizes, smooth shapes under sensor noise.

The peers are torchvision's ImageFolder under a plain DataLoader, as its ImageNet reference uses
them, and the transport that the recipes had before: one float tensor an image, each with a shared
file and a descriptor of its own.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import io as torchvision_io
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.input_tables import DECODE, IMAGE, PASS
from imbsam_fast.bench.measure import Contestant, Group, Operation, Stopwatch
from imbsam_fast.bench.report import Report
from imbsam_fast.bench.script import run_script
from imbsam_fast.recipes.data import decoding
from imbsam_fast.recipes.data.augmentation import crop_numbers
from imbsam_fast.recipes.data.files import FileImages, FileOptions
from imbsam_fast.recipes.data.lists import ImageList
from imbsam_fast.recipes.data.workers import read_image, slot_bytes

OURS, TORCHVISION, BEFORE = "imbsam-fast", "ImageFolder + DataLoader", "one tensor an image"
WORKERS = (1, 2, 4)
SIZE = 224
STATISTICS = ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))
PHOTO = (800, 600)  # width and height of iNaturalist's larger images
TRANSPORT_BATCH = 512  # the recipe's, and its workers
TRANSPORT_WORKERS = 4


def photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG file of smooth colours and noise, about 2 bits a pixel."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth + random.integers(-9, 10, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_files(folder: Path, number: int, width: int, height: int) -> list[str]:
    """So many files in two class folders, of which sixteen differ."""
    contents = [photo(width, height, seed) for seed in range(min(number, 16))]
    paths = []
    for i in range(number):
        path = folder / f"class {i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[i % len(contents)])
        paths.append(str(path))
    return paths


# ---------------------------------------------------------------- one image


def cpu_timed(calls: Iterable[Callable[[], Any]]) -> Contestant:
    """All `calls`, in CPU time of this process."""

    def run(watch: Stopwatch) -> None:
        started = time.process_time()
        for call in calls:
            call()
        watch.laps["cpu"] = time.process_time() - started

    return run


def decoders(paths: list[str]) -> Operation:
    contents = [Path(path).read_bytes() for path in paths]
    tensors = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]

    def ours(content: bytes, reduction: int, fast: bool) -> None:
        with mock.patch.object(decoding, "simplejpeg", decoding.simplejpeg if fast else None):
            decoding.opened(content).pixels(reduction)

    def everywhere(*arguments: Any) -> Contestant:
        return cpu_timed([partial(ours, content, *arguments) for content in contents])

    rgb = torchvision_io.ImageReadMode.RGB
    contestants = {
        "simplejpeg": everywhere(1, True),
        "simplejpeg, half size": everywhere(2, True),
        "torchvision": cpu_timed(
            [partial(torchvision_io.decode_jpeg, tensor, mode=rgb) for tensor in tensors]
        ),
        "Pillow": everywhere(1, False),
        "Pillow, half size": everywhere(2, False),
    }
    if decoding.simplejpeg is None:
        contestants = {k: v for k, v in contestants.items() if not k.startswith("simplejpeg")}
    return Operation(DECODE, _size(), contestants, calls=len(paths))


def single_images(paths: list[str]) -> Operation:
    out = torch.empty(SIZE, SIZE, 3, dtype=torch.uint8)
    numbers = crop_numbers(len(paths), torch.Generator().manual_seed(0)).tolist()
    folder = image_folder(Path(paths[0]).parent.parent)
    contestants = {
        OURS: cpu_timed([partial(read_image, p, out, n) for p, n in zip(paths, numbers)]),
        TORCHVISION: cpu_timed([partial(folder.__getitem__, i) for i in range(len(paths))]),
    }
    return Operation(IMAGE, _size(), contestants, calls=len(paths))


def _size() -> str:
    return "x".join(map(str, PHOTO))


# ---------------------------------------------------------------- passes


def image_folder(folder: Path) -> ImageFolder:
    steps = [
        transforms.RandomResizedCrop(SIZE),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(*STATISTICS),
    ]
    return ImageFolder(str(folder), transforms.Compose(steps))


class OneByOne(Dataset):
    """Item: a float image, decoded by Pillow and normalised where it is read."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(SIZE, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(*map(list, STATISTICS)),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        with Image.open(self.paths[row]) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        return self.transform(pixels)


Pass = Callable[[], Iterator[Tensor]]


def passes(paths: list[str], batch: int, workers: int) -> dict[str, Pass]:
    """What yields the batches of all `paths` once, with workers that are kept."""
    options = FileOptions(SIZE, STATISTICS, 0.0, False, workers)
    images = FileImages(ImageList(paths, [0] * len(paths), None), options)
    rows = list(torch.arange(len(paths)).split(batch))
    common: dict[str, Any] = {"num_workers": workers, "persistent_workers": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more workers than cores
        folder = DataLoader(image_folder(Path(paths[0]).parent.parent), batch, **common)
        one_by_one = DataLoader(OneByOne(paths), batch, collate_fn=list, **common)
    return {
        OURS: lambda: (x for x, _ in images.batches(rows, (0,))),
        TORCHVISION: lambda: (x for x, _ in folder),
        BEFORE: lambda: (torch.stack(samples) for samples in one_by_one),
    }


def timed_pass(run: Pass) -> Contestant:
    def contestant(watch: Stopwatch) -> None:
        with watch.lap("wall"):
            for _ in run():
                pass

    return contestant


def pass_operation(paths: list[str], batch: int, workers: int) -> Operation:
    contestants = {who: timed_pass(run) for who, run in passes(paths, batch, workers).items()}
    return Operation(PASS, _workers(workers), contestants, calls=len(paths))


def _workers(number: int) -> str:
    return f"{number} worker" if number == 1 else f"{number} workers"


# ---------------------------------------------------------------- what a pass takes


def transport(paths: list[str], batch: int, workers: int) -> dict[str, dict[str, float]]:
    """One pass of each: descriptors and bytes of shared memory at most, CPU time of an image."""
    found = {}
    for who, run in passes(paths, batch, workers).items():
        before = _shared_bytes()
        descriptors, shared = 0, 0
        with _cpu_seconds() as seconds:
            for _ in run():
                descriptors = max(descriptors, len(os.listdir("/proc/self/fd")))
                shared = max(shared, _shared_bytes() - before)
        found[who] = {
            "descriptors": descriptors,
            "dev_shm_bytes": max(shared, 0),
            "own_shared_bytes": slot_bytes(workers, batch, SIZE) if who == OURS else 0,
            "cpu_ms": 1e3 * sum(seconds) / len(paths),
        }
    return found


def _shared_bytes() -> int:
    """In use in /dev/shm, by all processes."""
    system = os.statvfs("/dev/shm")
    return (system.f_blocks - system.f_bfree) * system.f_frsize


@contextmanager
def _cpu_seconds() -> Iterator[list[float]]:
    """Of this process and of the children that live at the end, once the block has ended."""
    seconds: list[float] = []
    before = {p.pid for p in active_children()}
    started = time.process_time()
    yield seconds
    seconds.append(time.process_time() - started)
    for process in active_children():
        if process.pid not in before:
            spent = Path(f"/proc/{process.pid}/schedstat").read_text().split()[0]
            seconds.append(int(spent) / 1e9)


# ---------------------------------------------------------------- the script

_transports: dict[str, Any] = {}


def groups(quick: bool) -> Iterator[Group]:
    torch.set_num_threads(1)
    number, batch = (8, 4) if quick else (192, 64)
    with tempfile.TemporaryDirectory() as folder:
        paths = make_files(Path(folder) / "photos", number, *PHOTO)
        yield [decoders(paths[:48])]
        yield [single_images(paths[:48])]
        for workers in WORKERS:
            yield [pass_operation(paths, batch, workers)]
        if Path("/dev/shm").exists():
            batch = 4 if quick else TRANSPORT_BATCH
            paths = make_files(Path(folder) / "small", 3 * batch, 400, 300)
            _transports.update(transport(paths, batch, TRANSPORT_WORKERS))


def summary(report: Report) -> list[str]:
    report.settings["transport"] = dict(_transports)
    lines = []
    for t in report.timings:
        lines.append(f"{t.operation}, {t.size}, {t.contestant}: {1e3 / t.ms:,.0f} images a second")
    for who, found in _transports.items():
        lines.append(f"{who}: {found}")
    return lines


if __name__ == "__main__":
    sys.exit(run_script(__file__, groups, summary))

"""From the bytes of an image file to what a network sees: decoding, augmentation, transfer."""

from __future__ import annotations

import io
import itertools
import os
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from PIL import Image

from imbsam_fast.recipes.data import augmentation, decoding
from imbsam_fast.recipes.data.decoding import decode
from imbsam_fast.recipes.data.images import generator
from imbsam_fast.recipes.data.transfer import RawBatch, SideStream, one_ahead
from imbsam_fast.recipes.data.workers import Request, Workers

PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("size", [(97, 60), (64, 64), (33, 200)])
def test_both_decoders_give_the_same_pixels(fast, size, monkeypatch):
    if fast and decoding.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    image = Image.effect_noise(size, 60).convert("RGB")
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    if not fast:
        monkeypatch.setattr(decoding, "simplejpeg", None)
    for reduction in (1, 2, 4, 8):
        with Image.open(file) as expected:
            if reduction > 1:
                expected.draft("RGB", (size[0] // reduction, size[1] // reduction))
            pixels = torch.from_numpy(np.array(expected.convert("RGB")))
        found = decoding.opened(file.getvalue()).pixels(reduction)
        assert torch.equal(found, pixels)
        assert found.shape[:2] == (-(-size[1] // reduction), -(-size[0] // reduction))


def test_pixel_modes_are_scaled_or_refused():
    def content(array: np.ndarray, suffix: str = "PNG") -> bytes:
        file = io.BytesIO()
        Image.fromarray(array).save(file, suffix)
        return file.getvalue()

    grey = np.array([[0, 257 * 7], [257 * 200, 65535]], dtype=np.uint16)
    assert decode(content(grey))[0].tolist() == [[0, 7], [200, 255]]
    with pytest.raises(ValueError, match="floating-point numbers of 32 bits, expected 8 bits"):
        decode(content(np.ones((2, 2), np.float32), "TIFF"))
    with pytest.raises(ValueError, match="whole numbers of 32 bits, expected 8 bits"):
        decode(content(np.ones((2, 2), np.int32), "TIFF"))
    transparent = np.array([[[9, 8, 7, 0]]], dtype=np.uint8)
    assert decode(content(transparent)).flatten().tolist() == [9, 8, 7]
    cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    file = io.BytesIO()
    cmyk.save(file, "JPEG")
    assert decode(file.getvalue())[:, 0, 0].tolist() == [0, 255, 255]


def test_orientation_is_not_looked_at():
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    assert decode(file.getvalue()).shape == (3, 2, 4)


def test_a_broken_png_is_a_value_error():
    file = io.BytesIO()
    Image.effect_noise((40, 40), 60).save(file, "PNG")
    content = bytearray(file.getvalue())
    size = content.index(b"IDAT") - 4
    content[size : size + 4] = (16).to_bytes(4, "big")  # the next chunk begins among the pixels
    with pytest.raises(ValueError, match="broken PNG"):
        decode(bytes(content))


# ---------------------------------------------------------------- augmentation


def test_random_boxes_are_spread_as_torchvisions():
    from torchvision.transforms import v2

    numbers = augmentation.crop_numbers(4000, generator(1))
    found = torch.tensor([augmentation.random_box(300, 400, n) for n in numbers.tolist()]).double()
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(224)
    image = torch.empty(3, 300, 400)
    drawn = [crop.make_params([image]) for _ in range(4000)]
    expected = torch.tensor([[d[k] for k in ("top", "left", "height", "width")] for d in drawn])
    expected = expected.double()
    error = (found.var(0) + expected.var(0)).div(4000).sqrt()
    assert ((found.mean(0) - expected.mean(0)).abs() < 4.5 * error).all()
    assert ((found.std(0) / expected.std(0) - 1).abs() < 0.08).all()
    assert (found[:, 0] + found[:, 2] <= 300).all() and (found[:, 1] + found[:, 3] <= 400).all()


def test_a_box_of_a_very_long_image_is_its_middle():
    assert augmentation.random_box(10, 1000, [0.5] * augmentation.CROP_NUMBERS) == (0, 493, 10, 13)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_colours_are_jittered_as_torchvision_does_each_image_in_its_own_order(order):
    from torchvision.transforms.v2 import functional

    steps = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    pixels = torch.randint(0, 256, (2, 6, 5, 3), dtype=torch.uint8)
    factors = torch.tensor([[0.7, 1.3, 0.6], [1.2, 0.8, 1.4]])
    both = torch.tensor([order, order[::-1]])
    changes = augmentation.Changes(torch.tensor([False, True]), factors, both)
    found = augmentation.finished(pixels, PLAIN, 0.4, changes)
    for i in range(2):
        image = pixels[i].permute(2, 0, 1).float() / 255
        for step in both[i].tolist():
            image = steps[step](image, factors[i, step].item())
        if i == 1:
            image = image.flip(2)
        torch.testing.assert_close(found[i], image, atol=2e-4, rtol=1e-4)


# ---------------------------------------------------------------- the way to a GPU


class StandIn:
    """torch.cuda on a machine without one; it notes what happens on which stream."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def Stream(self, device):  # noqa: N802
        return self.Side(self.seen, "side")

    def current_stream(self, device):
        return self.Side(self.seen, "current")

    @contextmanager
    def stream(self, stream):
        self.seen.append("enter side")
        yield
        self.seen.append("leave side")

    class Side:
        def __init__(self, seen: list[str], name: str) -> None:
            self.seen, self.name = seen, name
            self.events = 0

        def record_event(self):
            self.events += 1
            return StandIn.Event(self.seen, self.events)

        def wait_event(self, event) -> None:
            self.seen.append(f"{self.name} waits for event {event.number}")

    class Event:
        def __init__(self, seen: list[str], number: int) -> None:
            self.seen, self.number = seen, number

        def synchronize(self) -> None:
            self.seen.append(f"buffer free after event {self.number}")


def test_a_batch_is_copied_beside_the_step_before_it(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    cuda = StandIn()
    slot = torch.zeros(2, dtype=torch.uint8)  # used again for every batch, as workers do

    def batches():
        for i in range(5):
            slot.fill_(i)
            cuda.seen.append(f"read {i}")
            yield RawBatch(slot, lambda pixels: pixels.clone().float(), torch.tensor([i, i]))

    found = []
    for images, targets in one_ahead(batches(), SideStream(torch.device("cpu"), cuda)):
        cuda.seen.append(f"step {int(targets[0])}")
        found.append((images.tolist(), targets.tolist()))
    assert found == [([float(i)] * 2, [i, i]) for i in range(5)]
    # Two events a batch: its bytes are copied, and its images are finished.
    for i in range(5):
        step = cuda.seen.index(f"step {i}")
        assert cuda.seen[step - 1] == f"current waits for event {2 * i + 2}"
        if i < 4:  # the next was read before, and its event is not waited for
            assert cuda.seen.index(f"read {i + 1}") < step
    freed = [what for what in cuda.seen if what.startswith("buffer")]  # there are two
    assert freed == [f"buffer free after event {2 * i + 1}" for i in range(3)]


# ---------------------------------------------------------------- worker processes


def test_more_workers_than_cores_are_a_single_warning(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        workers = Workers(2, rows=1, size=4, persistent=False)
        request = Request([str(path)], None, slice(0, 1), 1, 0)
        assert [pixels.shape for pixels, _ in workers.read([request])] == [(1, 4, 4, 3)]
    assert [str(w.message)[:36] for w in told if "worker processes" in str(w.message)] == [
        "This DataLoader will create 2 worker"
    ]

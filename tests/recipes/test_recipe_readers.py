"""The data of the image recipes: formats, damage, augmentation, sampling."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")

from PIL import Image

from imbsam_fast.recipes.data import cifar
from imbsam_fast.recipes.data import lists as image_lists
from imbsam_fast.recipes.data.decoding import decode
from imbsam_fast.recipes.data.files import FileImages, FileOptions
from imbsam_fast.recipes.data.images import (
    DataError,
    MemoryImages,
    generator,
    long_tailed,
)
from imbsam_fast.recipes.data.lists import ImageList
from imbsam_fast.recipes.train import stages
from tests import recipe_data

PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture
def images() -> MemoryImages:
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    return MemoryImages(pixels, torch.arange(6) % 3, PLAIN)


# ---------------------------------------------------------------- images in memory


def test_without_augmentation_pixels_are_normalised_and_nothing_else(images):
    statistics = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    shifted = MemoryImages(images.pixels, images.targets, statistics)
    rows = torch.tensor([4, 1])
    ((x, targets),) = shifted.batches([rows])
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in statistics)
    torch.testing.assert_close(x, (images.pixels[rows] / 255 - mean) / std)
    assert targets.tolist() == [1, 1]


def test_augmented_images_are_crops_of_the_padded_image_or_of_its_mirror(images):
    padded = torch.nn.functional.pad(images.pixels, (4,) * 4)
    seen = set()
    for (x, _), row in zip(images.batches([torch.tensor([i]) for i in range(6)] * 20, (1,)),
                           list(range(6)) * 20):  # fmt: skip
        crop = (x[0] * 255).round().to(torch.uint8)
        found = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.equal(
                (crop.flip(2) if flip else crop),
                padded[row, :, top : top + 32, left : left + 32],
            )
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert {flip for *_, flip in seen} == {False, True}
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))


def test_random_numbers_depend_on_key_and_position_alone(images):
    batches = [torch.arange(3), torch.arange(3, 6), torch.arange(2)]
    whole = [x for x, _ in images.batches(batches, key=(0, 1))]
    again = [x for x, _ in images.batches(batches, key=(0, 1), start=1)]
    other = [x for x, _ in images.batches(batches, key=(0, 2))]
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], again, strict=True))
    assert not torch.equal(whole[0], other[0])


def test_a_part_of_a_batch_is_made_of_the_same_images(images):
    batches = [torch.arange(5), torch.arange(1, 6)]
    whole = list(images.batches(batches, key=(3,)))
    part = list(images.batches(batches, key=(3,), part=slice(1, None, 2)))
    for (x, y), (some_x, some_y) in zip(whole, part, strict=True):
        assert torch.equal(x[1::2], some_x) and torch.equal(y[1::2], some_y)


def test_long_tailed_keeps_first_images_and_validates_on_the_next_ones():
    targets = torch.tensor([0, 1] * 5)
    pixels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 8, 8)
    data = long_tailed(MemoryImages(pixels, targets, PLAIN), None, [3, 1], 2, None)
    assert data.train.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 4]
    assert data.validation.pixels[:, 0, 0, 0].tolist() == [3, 5, 6, 8]
    with pytest.raises(DataError, match=r"class 0 has 5 images, expected at least 6: 4 for tr"):
        long_tailed(MemoryImages(pixels, targets, PLAIN), None, [4, 1], 2, None)


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("num_classes", [10, 100])
def test_cifar_folder(tmp_path, monkeypatch, num_classes):
    recipe_data.cifar(tmp_path, num_classes, monkeypatch)
    counts = [8] + [2] * (num_classes - 1)
    data = cifar.load(tmp_path, num_classes, counts, validation=0)
    assert torch.bincount(data.train.targets).tolist() == counts
    assert len(data.test) == 2 * num_classes and data.validation is None
    assert torch.equal(data.train.pixels[:8], recipe_data.pixels(8, 0, 0))
    assert data.class_names[-1] == f"class {num_classes - 1}"


def test_a_missing_or_damaged_cifar_file_is_named(tmp_path, monkeypatch):
    recipe_data.cifar(tmp_path, 10, monkeypatch)
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"test_batch' is damaged \(its MD5 sum is not"):
        cifar.load(tmp_path, 10, [1] * 10, 0)
    file.unlink()
    with pytest.raises(DataError, match=r"test_batch' does not exist.*cifar-10-python\.tar\.gz"):
        cifar.load(tmp_path, 10, [1] * 10, 0)


# ---------------------------------------------------------------- lists and files


def test_list_of_paths_and_labels(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("a/b c.jpg 3\n\nd.png\t0\n", encoding="utf-8-sig")
    assert image_lists.read(file, Path("root")) == (["root/a/b c.jpg", "root/d.png"], [3, 0], None)


@pytest.mark.parametrize("line", ["only-a-path.jpg", "a.jpg x", "a.jpg -1", " 3"])
def test_a_bad_line_of_a_list_is_named(tmp_path, line):
    file = tmp_path / "list.txt"
    file.write_text(f"good.jpg 0\n{line}\n")
    with pytest.raises(DataError, match=r"line 2 of '.*list.txt' is .* a path and a class number"):
        image_lists.read(file, tmp_path)


def test_inaturalist_json(tmp_path):
    lists = ("train.txt", "test.txt")
    recipe_data.image_files(tmp_path, [3, 1], lists, "images")
    expected = image_lists.read(tmp_path / "train.txt", tmp_path)
    recipe_data.as_json(tmp_path, lists, ("train2018.json", "val2018.json"))
    found = image_lists.read(tmp_path / "train2018.json", tmp_path)
    assert (found.paths, found.labels) == (expected.paths, expected.labels)
    assert found.class_names == ["species 0", "species 1"]


@pytest.mark.parametrize("content", ["{", "[]", '{"images": [], "annotations": [{}]}'])
def test_damaged_json_is_named(tmp_path, content):
    file = tmp_path / "train2018.json"
    file.write_text(content)
    with pytest.raises(DataError, match=r"train2018.json' is damaged .*copy it again"):
        image_lists.read(file, tmp_path)


def test_an_empty_list_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(DataError, match="lists no image"):
        image_lists.read(tmp_path / "list.txt", tmp_path)


def options(**changes) -> FileOptions:
    return FileOptions(16, PLAIN, 0.4, False, workers=0)._replace(**changes)


@pytest.fixture
def listed(tmp_path) -> ImageList:
    recipe_data.image_files(tmp_path, [4, 2], ("train.txt", "test.txt"), ".")
    return image_lists.read(tmp_path / "train.txt", tmp_path)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_images(listed, workers):
    batches = [torch.tensor([0, 5, 2]), torch.tensor([1, 1, 3]), torch.tensor([3, 4, 0])]
    here = list(FileImages(listed, options()).batches(batches, (7,)))
    there = list(FileImages(listed, options(workers=workers)).batches(batches, (7,), start=1))
    for (x, y), (other_x, other_y) in zip(here[1:], there, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)
    third = list(FileImages(listed, options()).batches(batches, (7,), part=slice(2, None)))
    assert torch.equal(third[0][0], here[0][0][2:])
    assert here[0][0].shape == (3, 3, 16, 16) and here[0][1].tolist() == [0, 1, 0]


def test_files_are_augmented_only_with_a_key(listed):
    rows = [torch.tensor([0]), torch.tensor([0])]
    source = FileImages(listed, options())
    (a, _), (b, _) = source.batches(rows)
    assert torch.equal(a, b) and abs(float(a.mean()) - 27.5 / 255) < 0.02
    (c, _), (d, _) = source.batches(rows, (0,))
    assert not torch.equal(c, d)


def test_a_broken_png_is_a_value_error():
    file = io.BytesIO()
    Image.effect_noise((40, 40), 60).save(file, "PNG")
    content = bytearray(file.getvalue())
    size = content.index(b"IDAT") - 4
    content[size : size + 4] = (16).to_bytes(4, "big")  # the next chunk begins among the pixels
    with pytest.raises(ValueError, match="broken PNG"):
        decode(bytes(content))


@pytest.mark.parametrize("damage", ["truncated", "text", "missing"])
def test_a_corrupt_image_is_named_or_skipped_and_counted(listed, damage):
    path = Path(listed.paths[1])
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:400] if damage == "truncated" else b"no image")
    batches = [torch.tensor([0, 1, 4]), torch.tensor([1, 2])]
    with pytest.raises(
        DataError, match=f"'{path}' (cannot be read|does not exist).*--skip-corrupt"
    ):
        list(FileImages(listed, options()).batches(batches))
    skipping = FileImages(listed, options(skip_corrupt=True))
    with pytest.warns(
        UserWarning, match=f"'{path}' (cannot be read .*|does not exist); left out"
    ) as warned:
        assert [y.tolist() for _, y in skipping.batches(batches)] == [[0, 1], [0]]
    assert skipping.skipped == len(warned) == 1


# ---------------------------------------------------------------- sampling


def test_class_aware_sampling_draws_classes_alike_and_every_row():
    targets = torch.tensor([2] * 90 + [0] * 9 + [4] * 1)
    rows = torch.cat([stages.class_aware(targets, 5, generator(0, i)) for i in range(60)])
    drawn = torch.bincount(targets[rows], minlength=5)
    assert drawn[[1, 3]].sum() == 0
    assert (drawn[[0, 2, 4]] - 2000).abs().max() < 150  # 4 standard deviations
    assert len(rows) == 6000 and rows.unique().tolist() == list(range(100))


def test_class_balanced_weights_have_mean_one_and_the_ratio_of_effective_numbers():
    weights = stages.class_balanced([500, 5], beta=0.9999)
    assert weights.mean().item() == pytest.approx(1)
    ratio = (1 - 0.9999**500) / (1 - 0.9999**5)
    assert (weights[1] / weights[0]).item() == pytest.approx(ratio, rel=1e-4)


def test_norms_are_capped_a_tenth_above_the_smallest():
    linear = torch.nn.Linear(2, 3)
    linear.weight.data = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 1.2]])
    cap = stages.norm_cap(linear)
    assert cap == pytest.approx(1 + 0.1 * 4)
    stages.project_norms(linear, cap)
    torch.testing.assert_close(linear.weight.norm(dim=1), torch.tensor([1.4, 1.0, 1.2]))
    torch.testing.assert_close(linear.weight[0], torch.tensor([0.84, 1.12]))

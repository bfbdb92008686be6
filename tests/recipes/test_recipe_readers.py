"""The data of the image recipes: images in memory and in files, lists, damage, sampling."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from PIL import Image

from imbsam_fast.recipes.data import cifar, listed_files
from imbsam_fast.recipes.data import lists as image_lists
from imbsam_fast.recipes.data import workers as workers_module
from imbsam_fast.recipes.data.files import FileImages, FileOptions
from imbsam_fast.recipes.data.images import (
    DataError,
    MemoryImages,
    generator,
    long_tailed,
    place_for,
)
from imbsam_fast.recipes.data.listed_files import check_files, read_lists
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


def test_images_stay_on_a_gpu_that_has_room_for_them(images, monkeypatch):
    pixels = images.pixels
    gpu = torch.device("cuda", 0)
    for free, place in ((8 * pixels.nbytes, gpu), (8 * pixels.nbytes - 1, torch.device("cpu"))):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index, free=free: (free, 10 * free))
        assert place_for(pixels, gpu) == place
    assert place_for(pixels, torch.device("meta")) == torch.device("meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_batches_are_the_same_on_a_gpu(images):
    rows = torch.arange(6).split(4)
    for key in (None, (3, 1)):
        known = list(images.batches(rows, key))
        for device in ("cuda", "cpu"):
            found = list(images.batches(rows, key, device=torch.device(device)))
            for (x, y), (x0, y0) in zip(found, known, strict=True):
                assert x.device.type == device and torch.equal(y, y0)
                torch.testing.assert_close(x.cpu(), x0)


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
    found = image_lists.read(file, Path("root"))
    assert found == (["root/a/b c.jpg", "root/d.png"], [3, 0], None, None)


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


def coco(categories: dict[int, str], used: list[int]) -> str:
    """iNaturalist's JSON with an image of each of the `used` categories."""
    return json.dumps(
        {
            "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(len(used))],
            "annotations": [{"image_id": i, "category_id": k} for i, k in enumerate(used)],
            "categories": [{"id": k, "name": name} for k, name in categories.items()],
        }
    )


TRAIN = coco({10: "ant", 20: "bee", 30: "fly"}, [30, 10, 20])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (coco({20: "bee", 30: "fly", 40: "elk"}, [20, 30, 40]),
         r"category ids, expected the same: 10 only in the first, 40 only in the second"),
        (coco({10: "ant", 20: "fly", 30: "bee"}, [10, 20, 30]),
         r"categories, expected the same: 20 bee, 30 fly only in the first, 20 fly, 30 bee only"),
        (coco({10: "ant", 20: "bee", 30: "fly"}, [10, 30]), r"no image of the categories 20 \(bee"),
        (coco({10: "ant", 20: "bee", 30: "fly"}, [10, 20]), r"no image of the categories 30 \(fly"),
        ("a.jpg 0\nb.jpg 1\nc.jpg 2\n",
         r"category ids, expected the same: 10, 20, 30 only in the first, 0, 1, 2 only in the sec"),
    ],
)  # fmt: skip
def test_a_label_is_the_same_class_in_all_lists(other, message, tmp_path):
    files = [tmp_path / "train2018.json", tmp_path / "val2018"]
    files[0].write_text(TRAIN)
    files[1].write_text(other)
    with pytest.raises(DataError, match=message):
        read_lists(files, tmp_path)


def test_categories_are_numbered_by_their_ids(tmp_path):
    files = [tmp_path / "train2018.JSON", tmp_path / "val2018.json"]
    files[0].write_text(TRAIN)
    files[1].write_text(coco({30: "fly", 10: "ant", 20: "bee"}, [10, 20, 30]))
    with pytest.warns(
        UserWarning, match="3 files of .*val2018.json' are in .* too, .*0.jpg' among"
    ):
        (train, other), num_classes = read_lists(files, tmp_path)
    assert (train.labels, other.labels, num_classes) == ([2, 0, 1], [0, 1, 2], 3)
    assert train.class_names == ["ant", "bee", "fly"]


def test_a_file_that_is_listed_twice_counts_twice_with_one_class_and_is_refused_with_two(tmp_path):
    file = tmp_path / "train.txt"
    file.write_text("a.jpg 0\na.jpg 0\nb.jpg 1\n")
    with pytest.warns(UserWarning, match="lists 1 files more than once; each line counts"):
        ((images,), _) = read_lists([file], tmp_path)
    assert images.labels == [0, 0, 1]
    file.write_text("a.jpg 0\na.jpg 1\n")
    with pytest.raises(DataError, match=r"a.jpg' with the classes 0 and 1, expected one"):
        read_lists([file], tmp_path)


def test_a_list_without_classes_gets_its_own_words(tmp_path):
    file = tmp_path / "test2018.json"
    file.write_text('{"images": [{"id": 1, "file_name": "a.jpg"}]}')
    with pytest.raises(DataError, match=r"has images but no annotations.* such as val2018.json"):
        image_lists.read(file, tmp_path)


def test_missing_files_are_found_before_the_first_epoch(listed, tmp_path):
    test = image_lists.read(tmp_path / "test.txt", tmp_path)
    check_files([listed, test], tmp_path, whole=False, skip=False)
    Path(test.paths[1]).unlink()
    missing = f"'{test.paths[1]}' does not exist.*--image-root, now '{tmp_path}'"
    with pytest.raises(DataError, match=missing):
        check_files([listed, test], tmp_path, whole=False, skip=False)
    with pytest.warns(UserWarning, match=missing):
        check_files([listed, test], tmp_path, whole=False, skip=True)
    nowhere = listed._replace(paths=[path + "x" for path in listed.paths])
    with pytest.raises(DataError, match="nor do 5 others of the 6 that were looked for"):
        check_files([nowhere], tmp_path, whole=False, skip=True)


@pytest.mark.parametrize("whole", [False, True])
def test_all_training_images_are_looked_for_only_when_asked(whole, tmp_path):
    (tmp_path / "there").touch()
    paths = [str(tmp_path / "there")] * (50 * listed_files.SAMPLE)
    paths[17] = str(tmp_path / "missing")  # not in the sample
    images = ImageList(paths, [0] * len(paths), None)
    if whole:
        with pytest.raises(DataError, match="missing' does not exist"):
            check_files([images], tmp_path, whole, skip=False)
    else:
        check_files([images], tmp_path, whole, skip=False)


def options(**changes) -> FileOptions:
    return FileOptions(16, PLAIN, 0.4, False, workers=0)._replace(**changes)


@pytest.fixture
def listed(tmp_path) -> ImageList:
    recipe_data.image_files(tmp_path, [4, 2], ("train.txt", "test.txt"), ".")
    return image_lists.read(tmp_path / "train.txt", tmp_path)


@pytest.mark.parametrize(("workers", "forks"), [(1, True), (3, True), (2, False)])
def test_workers_do_not_change_the_images(listed, workers, forks, monkeypatch):
    monkeypatch.setattr(workers_module, "FORKS", forks and workers_module.FORKS)
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


def test_tests_see_what_torchvision_makes(listed):
    from torchvision.transforms import v2

    path = listed.paths[0]
    Image.effect_noise((90, 61), 50).convert("RGB").save(path, "JPEG")
    ((x, _),) = FileImages(listed, options(size=28)).batches([torch.tensor([0])])
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    expected = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(28)])(pixels)
    assert torch.equal((x[0] * 255).round().byte(), expected)


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

"""Archives of small images: reading them, refusing damaged ones, and making one's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from PIL import Image

from imbsam_fast import cli
from imbsam_fast.recipes.data import packed
from imbsam_fast.recipes.data.datasets import load
from imbsam_fast.recipes.data.images import DataError
from imbsam_fast.recipes.data.pack import pack
from imbsam_fast.recipes.run_directory import find_runs
from imbsam_fast.recipes.settings.config import resolve
from imbsam_fast.recipes.settings.datasets import DATASETS
from tests import commands, recipe_data

COUNTS = [8, 6, 5, 4, 3, 2, 2, 1, 1, 1]

# ---------------------------------------------------------------- CIFAR's


def test_packed_archive_keeps_images_labels_and_names_together(tmp_path):
    data = packed.load_cifar(recipe_data.packed(tmp_path, [9] * 10), 10, COUNTS, validation=1)
    assert data.counts == COUNTS and len(data.train) == sum(COUNTS)
    assert (len(data.test), len(data.validation)) == (20, 10)
    assert data.class_names[3] == "class 3"
    for image, label in zip(data.train.pixels, data.train.targets):
        expected = recipe_data.pixels(1, int(label), 0).float().mean(dim=(0, 2, 3))
        assert (image.float().mean(dim=(1, 2)) - expected).abs().max() < 4  # noise and JPEG


@pytest.mark.parametrize("name", packed.CIFAR_FILES[10])
def test_missing_and_damaged_archives_are_named(tmp_path, name):
    recipe_data.packed(tmp_path, [2] * 10)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=f"{name}' is damaged .* copy it again"):
        packed.load_cifar(tmp_path, 10, [1] * 10, 0)
    path.unlink()
    with pytest.raises(DataError, match=f"{name}' does not exist"):
        packed.load_cifar(tmp_path, 10, [1] * 10, 0)


def without(key):
    return lambda archive: archive.pop(key)


def replaced(key, change):
    return lambda archive: archive.update({key: change(archive[key])})


def smaller_first_image(archive) -> None:
    image = recipe_data.jpeg(recipe_data.pixels(1, 0, 0, size=16)[0])
    end = archive["offsets"][1]
    archive["jpeg"] = np.concatenate([np.frombuffer(image, np.uint8), archive["jpeg"][end:]])
    archive["offsets"][1:] += len(image) - end


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("class_names"), "class_names is not a file in the archive"),
        (replaced("labels", lambda labels: labels[:-1]), "19 labels and 21 offsets"),
        (replaced("labels", lambda labels: labels + 1), "labels are 1 to 10, 10 class names"),
        (replaced("labels", lambda labels: labels / 1), "labels are float64"),
        (replaced("labels", lambda labels: labels.astype(str)), "labels are <U"),
        (replaced("labels", lambda labels: labels.astype(object)), "allow_pickle=False"),
        (replaced("offsets", lambda offsets: offsets[:-1]), "20 labels and 20 offsets"),
        (replaced("jpeg", lambda jpeg: jpeg * 0), "image 0 of .* is damaged"),
        (smaller_first_image, "image 1 of .* is damaged .it is not as large as the others"),
    ],
)
def test_an_archive_whose_parts_do_not_fit_is_named(tmp_path, damage, message):
    path = recipe_data.packed(tmp_path, [2] * 10) / packed.CIFAR_FILES[10][0]
    with np.load(path) as archive:
        content = dict(archive)
    damage(content)
    np.savez(path, **content)
    with pytest.raises(DataError, match=message):
        packed.load_cifar(tmp_path, 10, [1] * 10, 0)


def test_a_test_archive_without_a_class_is_refused(tmp_path):
    path = recipe_data.packed(tmp_path, [2] * 10) / packed.CIFAR_FILES[10][1]
    with np.load(path) as archive:
        content = dict(archive)
    content["labels"][content["labels"] == 3] = 4
    np.savez(path, **content)
    with pytest.raises(DataError, match=r"cifar10_test.npz' has no image of class 3, expected"):
        packed.load_cifar(tmp_path, 10, [1] * 10, 0)


def cifar100_archives(directory: Path, per_class: int) -> Path:
    """As the real ones: lossless WebP, under the key `files`."""
    directory.mkdir(parents=True)
    for seed, (name, n) in enumerate(zip(packed.CIFAR_FILES[100], (per_class, 1))):
        folder = directory / name.split(".")[0]
        recipe_data.class_folders(folder, [n] * 100, seed)
        pack(folder, directory / name, size=32)
    return directory


def test_cifar100_is_read_from_archives_where_the_folder_is_missing(tmp_path):
    given = {"dataset": "cifar100-lt", "optimizer": "sgd", "seed": 0, "largest_class": 4,
             "imbalance_factor": 4.0, "validation": 1}  # fmt: skip
    directory = cifar100_archives(tmp_path / "data", 5)
    chosen = resolve(DATASETS["cifar100-lt"], {**given, "data_dir": str(directory)})
    data = load(chosen)
    assert (data.counts[0], data.counts[-1], len(data.counts)) == (4, 1, 100)
    assert (len(data.test), len(data.validation)) == (100, 100)
    first = data.train.pixels[data.train.targets == 0]
    assert torch.equal(first, recipe_data.pixels(5, 0, 0)[:4])  # lossless, in their order
    with pytest.raises(DataError, match=r"cifar-100-python, or cifar100_train_if50.npz and cifar"):
        load(resolve(DATASETS["cifar100-lt"], {**given, "data_dir": str(tmp_path)}))


# ---------------------------------------------------------------- one's own


def test_a_packed_folder_is_what_it_was(tmp_path):
    folder = recipe_data.class_folders(tmp_path / "set", [3, 1], seed=0)
    (folder / "class 0" / ".hidden").write_text("not an image")
    found = pack(folder, tmp_path / "train.npz")
    assert (found.images, found.classes, found.size) == (4, 2, (32, 32))
    archive = packed.read(tmp_path / "train.npz")
    assert archive.class_names == ["class 0", "class 1"]
    assert archive.targets.tolist() == [0, 0, 0, 1]
    assert torch.equal(archive.pixels[:3], recipe_data.pixels(3, 0, 0))
    assert not list(tmp_path.glob(".*"))


def test_a_packed_list_is_cut_to_squares(tmp_path):
    recipe_data.image_files(tmp_path, [2, 1], ("train.txt", "test.txt"), "images")
    wide = Image.fromarray(np.full((40, 80, 3), (9, 99, 199), np.uint8))
    wide.paste((255, 0, 0), (0, 0, 15, 40))  # beside what the centre shows
    first = (tmp_path / "train.txt").read_text().splitlines()[0].rsplit(" ", 1)[0]
    wide.save(tmp_path / "images" / first, quality=95)
    pack(tmp_path / "train.txt", tmp_path / "train.npz", root=tmp_path / "images", size=16)
    archive = packed.read(tmp_path / "train.npz")
    assert archive.pixels.shape == (3, 3, 16, 16) and archive.class_names == ["0", "1"]
    assert (archive.pixels[0].float().mean(dim=(1, 2)) - torch.tensor([9, 99, 199])).abs().max() < 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("size", r"b.png' has 8x8 pixels and those before it have 32x32.*--image-size"),
        ("text", r"b.png' cannot be read as an image"),
        ("empty", r"has no image of class 2, expected"),
        ("flat", r"has no folders, expected one with the images of each class"),
    ],
)
def test_what_cannot_be_packed_is_named_and_the_archive_is_left(damage, message, tmp_path):
    folder = recipe_data.class_folders(tmp_path / "set", [2, 1], seed=0)
    if damage == "size":
        Image.new("RGB", (8, 8)).save(folder / "class 1" / "b.png")
    elif damage == "text":
        (folder / "class 1" / "b.png").write_text("no image")
    elif damage == "empty":
        (folder / "class 2").mkdir()
    else:
        folder = folder / "class 0"
    out = tmp_path / "train.npz"
    out.write_text("before")
    with pytest.raises(DataError, match=message):
        pack(folder, out)
    assert out.read_text() == "before"


@pytest.fixture
def own(tmp_path) -> Path:
    """A directory with the archives of a set of one's own."""
    for seed, (name, counts) in enumerate({"train": [9, 4, 2], "test": [2, 2, 2]}.items()):
        folder = recipe_data.class_folders(tmp_path / name, counts, seed)
        assert cli.main(["pack", str(folder), str(tmp_path / f"{name}.npz")]) == 0
    return tmp_path


OWN = ["train", "packed", "--model", "resnet8", "--epochs", "1", "--batch-size", "8"]


def test_a_set_of_ones_own_trains_from_memory(own, tmp_path, capsys):
    argv = [*OWN, "--data-dir", str(own), "--eta", "4", "--optimizer", "imbsam"]
    assert cli.main([*argv, "--save", str(tmp_path / "runs")]) == 0
    assert "packed: 15 training images in 3 classes (9 4 2), 6 test" in capsys.readouterr().out
    (run,) = find_runs([tmp_path / "runs"])
    result = run.result()
    assert result["class_counts"] == [9, 4, 2] and result["tail_classes"] == [1, 2]
    assert result["class_names"] == ["class 0", "class 1", "class 2"]
    chosen = resolve(DATASETS["packed"], {"dataset": "packed", "data_dir": str(own), "seed": 0,
                                          "optimizer": "sgd"})  # fmt: skip
    data = load(chosen)
    ((x, _),) = data.train.batches([torch.arange(15)])
    assert x.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (x.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_archives_of_different_classes_or_sizes_are_refused(own, tmp_path, capsys):
    argv = [*OWN, "--data-dir", str(own), "--save", str(tmp_path / "runs")]
    pack(recipe_data.class_folders(tmp_path / "small", [2, 2, 2], 1), own / "test.npz", size=16)
    assert "test.npz' are 16x16, expected 32x32 as in" in commands.refused(argv, capsys)
    (tmp_path / "test" / "class 2").rename(tmp_path / "test" / "other")
    pack(tmp_path / "test", own / "test.npz")
    message = commands.refused(argv, capsys)
    assert "class 2 only in the first, other only in the second" in message
    (own / "test.npz").unlink()
    assert "test.npz' does not exist" in commands.refused(argv, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["set", "out.zip"], "OUT.npz is 'out.zip', expected a name that ends in .npz"),
        (["set", "out.npz", "--image-root", "."], "--image-root is '.', expected none"),
        pytest.param(
            ["nowhere.txt", "out.npz"], "'nowhere.txt' does not exist", marks=pytest.mark.quick
        ),
        (["set", "no/out.npz"], "cannot write 'no/out.npz': No such file"),
    ],
)
def test_a_bad_pack_command_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe_data.class_folders(tmp_path / "set", [1, 1], seed=0)
    assert message in commands.refused(["pack", *words], capsys)

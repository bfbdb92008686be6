"""`imbsam-fast train` on images, end to end: every format, killed, resumed, tested."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("torchvision")

from imbsam_fast import cli
from imbsam_fast.recipes.run_directory import RunDirectory, find_runs
from imbsam_fast.recipes.settings import arguments
from imbsam_fast.recipes.settings.config import resolve
from imbsam_fast.recipes.settings.datasets import DATASETS
from imbsam_fast.recipes.train.ranks import Ranks, RanksError
from imbsam_fast.recipes.train.run import run_to_the_end
from tests import commands, recipe_data

COUNTS = [8, 8, 8]
LISTS = ("ImageNet_LT_train.txt", "ImageNet_LT_test.txt")
INATURALIST = ("iNaturalist18_train.txt", "iNaturalist18_val.txt")
JSON = ("train2018.json", "val2018.json")
QUICK = ["--model", "resnet8", "--epochs", "2", "--batch-size", "8", "--lr", "0.05"]
CIFAR = [*QUICK, "--largest-class", "4", "--imbalance-factor", "4", "--eta", "2"]
FILES = [*QUICK, "--image-size", "16", "--workers", "0", "--eta", "8", "--group-borders", "5", "7"]


def packed(path: Path, monkeypatch) -> list[str]:
    recipe_data.packed(path, [recipe_data.IMAGES] * 10)
    return ["cifar10-lt", *CIFAR]


def cifar10(path: Path, monkeypatch) -> list[str]:
    recipe_data.cifar(path, 10, monkeypatch)
    return ["cifar10-lt", *CIFAR]


def cifar100(path: Path, monkeypatch) -> list[str]:
    recipe_data.cifar(path, 100, monkeypatch)
    return ["cifar100-lt", *CIFAR, "--batch-size", "64"]


def imagenet(path: Path, monkeypatch) -> list[str]:
    recipe_data.image_files(path, COUNTS, LISTS, "images")
    return ["imagenet-lt", *FILES, "--image-root", str(path / "images")]


def inaturalist_list(path: Path, monkeypatch) -> list[str]:
    recipe_data.image_files(path, COUNTS, INATURALIST, ".")
    return ["inaturalist2018", *FILES]


def inaturalist_json(path: Path, monkeypatch) -> list[str]:
    recipe_data.as_json(recipe_data.image_files(path, COUNTS, LISTS, "."), LISTS, JSON)
    return ["inaturalist2018", *FILES, "--image-root", str(path)]


FORMATS = [packed, cifar10, cifar100, imagenet, inaturalist_list, inaturalist_json]


def train(*words: str) -> int:
    return cli.main(["train", *words])


def weights(run: Path) -> torch.Tensor:
    state = RunDirectory.open(run).load_checkpoint()
    return torch.cat([w.flatten().double() for w in state["model"].values()])


def interrupt_after(steps: int, monkeypatch) -> None:
    """SIGTERM to this process after so many steps of a run."""
    left = [steps]

    def interrupted(training, directory, on_step, *others):
        def step(training):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            on_step(training)

        return run_to_the_end(training, directory, step, *others)

    monkeypatch.setattr("imbsam_fast.recipes.train.command.run_to_the_end", interrupted)


@pytest.mark.slow  # three trainings
@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_every_format_through_training_interruption_resume_and_test(
    make, tmp_path, monkeypatch, capsys
):
    argv = [*make(tmp_path / "data", monkeypatch), "--data-dir", str(tmp_path / "data")]
    first = make is FORMATS[0]
    argv += ["--optimizer", "imbsam", *(["sgd"] if first else [])]
    assert train(*argv, "--save", str(tmp_path / "whole")) == 0
    table = capsys.readouterr().out
    assert ("SGD" in table) == first and "ImbSAM, paper, eta" in table and "Few" in table

    save = ["--save", str(tmp_path / "stopped")]
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        assert train(*argv, *save) == 130
    stopped = tmp_path / "stopped"
    told = capsys.readouterr().out
    assert f"'{stopped}/" in told and "goes on with --resume" in told
    assert [run.result() for run in find_runs([stopped])] == [None] * (1 + first)
    assert train(*argv, *save, "--resume") == 0

    runs = find_runs([stopped])
    for run, whole in zip(runs, find_runs([tmp_path / "whole"]), strict=True):
        assert torch.equal(weights(run.path), weights(whole.path))
        result, expected = run.result(), whole.result()
        assert result["last"] == expected["last"]
        assert result["class_counts"][0] == (4 if "cifar" in argv[0] else recipe_data.IMAGES)
        assert [row["epoch"] for row in run.log()] == [1, 2]
        assert 0 <= result["last"]["flip"]["all"] <= 100
        assert result["environment"]["versions"]["torch"] == torch.__version__
        first, second = (row["loss"] for row in run.log())
        assert second < first
    assert cli.main(["report", str(stopped), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert all(f">{run.path}</td>" in page for run in runs)


@pytest.mark.slow  # starts processes
def test_a_killed_process_goes_on_bit_for_bit(tmp_path, monkeypatch):
    argv = [*packed(tmp_path / "data", monkeypatch), "--data-dir", str(tmp_path / "data")]
    argv += ["--optimizer", "imbsam", "--epochs", "8"]
    command = [sys.executable, "-m", "imbsam_fast", "train", *argv, "--save", str(tmp_path / "a")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    run = tmp_path / "a" / "imbsam-paper-eta2-seed0"
    deadline = time.monotonic() + 120
    while not (run / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    reached = RunDirectory.open(run).load_checkpoint()["epoch"]
    assert 1 <= reached < 8
    assert train(*argv, "--save", str(tmp_path / "a"), "--resume") == 0
    assert train(*argv, "--save", str(tmp_path / "b")) == 0
    assert torch.equal(weights(run), weights(tmp_path / "b" / run.name))


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("distributed", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(distributed, tmp_path, monkeypatch):
    argv = [*packed(tmp_path / "data", monkeypatch), "--data-dir", str(tmp_path / "data")]
    argv += ["--norm", "group", "--optimizer", "imbsam", "--batch-size", "6"]  # of 18 images
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "imbsam_fast", "train", *argv, "--distributed", distributed]
    subprocess.run([*command, "--save", str(tmp_path / "two")], check=True, capture_output=True)
    assert train(*argv, "--save", str(tmp_path / "one")) == 0
    (two,), (one,) = find_runs([tmp_path / "two"]), find_runs([tmp_path / "one"])
    torch.testing.assert_close(weights(two.path), weights(one.path), rtol=1e-3, atol=1e-5)
    losses = [[row["loss"] for row in run.log()] for run in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert two.result()["last"] == one.result()["last"]


def test_shards_lie_where_the_run_trains(tmp_path, monkeypatch):
    """And not on an accelerator that is there too, where torch puts them by itself."""
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda: torch.device("xpu"))
    meet = f"file://{tmp_path}/rendezvous"
    dist.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    try:
        model = Ranks("fsdp", 0, 1).spread(torch.nn.Linear(2, 3))
        assert [p.device_mesh.device_type for p in model.parameters()] == ["cpu", "cpu"]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("method", ["wb", "lws"])
def test_second_stages_take_no_sharded_weights(method):
    with pytest.raises(RanksError, match=f"'ddp' or 'off' with --method {method}"):
        Ranks("fsdp", 0, 2).check_method(method)
    Ranks("ddp", 0, 2).check_method(method)


# ---------------------------------------------------------------- configuration files


@pytest.fixture
def data_dir(tmp_path, monkeypatch) -> str:
    packed(tmp_path / "data", monkeypatch)
    return str(tmp_path / "data")


SETTINGS = {
    "yaml": "optimizer: [sgd, sam]\nlr: 0.02\nlargest-class: 8\nimbalance_factor: 8\n"
    "group_borders: [3, 5]\nchannels_last: false\nvalidation_list: null\n",
    "toml": 'optimizer = ["sgd", "sam"]\nlr = 0.02\nlargest-class = 8\nimbalance_factor = 8\n'
    "group_borders = [3, 5]\nchannels_last = false\n",
}


@pytest.mark.parametrize("suffix", SETTINGS)
def test_settings_come_from_a_file_and_the_command_line_is_before_it(suffix, data_dir, tmp_path):
    file = tmp_path / f"settings.{suffix}"
    text = SETTINGS[suffix].replace("validation_list: null\n", "")
    file.write_text(text)
    argv = ["cifar10-lt", "--config", str(file), "--data-dir", data_dir, "--model", "resnet8"]
    assert train(*argv, "--epochs", "1", "--lr", "0.03", "--save", str(tmp_path / "runs")) == 0
    runs = find_runs([tmp_path / "runs"])
    assert [run.config["optimizer"] for run in runs] == ["sam", "sgd"]
    expected = {"lr": 0.03, "group_borders": [3, 5], "channels_last": False, "largest_class": 8}
    assert {name: runs[0].config[name] for name in expected} == expected


def test_a_run_is_repeated_from_its_own_configuration(data_dir, tmp_path):
    argv = ["cifar10-lt", *CIFAR, "--data-dir", data_dir, "--optimizer", "sam", "--seed", "3"]
    assert train(*argv, "--tail-weight", "2", "--save", str(tmp_path / "a")) == 0
    (first,) = find_runs([tmp_path / "a"])
    config = str(first.path / "config.yaml")
    assert train("cifar10-lt", "--config", config, "--save", str(tmp_path / "b")) == 0
    (second,) = find_runs([tmp_path / "b"])
    assert second.config == first.config and second.path.name == "sam-tail2-seed3"
    assert torch.equal(weights(first.path), weights(second.path))


def refused(argv: list[str], capsys) -> str:
    return commands.refused(["train", *argv], capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 0.1\n", "has the unknown key 'learning_rate', expected one of"),
        ("lr: -1\n", "--lr: is '-1', expected a number > 0"),
        ("optimizer: adam\n", "invalid choice: 'adam'"),
        ("channels_last: 1\n", "--channels-last"),
        ("- lr\n", "expected a mapping of settings to values"),
        ("lr: [\n", "cannot be read"),
    ],
)
def test_bad_settings_in_a_file_are_named(text, message, data_dir, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    argv = ["cifar10-lt", "--config", str(file), "--data-dir", data_dir, "--save", str(tmp_path)]
    assert message in refused(argv, capsys)


@pytest.mark.parametrize(
    "argv",
    [
        ["cifar100-lt"],
        ["cifar10-lt", "--images", "small"],
        ["cifar10-lt", "--method", "lws"],
        ["cifar10-lt", "--preset", "released"],
        ["cifar10-lt", "--optimizer", "sgd-weighted"],
    ],
)
def test_a_runs_own_configuration_is_not_that_of_another_kind(argv, tmp_path, capsys):
    given = {"dataset": "cifar10-lt", "data_dir": ".", "optimizer": "sgd", "seed": 0}
    chosen = resolve(DATASETS["cifar10-lt"], given)
    run = RunDirectory.create(tmp_path / "run", chosen.to_dict())
    argv = [*argv, "--config", str(run.path / "config.yaml"), "--save", str(tmp_path / "b")]
    assert "from which its other settings follow" in refused(argv, capsys)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--save", "runs"], "--data-dir is missing"),
        (["--data-dir", "."], "--save is missing"),
        (["--data-dir", "nowhere", "--save", "runs"], "--data-dir is 'nowhere', expected"),
        (["--data-dir", "{data}", "--save", "runs", "--largest-class", "9", "--images", "small",
          "--imbalance-factor", "1"],
         "class 0 has 8 images, expected at least 9"),
        (["--data-dir", "{data}", "--save", "runs", "--largest-class", "8"],
         "imbalance_factor is 100.0, expected 1 to 8"),
        (["--data-dir", "{data}", "--save", "runs", "--distributed", "ddp"], "under torchrun"),
        (["--data-dir", ".", "--save", "runs", "--group-borders", "9", "5"],
         "group_borders is 9 5, expected LOW <= HIGH"),
        (["--data-dir", ".", "--save", "runs", "--epochs", "3", "--warmup-epochs", "4"],
         "warmup_epochs is 4, expected at most the 3 epochs"),
        (["--data-dir", ".", "--save", "runs", "--stage1", "run"],
         "stage1 is 'run', expected none: ce has no second stage"),
        (["--data-dir", ".", "--save", "runs", "--method", "lws", "--stage2-epochs", "0"],
         "stage2_epochs is 0, expected > 0 for lws"),
        (["--data-dir", ".", "--save", "runs", "--method", "wb", "--beta", "1"],
         "beta is 1, expected below 1"),
        (["--data-dir", ".", "--save", "runs", "--model", "vit_b_16", "--norm", "group"],
         "vit_b_16 has no BatchNorm"),
        (["--data-dir", "{data}", "--save", "runs", "--device", "cuda"], "no CUDA device"),
        (["--data-dir", ".", "--save", "runs", "--cuda-graph"],
         "device is 'cpu', expected 'cuda' with cuda_graph"),
        (["--data-dir", ".", "--save", "runs", "--device", "cuda", "--cuda-graph",
          "--distributed", "ddp"], "distributed is 'ddp', expected 'off' with cuda_graph"),
        (["--data-dir", ".", "--save", "runs", "--device", "cuda", "--cuda-graph", "--compile"],
         "compile is True, expected False with cuda_graph"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(argv, message, data_dir, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is one")
    argv = [word.format(data=data_dir) for word in argv]
    assert message in refused(["cifar10-lt", *argv], capsys)
    assert not (tmp_path / "runs").exists()


def test_a_directory_with_another_run_is_not_overwritten(data_dir, tmp_path, capsys):
    argv = ["cifar10-lt", *CIFAR, "--data-dir", data_dir, "--optimizer", "sgd", "--epochs", "1"]
    argv += ["--save", str(tmp_path / "runs")]
    assert train(*argv) == 0
    assert "is not empty" in refused(argv, capsys)
    (run,) = find_runs([tmp_path / "runs"])
    before = (run.path / "result.json").stat().st_mtime_ns
    assert train(*argv, "--resume") == 0  # complete: only shown
    assert (run.path / "result.json").stat().st_mtime_ns == before
    message = refused([*argv, "--resume", "--lr", "0.5"], capsys)
    assert "was begun with lr = 0.05, expected the same with --resume, not 0.5" in message


@pytest.mark.parametrize("package", ["torchvision", "pyyaml", "tensorboard"])
def test_a_package_that_is_not_installed_is_named(package, data_dir, tmp_path, capsys, monkeypatch):
    module = "yaml" if package == "pyyaml" else package
    installed = arguments.find_spec
    monkeypatch.setattr(arguments, "find_spec", lambda m: None if m == module else installed(m))
    argv = ["cifar10-lt", *CIFAR, "--data-dir", data_dir, "--save", str(tmp_path / "runs")]
    extra = "tensorboard" if package == "tensorboard" else "recipes"
    expected = f"{package} is not installed; pip install 'imbsam-fast[{extra}]'"
    assert expected in refused([*argv, "--tensorboard"], capsys)


def test_scalars_are_written_for_tensorboard(data_dir, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    argv = ["cifar10-lt", *CIFAR, "--data-dir", data_dir, "--optimizer", "sgd", "--tensorboard"]
    assert train(*argv, "--save", str(tmp_path / "runs")) == 0
    (run,) = find_runs([tmp_path / "runs"])
    events = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    written = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert written == [(r["epoch"], pytest.approx(r["loss"], rel=1e-6)) for r in run.log()]


def test_corrupt_images_are_named_or_counted(tmp_path, monkeypatch, capsys):
    argv = [*imagenet(tmp_path / "data", monkeypatch), "--data-dir", str(tmp_path / "data")]
    argv += ["--optimizer", "sgd", "--epochs", "1"]
    bad = sorted((tmp_path / "data" / "images").rglob("*.jpg"))[-1]
    bad.write_bytes(b"")
    message = refused([*argv, "--save", str(tmp_path / "a")], capsys)
    assert str(bad) in message and "--skip-corrupt" in message
    with pytest.warns(UserWarning, match="left out"):
        assert train(*argv, "--save", str(tmp_path / "b"), "--skip-corrupt") == 0
    result = json.loads(next((tmp_path / "b").rglob("result.json")).read_text())
    assert result["skipped_images"] == 1
    for path in (tmp_path / "data" / "images" / "ImageNet_LT_test 2").iterdir():
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="left out"):
        message = refused([*argv, "--save", str(tmp_path / "c"), "--skip-corrupt"], capsys)
    assert "no image of class 2 could be read for testing" in message


def test_lists_whose_classes_do_not_fit_are_named(tmp_path, monkeypatch, capsys):
    argv = [*imagenet(tmp_path / "data", monkeypatch), "--data-dir", str(tmp_path / "data")]
    argv += ["--optimizer", "sgd", "--save", str(tmp_path / "runs")]
    train_list, test_list = (tmp_path / "data" / name for name in LISTS)
    lines = test_list.read_text().splitlines()
    test_list.write_text("\n".join(lines[:-2]))
    assert "ImageNet_LT_test.txt' has no image of class 2, expected" in refused(argv, capsys)
    test_list.write_text("\n".join(lines))
    with train_list.open("a") as file:
        file.write(f"{lines[0].rsplit(' ', 1)[0]} 99999999999\n")
    assert "ImageNet_LT_train.txt' has no image of class 3, expected" in refused(argv, capsys)
    message = refused([*argv, "--image-root", "nowhere"], capsys)
    assert "--image-root is 'nowhere', expected a directory" in message
    assert not (tmp_path / "runs").exists()

"""The command line of the recipes: help, refusals in one line, and the dry run."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
from rich.console import Console

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from imbsam_fast import cli
from imbsam_fast.recipes.models.registry import check_image_size
from imbsam_fast.recipes.run_directory import RunDirectory, find_runs
from imbsam_fast.recipes.settings import arguments
from imbsam_fast.recipes.settings.config import resolve
from imbsam_fast.recipes.settings.datasets import DATASETS
from imbsam_fast.recipes.train import dry_run as dry_run_module
from imbsam_fast.recipes.train.options import _with_file, unread_options
from tests import commands, recipe_data

LISTS = ("iNaturalist18_train.txt", "iNaturalist18_val.txt")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("recipe", DATASETS)
def test_help_states_the_defaults_of_the_recipe(recipe, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", recipe, "--help"])
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    given = {"dataset": recipe, "data_dir": "", "optimizer": "imbsam", "seed": 0}
    config = resolve(DATASETS[recipe], given)
    for name in ("model", "batch_size", "lr", "weight_decay", "eta", "epochs", "momentum", "rho"):
        value = getattr(config, name)
        expected = f"{value:g}" if isinstance(value, float) else value
        option = f"--{name.replace('_', '-')} "
        described = shown[shown.rindex(option) :]
        assert re.search(r"default: ([^\s)]+)", described)[1] == str(expected), name
    assert "--stage2-lr X default: wb 0.01, lws 0.2" in shown


@pytest.mark.parametrize(
    ("argv", "usage"),
    [
        (["train", "digits", "--save", "x", "--epoch", "3"], "imbsam-fast train digits "),
        (["report", "x", "--output", "y"], "imbsam-fast report "),
        (["pack", "a", "b.npz", "--size", "8"], "imbsam-fast pack "),
    ],
)
def test_a_mistyped_option_shows_the_usage_of_its_command(argv, usage, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(f"usage: {usage}")
    assert f"unrecognized arguments: {argv[-2]} {argv[-1]}" in error


# ---------------------------------------------------------------- one line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "9" * 23], f"--seed: is '{'9' * 23}', expected a whole number 0 to"),
        (["--threads", "100000"], "--threads: is '100000', expected a whole number 1 to 1024"),
        (["--model", "vit_b_16"], "takes images of 8x8 pixels (Wrong image height"),
        (["--model", "convnext_tiny"], "takes images of 8x8 pixels ("),
    ],
)
def test_what_the_digits_cannot_be_trained_with_is_one_line(words, message, tmp_path, capsys):
    argv = ["train", "digits", "--optimizer", "sgd", "--save", str(tmp_path / "runs"), *words]
    assert message in commands.refused(argv, capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["convnet", "resnet8", "resnet34-cifar", "resnet50"])
def test_networks_that_take_any_size_are_let_through(name):
    check_image_size(name, "batch", 10, (8, 8))


def finished_digits(path: Path) -> RunDirectory:
    argv = ["train", "digits", "--optimizer", "sgd", "--epochs", "1", "--save", str(path)]
    assert cli.main(argv) == 0
    return find_runs([path])[0]


def test_digits_have_no_flip_column_and_are_analysed_without_torchvision(
    tmp_path, capsys, monkeypatch
):
    run = finished_digits(tmp_path / "runs")
    shown = capsys.readouterr().out
    assert "Few" in shown and "All, flip" not in shown
    assert cli.main(["report", str(run.path), "--out", str(tmp_path / "page.html")]) == 0
    shown = capsys.readouterr().out + (tmp_path / "page.html").read_text()
    assert "mean of the per-class" in shown
    assert "flip average" not in shown and "mirror image" not in shown
    installed = arguments.find_spec
    monkeypatch.setattr(
        arguments, "find_spec", lambda m: None if m == "torchvision" else installed(m)
    )
    quick = ["--only", "hessian", "--rows", "8", "--lanczos-steps", "2", "--trace-probes", "1",
             "--density-probes", "1", "--classes", "9"]  # fmt: skip
    analyze = ["analyze", str(run.path), *quick]
    (tmp_path / "file").touch()
    message = commands.refused([*analyze, "--out", str(tmp_path / "file" / "out")], capsys)
    assert "cannot write into" in message and "Not a directory" in message
    assert cli.main([*analyze, "--out", str(tmp_path / "out")]) == 0
    message = commands.refused(["train", "digits", "--model", "resnet50", "--save", "x"], capsys)
    assert "torchvision is not installed" in message


UNREAD = {
    "--optimizer sgd --rho 0.2": ["--rho"],
    "--optimizer sgd sgd-weighted --perturb-every 4 --lam 0.1": ["--lam", "--perturb-every"],
    "--optimizer sgd --tail-weight 3 --eta 7": ["--eta", "--tail-weight"],
    "--optimizer sam imbsam --gamma 2": ["--gamma"],
    "--optimizer sgd focal-sam --tail-weight 3": ["--tail-weight"],
    "--optimizer sgd-weighted --plan sampled --sample 0.5": ["--plan", "--sample"],
    "--optimizer sgd imbsam --rho 0.2": [],
    "--optimizer sgd sgd-weighted --eta 7 --tail-weight 3": [],
    "--optimizer sgd --preset released --eta 20 --batch-norm twice": [],  # what it has anyway
    "--gamma 2": [],
}


def unread_of(*words: str) -> list[str]:
    parser, _ = cli._parser(["train"])
    args = parser.parse_args(["train", "digits", *words])
    return unread_options(_with_file(args), vars(args))


@pytest.mark.parametrize("words", UNREAD)
def test_settings_that_no_run_reads_are_found(words):
    assert unread_of("--save", "x", *words.split()) == UNREAD[words]


def test_a_file_may_have_settings_that_its_runs_do_not_read(tmp_path):
    """As the config.yaml of a run has."""
    (tmp_path / "runs.yaml").write_text("optimizer: [sgd]\nrho: 0.2\nsave: x\n")
    assert unread_of("--config", str(tmp_path / "runs.yaml")) == []
    assert unread_of("--config", str(tmp_path / "runs.yaml"), "--gamma", "2") == ["--gamma"]


# ---------------------------------------------------------------- dry run


@pytest.mark.quick
def test_a_dry_run_says_what_all_will_take_and_writes_nothing(tmp_path, capsys, monkeypatch):
    data_dir = recipe_data.image_files(tmp_path / "data", [8, 8, 8], LISTS, ".")
    before = sorted(tmp_path.rglob("*"))
    measured = []
    table = dry_run_module._table
    monkeypatch.setattr(dry_run_module, "_table", lambda *a: measured.extend(a[0]) or table(*a))
    argv = ["train", "inaturalist2018", "--data-dir", str(data_dir), "--dry-run", "--eta", "8",
            "--model", "convnet", "--image-size", "16", "--batch-size", "8", "--workers", "2",
            "--optimizer", "sgd", "imbsam", "--epochs", "5", "--seeds", "3"]  # fmt: skip
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert [m.config.optimizer for m in measured] == ["sgd", "imbsam"]
    for m in measured:
        assert (m.steps_per_epoch, m.epochs) == (3, 5)
        assert m.epoch == 3 * max(m.step, m.read) and m.run(validated=False) > 5 * m.epoch
        assert 0 < m.read < m.first_batch
    assert "all 6 runs" in shown and "0.00 GB for batches under way" in shown
    if sys.platform == "linux":
        assert re.search(r"descriptors: \d+ of [\d,]+", shown)
        assert re.search(r"memory: [\d.]+ GB at most, and [\d.]+ GB in 2 workers", shown)
    # A dry run is told what a real checkpoint takes.
    said = float(re.search(r"checkpoint: ([\d.]+) MB", shown)[1])
    assert cli.main([*argv[:4], *argv[5:], "--save", str(tmp_path / "runs"), "--epochs", "1",
                     "--seeds", "1", "--optimizer", "sgd"]) == 0  # fmt: skip
    note = "imbsam-fast train inaturalist2018: --eta changes nothing with sgd\n"
    assert note in capsys.readouterr().err
    (run,) = find_runs([tmp_path / "runs"])
    assert (run.path / "last.pt").stat().st_size / 1e6 == pytest.approx(said, abs=0.06)


def test_a_dry_run_does_not_take_compiling_for_testing(monkeypatch):
    forwards = []

    def forward(training, images):
        if not forwards:
            time.sleep(0.5)  # as the first one under --compile
        forwards.append(len(images))

    monkeypatch.setattr(dry_run_module, "_forward", forward)
    given = {"dataset": "tiny", "optimizer": "sgd", "seed": 0}
    config = resolve(tiny_runs.TINY, given)
    (measured,) = dry_run_module.dry_run([config], tiny_runs.tiny_images(), Console(quiet=True))
    assert len(forwards) == 2 and measured.test < 0.5

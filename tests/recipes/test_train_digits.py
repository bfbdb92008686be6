"""`imbsam-fast train digits` as a user runs it: what it says, what it saves, what it refuses."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from imbsam_fast import ImbSAM, cli
from imbsam_fast.ops import dispatch, native
from imbsam_fast.recipes.data.datasets import load
from imbsam_fast.recipes.run_directory import find_runs
from imbsam_fast.recipes.settings import arguments
from imbsam_fast.recipes.train import command
from imbsam_fast.recipes.train.evaluation import evaluate
from imbsam_fast.recipes.train.options import configurations
from imbsam_fast.recipes.train.run import load_model
from imbsam_fast.recipes.train.tables import results_table
from tests import commands

pytest.importorskip("sklearn")

LABELS = [
    "SGD",
    "SGD, tail weight 2, eta 20",
    "SAM",
    "ImbSAM, released, eta 20",
    "Focal-SAM",
]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("IMBSAM_BACKEND", raising=False)


def train(*words: str) -> int:
    return cli.main(["train", "digits", *words])


def configs(*words: str) -> list:
    parser, _ = cli._parser(["train"])
    argv = ["train", "digits", "--seed", "0", "--seeds", "1", *words]
    return configurations(parser.parse_args(argv))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of every optimizer on two seeds: what it printed, and the directory."""
    save = tmp_path_factory.mktemp("runs") / "new" / "run"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setenv("COLUMNS", "200")
        patch.delenv("IMBSAM_BACKEND", raising=False)
        argv = ["--preset", "released", "--epochs", "4", "--seeds", "2", "--batch-size", "64"]
        assert train(*argv, "--save", str(save)) == 0
    return printed.getvalue(), save


def test_it_says_what_it_is_going_to_train(trained):
    shown = trained[0]
    assert (
        "digits: 304 training images in 10 classes (124 74 44 26 16 9 5 3 2 1), 500 test" in shown
    )
    assert "4, 5, 6, 7, 8, 9 (fewer than 20 images): 11.8 % of the training images" in shown
    assert "convnet, 24,346 parameters" in shown
    assert "auto (joint: rows of a batch share BatchNorm statistics)" in shown
    assert f"{dispatch.backend_name('cpu')} on cpu (" in shown
    assert "CE, 2 seeds of 4 epochs, batch 64, lr 0.05 cosine, rho 0.05, preset released" in shown


def test_the_table_is_what_the_results_say(trained):
    shown, save = trained
    runs = find_runs([save])
    for label in LABELS:
        results = [run.result() for run in runs if run.config["label"] == label]
        assert len(results) == 2
        (row,) = [line for line in shown.splitlines() if line.startswith(f"{label}  ")]
        cells = row.removeprefix(label).split()
        for i, column in enumerate(("many", "medium", "few", "all")):
            first, second = (result["last"]["plain"][column] for result in results)
            expected = [f"{(first + second) / 2:.1f}", f"±{abs(first - second) / 2**0.5:.1f}"]
            assert cells[2 * i : 2 * i + 2] == expected
        assert results[0]["last"]["plain"]["all"] > 15  # of ten classes, after four epochs


def test_results_hold_the_data_and_the_environment(trained):
    for run in find_runs([trained[1]]):
        result = run.result()
        assert result["class_counts"] == [124, 74, 44, 26, 16, 9, 5, 3, 2, 1]
        assert result["tail_classes"] == [4, 5, 6, 7, 8, 9]
        assert result["last"]["flip"] == result["last"]["plain"]
        assert result["environment"]["machine"]["torch_threads"] == 1
        assert result["environment"]["versions"]["torch"] == torch.__version__


def test_checkpoints_reproduce_the_reported_accuracy(trained):
    (config,) = configs("--optimizer", "sgd")
    data = load(config)
    for run in find_runs([trained[1]]):
        found = evaluate(load_model(run, 10), data.test, data.counts, confusion=True)
        assert found["plain"] == run.result()["last"]["plain"]


def test_checkpoints_hold_the_optimizer(trained):
    checkpoint = torch.load(
        trained[1] / "imbsam-released-eta20-seed0" / "last.pt", weights_only=True
    )
    weights = [torch.nn.Parameter(w) for w in checkpoint["model"].values() if w.is_floating_point()]
    trainable = weights[: len(checkpoint["optimizer"]["state"])]
    optimizer = ImbSAM(torch.optim.SGD(trainable, lr=1.0), rho=0.5)
    optimizer.load_state_dict(checkpoint["optimizer"])
    group = optimizer.param_groups[0]
    assert (group["rho"], group["momentum"]) == (0.05, 0.9)
    assert group["lr"] == pytest.approx(0, abs=1e-9)


def test_complete_runs_are_kept_and_compared(trained, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    _, save = trained
    argv = ["--preset", "released", "--epochs", "4", "--seeds", "2", "--batch-size", "64"]
    before = {path: path.stat().st_mtime_ns for path in save.rglob("*.pt")}
    assert train(*argv, "--save", str(save), "--resume") == 0
    assert before == {path: path.stat().st_mtime_ns for path in save.rglob("*.pt")}
    page = tmp_path / "page.html"
    assert cli.main(["report", str(save), "--out", str(page)]) == 0
    text = page.read_text()
    assert all(label in text for label in LABELS) and "<svg" in text


def test_a_run_in_use_is_refused_and_a_log_without_checkpoint_begins_again(tmp_path, capsys):
    argv = ["--optimizer", "sgd", "--epochs", "2", "--save", str(tmp_path / "runs")]
    assert train(*argv) == 0
    (run,) = find_runs([tmp_path / "runs"])
    for name in ("result.json", "last.pt"):  # as after a first checkpoint that failed
        (run.path / name).unlink()
    with run.in_use():
        assert "is in use: process " in refused([*argv, "--resume"], capsys)
    assert train(*argv, "--resume") == 0
    assert [row["epoch"] for row in run.log()] == [1, 2]


@pytest.mark.parametrize("method", ["wb", "lws"])
def test_the_other_methods(method, tmp_path, capsys):
    argv = ["--method", method, "--optimizer", "imbsam", "--epochs", "1", "--stage2-epochs", "1"]
    assert train(*argv, "--save", str(tmp_path / "runs")) == 0
    (run,) = find_runs([tmp_path / "runs"])
    assert run.config["label"] == f"{method.upper()}, ImbSAM, paper, eta 20"
    assert [row["epoch"] for row in run.log()] == [1, 2]


def test_a_single_optimizer_with_group_norm(tmp_path, capsys):
    argv = ["--optimizer", "imbsam", "--norm", "group", "--epochs", "1"]
    assert train(*argv, "--save", str(tmp_path / "runs")) == 0
    shown = capsys.readouterr().out
    assert "its rows do not influence each other" in shown
    assert "4, 5, 6, 7, 8, 9 (at most 20 images)" in shown
    assert "CE, 1 seed of 1 epoch" in shown and "±" not in shown


def test_threads_hold_for_the_run_only(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        command, "run_to_the_end", lambda *_: seen.append(torch.get_num_threads()) or RESULT
    )
    before = torch.get_num_threads()
    argv = ["--optimizer", "sgd", "--threads", str(before + 1), "--save", str(tmp_path / "runs")]
    assert train(*argv) == 0
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


GROUPS = dict.fromkeys(("many", "medium", "few", "all"), 100.0)
RESULT = {"last": {"plain": GROUPS, "flip": GROUPS}, "train_accuracy": 100.0, "seconds": 0.0}


@pytest.mark.parametrize(
    ("eta", "expected"),
    [("0", "none, ImbSAM is SGD (at most 0 images): 0.0 %"), ("200", "all, ImbSAM is SAM")],
)
def test_it_says_where_imbsam_is_another_method(eta, expected, tmp_path, capsys):
    argv = ["--optimizer", "sgd", "--epochs", "1", "--eta", eta]
    assert train(*argv, "--save", str(tmp_path / "runs")) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("forced", "expected"),
    [("reference", "reference on cpu (forced)"), (None, "no native: the compiled module")],
)
def test_it_says_why_it_runs_on_the_reference(forced, expected, tmp_path, capsys, monkeypatch):
    if forced:
        monkeypatch.setenv("IMBSAM_BACKEND", forced)
    else:
        monkeypatch.setattr(native, "_C", None)
        monkeypatch.setattr(native, "_load_error", "no such file", raising=False)
    argv = ["--optimizer", "imbsam", "--epochs", "1", "--save", str(tmp_path / "runs")]
    assert train(*argv) == 0
    assert expected in capsys.readouterr().out


def test_the_table_fits_eighty_columns(capsys):
    from rich.console import Console

    other = {"last": dict.fromkeys(("plain", "flip"), dict.fromkeys(GROUPS, 60.0))}
    Console(width=80).print(
        results_table({label: [RESULT, {**RESULT, **other}] for label in LABELS}, flip=True)
    )
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("80.0 ±28.3") for line in lines) == 5 * len(LABELS)


def test_defaults_make_the_few_classes_tail():
    found = configs("--optimizer", "sgd", "sgd-weighted", "sam", "imbsam", "focal-sam")
    assert len(found) == 5
    for config in found:
        assert (config.eta, config.inclusive, config.group_borders) == (20, True, (20, 100))
    assert [config.tail_weight for config in found] == [1, 2, 1, 1, 1]


def test_options_override_the_preset():
    given = ("--preset", "released", "--eta", "50", "--tail-weight", "1.5")
    control, imbsam = configs(*given, "--optimizer", "sgd-weighted", "imbsam")
    assert (imbsam.eta, imbsam.tail_weight, imbsam.batch_norm) == (50, 1.5, "twice")
    assert control.label() == "SGD, tail weight 1.5, eta 50"


# ---------------------------------------------------------------- refusals


def refused(words: list[str], capsys) -> str:
    return commands.refused(["train", "digits", *words], capsys)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--optimizer", "adam", "sgd"),
        ("--preset", "mine", "released"),
        ("--method", "ldam", "lws"),
        ("--eta", "-1", "a number >= 0"),
        ("--eta", "nan", "a number >= 0"),
        ("--rho", "-0.1", "a number >= 0"),
        ("--rho", "inf", "a number >= 0"),
        ("--tail-weight", "0", "a number > 0"),
        ("--plan", "both", "joint"),
        ("--epochs", "0", "a whole number >= 1"),
        ("--epochs", "1.5", "a whole number >= 1"),
        ("--batch-size", "0", "a whole number >= 1"),
        ("--lr", "0", "a number > 0"),
        ("--lr", "fast", "a number > 0"),
        ("--momentum", "1.1", "a number 0 to 1"),
        ("--weight-decay", "-1", "a number >= 0"),
        ("--norm", "layer", "group"),
        ("--seeds", "0", "a whole number 1 to 1000000"),
        ("--imbalance-factor", "0.5", "a number >= 1"),
        ("--threads", "0", "a whole number 1 to 1024"),
        ("--device", "tpu", "cuda"),
    ],
)
def test_a_bad_value_is_named_with_what_is_expected(option, value, expected, capsys):
    message = refused([f"{option}={value}"], capsys)
    assert f"argument {option}: " in message
    assert repr(value) in message
    assert expected in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--save is missing, expected a directory"),
        (["--imbalance-factor", "125"], "imbalance_factor is 125.0, expected 1 to 124"),
        (["--largest-class", "125"], "class 0 has 124 images, expected at least 125"),
        (["--validation", "1"], "class 0 has 124 images, expected at least 125: 124 for training"),
    ],
)
def test_what_the_digits_cannot_give_is_refused(words, expected, tmp_path, capsys):
    save = ["--save", str(tmp_path / "runs")] if words else []
    assert expected in refused([*words, *save], capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(tmp_path, capsys):
    message = refused(["--device", "cuda", "--save", str(tmp_path / "runs")], capsys)
    assert "--device is 'cuda', expected 'cpu': torch finds no CUDA device here" in message


def test_a_file_is_no_directory_to_save_in(tmp_path, capsys):
    path = tmp_path / "file"
    path.touch()
    message = refused(["--optimizer", "sgd", "--save", str(path)], capsys)
    assert f"cannot write into '{path / 'sgd-seed0'}': Not a directory" in message


@pytest.mark.parametrize(("module", "name"), [("sklearn", "scikit-learn"), ("yaml", "pyyaml")])
def test_missing_extras_are_named(module, name, monkeypatch, capsys, tmp_path):
    find_spec = arguments.find_spec
    monkeypatch.setattr(arguments, "find_spec", lambda m: None if m == module else find_spec(m))
    message = refused(["--save", str(tmp_path / "run")], capsys)
    assert message.endswith(f"{name} is not installed; pip install 'imbsam-fast[recipes]'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", ["fast", "triton"])
def test_a_forced_backend_that_cannot_be_used_is_refused(backend, monkeypatch, tmp_path, capsys):
    if dispatch.available("cpu").get(backend, "unknown") is None:
        pytest.skip(f"{backend} runs on this machine")
    monkeypatch.setenv("IMBSAM_BACKEND", backend)
    assert f"{backend!r}" in refused(["--save", str(tmp_path / "runs")], capsys)


def test_a_diverged_training_is_an_error(tmp_path, capsys):
    argv = ["--optimizer", "sgd", "--lr", "1e12", "--epochs", "1", "--save", str(tmp_path / "runs")]
    assert "try a --lr below 1e+12" in refused(argv, capsys)
    assert Path(tmp_path / "runs").exists()

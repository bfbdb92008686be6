"""The command line: what it prints, what it saves, and what it refuses."""

from __future__ import annotations

import importlib.metadata
import io
import json
import runpy
import subprocess
import sys
import types
from contextlib import redirect_stdout

import pytest
import torch

from imbsam_fast import ClassSplit, ImbSAM, cli, dispatch, env, native
from imbsam_fast.recipes import arguments, digits, options, train_digits, training
from imbsam_fast.recipes.models import ConvNet

METHODS = ["sgd", "sgd_weighted", "sam", "imbsam"]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("IMBSAM_BACKEND", raising=False)


def refused(argv: list[str], capsys) -> str:
    """The last line on stderr of a command line that must end with exit status 2."""
    try:
        status = cli.main(argv)
    except SystemExit as end:
        status = end.code
    assert status == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err.splitlines()[-1]


# ---------------------------------------------------------------- the command itself


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", ["imbsam_fast", "imbsam_fast.cli"])
def test_modules_run_as_the_command(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["imbsam-fast", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("imbsam-fast")


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert cli.main([]) == 0
    assert capsys.readouterr().out == shown
    assert all(f"    {command} " in shown for command in ("train", "bench", "info"))


def test_an_unknown_command_is_named(capsys):
    message = refused(["trian"], capsys)
    assert "'trian'" in message and all(name in message for name in cli.COMMANDS)


def test_bench_is_imported_only_for_its_subcommand(monkeypatch, capsys):
    bench = types.ModuleType("imbsam_fast.bench")
    bench.add_arguments = lambda parser: parser.add_argument("--size", type=int)
    bench.main = lambda args: args.size
    monkeypatch.setitem(sys.modules, "imbsam_fast.bench", bench)
    assert cli.main(["bench", "--size", "7"]) == 7
    monkeypatch.setitem(sys.modules, "imbsam_fast.bench", None)  # importing it now fails
    assert cli.main(["info"]) == 0
    with pytest.raises(ImportError):
        cli.main(["bench"])


def test_ctrl_c_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(options, "main", interrupted)
    assert cli.main(["train", "digits"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# ---------------------------------------------------------------- info


def test_environment_is_plain_and_complete():
    found = env.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["torch_threads"] == torch.get_num_threads()
    assert found["machine"]["cores"] >= 1 and found["machine"]["cpu"]
    assert found["native"]["isa_in_use"] in found["native"]["isas"] == native.isas()
    assert found["devices"][0]["type"] == "cpu"
    assert set(found["backends"]) == {device["type"] for device in found["devices"]}
    assert set(found["backends"]["cpu"]["operations"].values()) == {dispatch.backend_name("cpu")}


def test_every_operation_is_one_of_the_reference_and_of_torch():
    for operation in env.OPERATIONS:
        assert callable(getattr(dispatch.reference, operation))
        assert hasattr(torch.ops.imbsam_fast, operation)


def test_environment_names_the_commit_only_of_its_own_checkout(tmp_path, monkeypatch):
    def git(*args: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    module = tmp_path / "imbsam_fast" / "env.py"
    module.parent.mkdir()
    module.write_text("one")
    monkeypatch.setattr(env, "__file__", str(module))
    assert env.environment()["git_commit"] is None
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert env.environment()["git_commit"] == head
    module.write_text("two")
    assert env.environment()["git_commit"] == f"{head}-dirty"


def test_info_shows_versions_and_the_backend_of_every_operation(capsys):
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown and f"{native.isa_in_use()} (in use)" in shown
    used = dispatch.BACKENDS.index(dispatch.backend_name("cpu")) + 1
    for operation in env.OPERATIONS:
        (row,) = [line for line in shown.splitlines() if f" {operation} " in line]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert [i for i, cell in enumerate(cells) if cell == "used"] == [used]
    for backend, reason in dispatch.available("cpu").items():
        assert reason is None or f"{backend}: {reason}" in shown


def test_info_follows_a_forced_backend(monkeypatch, capsys):
    monkeypatch.setenv("IMBSAM_BACKEND", "reference")
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["backends"]["cpu"]
    assert report["forced"] == "reference" and report["error"] is None
    assert set(report["operations"].values()) == {"reference"}


def test_info_explains_a_backend_that_cannot_be_used(monkeypatch, capsys):
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_load_error", "no such file", raising=False)
    monkeypatch.setenv("IMBSAM_BACKEND", "native")
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "native: the compiled module imbsam_fast._C did not load: no such file" in shown
    assert "error: backend 'native' was asked for but cannot be used" in shown
    assert "used │" not in shown
    assert env.environment()["native"]["loaded"] is False


def test_info_explains_an_unknown_forced_backend(monkeypatch, capsys):
    monkeypatch.setenv("IMBSAM_BACKEND", "cuda")
    assert cli.main(["info"]) == 0
    assert "IMBSAM_BACKEND is 'cuda', expected one of native" in capsys.readouterr().out


# ---------------------------------------------------------------- train digits: a real run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of every method: what it printed, its directory and its results.json."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    directory = tmp_path_factory.mktemp("runs") / "new" / "run"
    argv = ["train", "digits", "--preset", "released", "--epochs", "4", "--seeds", "2"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setenv("COLUMNS", "200")
        patch.delenv("IMBSAM_BACKEND", raising=False)
        patch.setattr(train_digits, "TIMED_REPETITIONS", 3)
        assert cli.main([*argv, "--batch-size", "64", "--save", str(directory)]) == 0
    return printed.getvalue(), directory, json.loads((directory / "results.json").read_text())


def test_train_says_what_it_is_going_to_train(trained):
    shown = trained[0]
    assert "304 training images, 500 test images (50 a class)" in shown
    assert "124 74 44 26 16 9 5 3 2 1" in shown
    assert "4, 5, 6, 7, 8, 9 (fewer than 20 images), 11.8 % of the training images" in shown
    assert "24,058 parameters" in shown
    assert "joint (auto: rows of a batch share BatchNorm statistics)" in shown
    assert f"{dispatch.backend_name('cpu')} on cpu (" in shown


def test_train_table_is_what_the_results_say(trained):
    shown, _, results = trained
    for method in METHODS:
        result = results["results"][method]
        (row,) = [line for line in shown.splitlines() if line.startswith(f"{result['label']}  ")]
        cells = row.split(result["label"], 1)[1].split()
        columns = ("many", "medium", "few", "all")
        means, stds = result["mean"], result["std"]
        expected = [text for c in columns for text in (f"{means[c]:.1f}", f"±{stds[c]:.1f}")]
        assert cells[:8] == expected
        assert cells[8:] == [f"{t:.2f}x" for t in results["timing"]["relative"][method].values()]


def test_results_hold_settings_data_and_environment(trained):
    results = trained[2]
    assert list(results["results"]) == METHODS
    assert results["results"]["sgd_weighted"]["label"] == "SGD, tail weight 2"
    settings = results["settings"]
    assert (settings["preset"], settings["tail_weight"], settings["eta"]) == ("released", 2, 20)
    assert (settings["inclusive"], settings["batch_norm"]) == (False, "twice")
    assert results["data"]["class_counts"] == [124, 74, 44, 26, 16, 9, 5, 3, 2, 1]
    assert results["data"]["tail_classes"] == [4, 5, 6, 7, 8, 9]
    assert results["data"]["tail_fraction"] == pytest.approx(36 / 304)
    assert results["model"] == {"parameters": 24058, "plan": "joint"}
    assert results["timing"]["relative"]["sgd"]["reference"] == 1
    assert results["timing"]["relative"]["sam"]["reference"] > 1.2
    assert results["environment"]["machine"]["torch_threads"] == 1
    assert results["environment"]["versions"]["torch"] == torch.__version__


def test_results_average_classes_and_seeds(trained):
    for result in trained[2]["results"].values():
        assert [seed["seed"] for seed in result["seeds"]] == [0, 1]
        for seed in result["seeds"]:
            p = seed["per_class"]
            assert seed["many"] == p[0]
            assert seed["medium"] == pytest.approx(sum(p[1:4]) / 3)
            assert seed["few"] == pytest.approx(sum(p[4:]) / 6)
            assert seed["all"] == pytest.approx(sum(p) / 10)
        first, second = (seed["all"] for seed in result["seeds"])
        assert result["mean"]["all"] == pytest.approx((first + second) / 2)
        assert result["std"]["all"] == pytest.approx(abs(first - second) / 2**0.5)
        assert first > 15  # of ten classes, after four epochs


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_reproduce_the_reported_accuracy(trained, method):
    _, directory, results = trained
    checkpoint = torch.load(directory / f"checkpoint_{method}.pt", weights_only=True)
    assert (checkpoint["method"], checkpoint["seed"], checkpoint["epoch"]) == (method, 0, 4)
    assert checkpoint["config"] == results["settings"]
    model = ConvNet(checkpoint["config"]["norm"])
    model.load_state_dict(checkpoint["model"])
    accuracy = training.evaluate(model, digits.load(100, seed=0))
    assert accuracy == results["results"][method]["seeds"][0]["per_class"]
    assert accuracy == checkpoint["per_class_accuracy"]


def test_checkpoints_hold_the_optimizer(trained):
    checkpoint = torch.load(trained[1] / "checkpoint_imbsam.pt", weights_only=True)
    model = ConvNet()
    optimizer = ImbSAM(torch.optim.SGD(model.parameters(), lr=1.0), rho=0.5)
    optimizer.load_state_dict(checkpoint["optimizer"])
    group = optimizer.param_groups[0]
    assert (group["rho"], group["momentum"]) == (0.05, 0.9)
    assert group["lr"] == pytest.approx(0, abs=1e-9)
    assert all(optimizer.state[p]["momentum_buffer"].any() for p in model.parameters())


def test_the_picture_is_saved_and_not_blank(trained):
    from matplotlib.image import imread

    _, directory, _ = trained
    picture = imread(directory / "per_class_accuracy.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 1000
    colours = {tuple(c) for c in (picture[::3, ::3, :3].reshape(-1, 3) * 255).round().astype(int)}
    assert {(0xC8, 0x55, 0x3D), (0x9A, 0xA5, 0xB1), (0xC9, 0xA2, 0x27)} <= colours


def test_everything_saved_is_announced(trained):
    shown, directory, _ = trained
    files = sorted(path.name for path in directory.iterdir())
    expected = [f"checkpoint_{method}.pt" for method in METHODS]
    assert files == sorted([*expected, "per_class_accuracy.png", "results.json"])
    assert all(name in shown for name in files)


def test_a_single_optimizer_with_group_norm(capsys, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(train_digits, "TIMED_REPETITIONS", 1)
    argv = ["train", "digits", "--optimizer", "imbsam", "--norm", "group", "--epochs", "1"]
    assert cli.main([*argv, "--seeds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "split (auto: rows of a batch do not influence each other)" in shown
    assert "4, 5, 6, 7, 8, 9 (at most 20 images)" in shown
    rows = [line.split()[0] for line in shown.splitlines() if line.rstrip().endswith("x")]
    assert rows == ["ImbSAM"]
    assert "±" not in shown


def test_threads_hold_for_the_run_only(monkeypatch):
    pytest.importorskip("sklearn")
    seen = []
    monkeypatch.setattr(options, "run", lambda *args: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    assert cli.main(["train", "digits", "--threads", str(before + 1)]) == 0
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


@pytest.mark.parametrize(
    ("eta", "expected"),
    [("0", "none: ImbSAM is SGD (at most 0 images), 0.0 %"), ("200", "all: ImbSAM is SAM")],
)
def test_train_says_where_imbsam_is_another_method(eta, expected, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(train_digits, "TIMED_REPETITIONS", 1)
    argv = ["train", "digits", "--optimizer", "sgd", "--epochs", "1", "--seeds", "1", "--eta", eta]
    assert cli.main(argv) == 0
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("forced", "expected"),
    [("reference", "reference on cpu (forced)"), (None, "no native: the compiled module")],
)
def test_train_says_why_it_runs_on_the_reference(forced, expected, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    if forced:
        monkeypatch.setenv("IMBSAM_BACKEND", forced)
    else:
        monkeypatch.setattr(native, "_C", None)
        monkeypatch.setattr(native, "_load_error", "no such file", raising=False)
    monkeypatch.setattr(train_digits, "TIMED_REPETITIONS", 1)
    argv = ["train", "digits", "--optimizer", "imbsam", "--epochs", "1", "--seeds", "1"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert expected in shown
    (header,) = [line for line in shown.splitlines() if "classes " in line and "> 100" in line]
    assert header.split()[-1] == "reference" and "native" not in header


def test_the_table_fits_eighty_columns(capsys, trained):
    from rich.console import Console

    from imbsam_fast.recipes.report import print_results
    from imbsam_fast.recipes.results import Run
    from imbsam_fast.recipes.timing import Timings

    parser, _ = cli._parser(["train"])
    settings = options._settings(parser.parse_args(["train", "digits", "--preset", "released"]))
    runs = [Run(m, seed, 0.1, [100.0] * seed + [30.0] * (10 - seed))
            for m in METHODS for seed in range(10)]  # fmt: skip
    relative = {m: {"native": 2.5, "reference": 10.25} for m in METHODS}
    timings = Timings(1.0, relative, 10, 8)
    print_results(Console(width=80), settings, trained[2]["data"]["class_counts"], runs, timings)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("10.25x" in line for line in lines) == len(METHODS)


def test_defaults_make_the_few_classes_tail():
    parser, _ = cli._parser(["train"])
    args = parser.parse_args(["train", "digits"])
    settings = options._settings(args)
    assert settings.methods() == ["sgd", "sam", "imbsam"]
    assert (settings.eta, settings.inclusive, settings.tail_weight) == (20, True, 1)
    counts = digits.long_tail_counts(digits.MAX_PER_CLASS, settings.imbalance_factor, 10)
    expected = ClassSplit.from_counts(counts, eta=19)
    assert torch.equal(settings.split(counts).sharp, expected.sharp)


def test_options_override_the_preset():
    parser, _ = cli._parser(["train"])
    argv = ["train", "digits", "--preset", "released", "--eta", "50", "--tail-weight", "1.5"]
    settings = options._settings(parser.parse_args(argv))
    assert (settings.eta, settings.tail_weight, settings.batch_norm) == (50, 1.5, "twice")
    assert settings.label("sgd_weighted") == "SGD, tail weight 1.5"


# ---------------------------------------------------------------- train digits: refusals


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--optimizer", "adam", "sgd"),
        ("--preset", "mine", "released"),
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
        ("--seeds", "0", "a whole number >= 1"),
        ("--imbalance-factor", "0.5", "a number 1 to 124"),
        ("--imbalance-factor", "125", "a number 1 to 124"),
        ("--threads", "0", "a whole number >= 1"),
        ("--device", "tpu", "cuda"),
    ],
)
def test_a_bad_value_is_named_with_what_is_expected(option, value, expected, capsys):
    message = refused(["train", "digits", f"{option}={value}"], capsys)
    assert f"argument {option}: " in message
    assert repr(value) in message
    assert expected in message


def test_a_recipe_must_be_named(capsys):
    assert "RECIPE" in refused(["train"], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(capsys):
    message = refused(["train", "digits", "--device", "cuda"], capsys)
    assert "--device is 'cuda', expected 'cpu': torch finds no CUDA device here" in message


def test_results_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "results.json").write_text("mine")
    message = refused(["train", "digits", "--save", str(tmp_path)], capsys)
    assert f"--save is '{tmp_path}', expected a new or an empty directory" in message
    assert (tmp_path / "results.json").read_text() == "mine"


def test_a_file_is_no_directory_to_save_in(tmp_path, capsys):
    path = tmp_path / "file"
    path.touch()
    message = refused(["train", "digits", "--save", str(path)], capsys)
    assert f"--save is '{path}', expected a directory that can be written: File exists" in message


@pytest.mark.parametrize(
    ("missing", "save", "named"),
    [({"sklearn"}, False, "scikit-learn"), ({"matplotlib"}, True, "matplotlib")],
)
def test_missing_extras_are_named(missing, save, named, monkeypatch, capsys, tmp_path):
    find_spec = arguments.find_spec
    monkeypatch.setattr(arguments, "find_spec", lambda m: None if m in missing else find_spec(m))
    argv = ["train", "digits", *(["--save", str(tmp_path / "run")] if save else [])]
    message = refused(argv, capsys)
    assert message.endswith(f"{named} is not installed; pip install 'imbsam-fast[recipes]'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", ["fast", "triton"])
def test_a_forced_backend_that_cannot_be_used_is_refused(backend, monkeypatch, capsys):
    if dispatch.available("cpu").get(backend, "unknown") is None:
        pytest.skip(f"{backend} runs on this machine")
    monkeypatch.setenv("IMBSAM_BACKEND", backend)
    assert f"{backend!r}" in refused(["train", "digits"], capsys)


def test_a_diverged_training_is_an_error(capsys):
    pytest.importorskip("sklearn")
    argv = ["train", "digits", "--optimizer", "sgd", "--lr", "1e12", "--epochs", "1"]
    assert "try a --lr below 1e+12" in refused(argv, capsys)

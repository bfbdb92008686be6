"""The command itself, and `imbsam-fast info`."""

from __future__ import annotations

import importlib.metadata
import json
import runpy
import subprocess
import sys
import types

import pytest
import torch

from imbsam_fast import cli, env
from imbsam_fast.ops import dispatch, native
from imbsam_fast.recipes.train import options
from tests.commands import refused


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("IMBSAM_BACKEND", raising=False)


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


def test_a_recipe_must_be_named(capsys):
    assert "RECIPE" in refused(["train"], capsys)


def test_bench_is_imported_only_for_its_subcommand(monkeypatch, capsys):
    bench = types.ModuleType("imbsam_fast.bench.options")
    bench.add_arguments = lambda parser: parser.add_argument("--size", type=int)
    bench.main = lambda args: args.size
    monkeypatch.setitem(sys.modules, "imbsam_fast.bench.options", bench)
    assert cli.main(["bench", "--size", "7"]) == 7
    monkeypatch.setitem(sys.modules, "imbsam_fast.bench.options", None)  # importing it now fails
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


@pytest.mark.quick
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
    assert "native: the compiled module imbsam_fast.ops._C did not load: no such file" in shown
    assert "error: backend 'native' was asked for but cannot be used" in shown
    assert "used │" not in shown
    assert env.environment()["native"]["loaded"] is False


def test_info_explains_an_unknown_forced_backend(monkeypatch, capsys):
    monkeypatch.setenv("IMBSAM_BACKEND", "cuda")
    assert cli.main(["info"]) == 0
    assert "IMBSAM_BACKEND is 'cuda', expected one of native" in capsys.readouterr().out

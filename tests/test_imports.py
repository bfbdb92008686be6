"""Imports point down only, and none goes round; the command line starts without torch."""

from __future__ import annotations

import graphlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import imbsam_fast
from imbsam_fast import cli, kernels

grimp = pytest.importorskip("grimp", reason="grimp, which reads the imports, is not installed")

# What may import what (docs/design.md section 4): a name imports from the lines below its own and
# nothing else. Names on one line do not know each other. `imbsam_fast` itself is above all of them.
LINES = {
    "imbsam_fast": [
        "__main__",
        "cli",
        "recipes bench info integrations",
        "training",
        "optim",
        "losses",
        "split env",
        "ops",
        "kernels",
        "validation",
    ],
    "imbsam_fast.recipes": [
        "report",
        "analysis",
        "train anomaly",
        "data models run_directory metrics figures",
        "settings",
    ],
}


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """Who imports whom, imports for type hints included, with imbsam_fast.kernels in its place."""
    tree = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    sources = Path(imbsam_fast.__file__).parent
    shutil.copytree(sources, tree / "imbsam_fast", ignore=ignored)
    shutil.copytree(
        Path(kernels.__file__).parent,
        tree / "imbsam_fast" / "kernels",
        ignore=ignored,
        dirs_exist_ok=True,  # in a wheel it lies there already
    )
    (tree / "imbsam_fast" / "ops" / "_C.py").touch()  # compiled; it imports nothing of ours
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tree)
        patch.delitem(sys.modules, "imbsam_fast")  # else grimp finds where that came from
        return grimp.build_graph("imbsam_fast", include_external_packages=True, cache_dir=None)


def circle(arrows: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_the_graph_holds_every_module_and_hints_too(graph):
    assert {"imbsam_fast.kernels.updates", "imbsam_fast.recipes.train.options"} <= graph.modules
    assert "imbsam_fast.losses" in graph.find_modules_directly_imported_by("imbsam_fast")


def test_no_circle_of_modules(graph):
    assert circle({m: graph.find_modules_directly_imported_by(m) for m in graph.modules}) == []


def test_no_circle_of_packages(graph):
    own = {m for m in graph.modules if m.startswith("imbsam_fast")}
    packages = {m for m in own if graph.find_children(m)} - LINES.keys()

    def room(module: str) -> str:  # modules that lie directly in a package of LINES are their own
        return next((p for p in packages if module == p or module.startswith(f"{p}.")), module)

    arrows: dict[str, set[str]] = {}
    for module in own:
        imported = {room(m) for m in graph.find_modules_directly_imported_by(module)}
        arrows.setdefault(room(module), set()).update(imported - {room(module)})
    assert circle(arrows) == []


@pytest.mark.parametrize("package", LINES)
def test_imports_point_down(package, graph):
    layers = [set(line.split()) for line in LINES[package]]
    written = {f"{package}.{name}" for layer in layers for name in layer}
    assert graph.find_children(package) == written, "every module needs a line in LINES"
    up = graph.find_illegal_dependencies_for_layers(layers=layers, containers={package})
    shown = [f"{d.importer} -> {d.imported}: {[r.middle for r in d.routes]}" for d in up]
    assert not shown, "\n".join(shown)


def test_nothing_imports_what_stands_above_the_package(graph):
    """Not the names that `imbsam_fast` hands on, not benchmarks/ nor tests/."""
    assert graph.find_modules_that_directly_import("imbsam_fast") == set()
    assert not {"benchmarks", "tests"} & graph.modules


def test_at_most_nine_files_lie_directly_in_the_package():
    files = [p for p in Path(imbsam_fast.__file__).parent.iterdir() if p.is_file()]
    assert len([p for p in files if p.suffix not in (".so", ".pyd")]) <= 9


# ---------------------------------------------------------------- start-up

STARTS = [["--help"], ["--version"], ["trian"], ["train", "digits", "--optimizer", "sdg"]]
STARTS += [[command, "--no-such-option"] for command in cli.COMMANDS]


@pytest.mark.parametrize("argv", STARTS, ids=" ".join)
def test_answers_that_need_no_torch_do_not_wait_for_it(argv, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "imbsam_fast", *argv]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == (0 if argv[0] in ("--help", "--version") else 2), run.stderr[-2000:]
    lines = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert "imbsam_fast" in imported
    assert not imported & {"torch", "numpy", "triton"}

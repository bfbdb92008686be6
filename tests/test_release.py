"""What a release says in several places is the same, and nothing that is read can run code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
METADATA = PROJECT["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SUPPORT = (ROOT / "docs" / "support.md").read_text()


def test_the_version_is_said_alike():
    version = METADATA["version"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    heading = re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", changes, re.M)
    assert heading and heading[1] == version
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (\S+)$", citation, re.M)[1] == version
    released = re.search(r"^date-released: '?([\d-]+)'?$", citation, re.M)
    assert (released[1] if released else "unreleased") == heading[2]


def test_the_oldest_torch_is_said_alike():
    (floor,) = (d.partition(">=")[2] for d in METADATA["dependencies"] if d.startswith("torch>="))
    assert f"every torch from {floor} on" in (ROOT / "README.md").read_text()
    assert f"| torch | {floor} and newer |" in SUPPORT
    tests = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    versions = [tuple(map(int, v.split("."))) for v in re.findall(r'torch: "([\d.]+)"', tests)]
    assert min(versions)[:2] == tuple(map(int, floor.split(".")))


def test_the_pythons_are_said_alike():
    said = [re.fullmatch(r".*:: (3\.\d+)", c) for c in METADATA["classifiers"]]
    versions = [found[1] for found in said if found]
    assert METADATA["requires-python"] == f">={versions[0]}"
    built = PROJECT["tool"]["cibuildwheel"]["build"].split()
    assert built == [f"cp{v.replace('.', '')}-*" for v in versions]
    assert f"CPython {versions[0]} to {versions[-1]}" in SUPPORT
    readme = (ROOT / "README.md").read_text()
    assert f"Python {versions[0]} to {versions[-1]}" in readme


def test_the_release_has_the_architectures_of_its_image():
    makefile = (ROOT / "Makefile").read_text()
    (override,) = PROJECT["tool"]["cibuildwheel"]["overrides"]
    architectures = override["environment"]["IMBSAM_CUDA_ARCHITECTURES"]
    assert f"RELEASE_ARCHITECTURES := {architectures}\n" in makefile
    assert architectures in (ROOT / "docs" / "building.md").read_text()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_valid(workflow):
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    done = subprocess.run(
        [*command, "vendor.github-workflows", str(workflow)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_call_what_is_there():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    called = 0
    for path in WORKFLOWS:
        for line in re.findall(r"run: (.*)", path.read_text()):
            words = line.split()
            if words[0] == "make":
                assert words[1] in targets, line
            for word in words:
                if "/" in word and not word.startswith(("dist/", ".venv/", "--")):
                    assert (ROOT / word).exists(), line
            called += 1
    assert called > 5


def calls(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> object:
    return next((ast.literal_eval(k.value) for k in call.keywords if k.arg == name), None)


FORBIDDEN = re.compile(
    r"(pickle|dill|joblib|cloudpickle|marshal|shelve)\..*|yaml\.(unsafe_|full_)?load"
)
PACKAGE = [p for d in ("imbsam_fast", "kernels", "examples") for p in (ROOT / d).rglob("*.py")]


def test_nothing_that_is_read_can_run_code():
    loads = {"torch.load": 0, "np.load": 0}
    for path in PACKAGE:
        for call in calls(path):
            name = ast.unparse(call.func)
            if name == "torch.load":
                assert keyword(call, "weights_only") is True, path
            elif name in ("np.load", "numpy.load"):
                assert keyword(call, "allow_pickle") is False, path
            else:
                assert not FORBIDDEN.fullmatch(name), f"{path}: {name}"
                assert name not in ("eval", "exec"), path
            if name in loads:
                loads[name] += 1
    assert all(loads.values())

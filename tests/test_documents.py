"""What the documents cite is there: files, names, options, sections, lines of code."""

from __future__ import annotations

import argparse
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from imbsam_fast import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ["benchmarks", "cmake", "csrc", "docs", "examples", "imbsam_fast", "kernels", "tests"]
DESIGN = ROOT / "docs" / "design.md"
SOURCES = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".pyi", ".h", ".cuh", ".cu", ".cpp", ".cmake", ".md")
]
WRITTEN = ("benchmarks/plots", "benchmarks/results/gpu")  # by `make bench` and `make gpu`
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*-]+")
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def squeezed(text: str) -> str:
    return " ".join(text.split())


def sections(document: Path) -> list[str]:
    return re.findall(r"^#+ (.*)", document.read_text(), re.M)


def all_options(parser: argparse.ArgumentParser) -> set[str]:
    """Of `parser` and of its subcommands, at any depth."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*map(all_options, action.choices.values()))
    return found


def test_files_that_are_named_exist():
    named = {
        (str(source.relative_to(ROOT)), path.rstrip("./"))
        for source in (*DOCUMENTS, *SOURCES)
        for path in PATH.findall(source.read_text())
        if not path.startswith(WRITTEN)
    }
    assert len(named) > 50
    assert [(source, path) for source, path in named if not any(ROOT.glob(f"{path}*"))] == []


@documents
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", document.read_text()):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        if anchor:
            titles = [re.sub(r"[^\w -]", "", title).lower() for title in sections(target)]
            assert anchor in [title.replace(" ", "-") for title in titles], link


@documents
def test_names_of_modules_resolve(document, monkeypatch):
    pytest.importorskip("torchvision")  # without which benchmarks.bench_input has no import
    # transformers looks for another package of this name, and would find the folder here.
    monkeypatch.setitem(sys.modules, "kernels", None)
    for name in re.findall(
        r"\b(?:imbsam_fast|(?:benchmarks|tests)\.)[\w.]*\w", document.read_text()
    ):
        if "/" in name or name in FOLDERS:
            continue
        parts = name.split(".")
        found = import_module(parts[0])
        for i, part in enumerate(parts[1:], 2):
            if not hasattr(found, part):
                import_module(".".join(parts[:i]))
            found = getattr(found, part)


@documents
def test_options_of_commands_exist(document):
    text = document.read_text().replace("\\\n", " ")
    lines = re.findall(rf"imbsam-fast ((?:{'|'.join(cli.COMMANDS)})\b[^`\n]*)", text)
    for line in lines:
        parser, _ = cli._parser(line.split())
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line))
        assert options <= all_options(parser), line


def test_cited_sections_of_the_design_exist():
    numbers = {s.partition(".")[0] for s in sections(DESIGN)}
    cited = re.compile(r"docs/design\.md(?:'s)?[\s#/*]+sections? (\d+)")
    found = [(path, n) for path in SOURCES for n in cited.findall(path.read_text())]
    found += [("itself", n) for n in re.findall(r"section (\d+)", DESIGN.read_text())]
    assert len(found) > 5
    assert [(path, n) for path, n in found if n not in numbers] == []


def test_quoted_lines_of_code_are_those_of_the_sources():
    """A comment `quoted from FILES` in docs/kernels.md covers the table rows that follow."""
    folder = {"reference": "imbsam_fast/ops/", "C++": "csrc/", "Triton": "kernels/"}
    files: list[str] = []
    checked = 0
    for line in (ROOT / "docs" / "kernels.md").read_text().splitlines():
        if comment := re.fullmatch(r"<!-- quoted from (.*) -->", line):
            files = comment[1].split()
        elif row := re.fullmatch(r"\| (reference|C\+\+|Triton) \| (.*) \|", line):
            texts = [(ROOT / f).read_text() for f in files if f.startswith(folder[row[1]])]
            code = squeezed(" ".join(texts))
            for quote in re.findall(r"`([^`]+)`", row[2]):
                assert squeezed(quote.replace(r"\|", "|")) in code, f"{row[1]}: {quote}"
                checked += 1
    assert checked > 25


def test_the_code_of_the_guide_runs():
    """From the first block to the last, as a reader would type it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(), re.S)
    assert len(blocks) > 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/guide.md", "exec"), names)

"""Pages of the documentation site that no file in docs/ holds, and links between the others.

mkdocs calls what is here by its name (its "hooks"). docs/ and README.md stay as they are read
without a site, so links that leave docs/ are turned into those of pages.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from imbsam_fast import cli

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# Where a link leads that leaves the folder of its page -> the page that shows that.
MOVED = (
    (r"(?:\.\./)?README\.md", "index.md"),
    (r"(?:\.\./)?examples/(\w+)\.py", r"examples.md#\1"),
    (r"(?:\.\./)?examples/?", "examples.md"),
    (r"docs/", ""),
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Documents that the navigation does not name come last in it."""
    named = re.findall(r"[\w-]+\.md", str(config.nav))
    others = [p.name for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in named]
    if others:
        config.nav = [*(config.nav or []), {"More": others}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for name, text in (
        ("index.md", (ROOT / "README.md").read_text()),
        ("api.md", reference()),
        ("commands.md", commands()),
        ("examples.md", examples()),
    ):
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to README.md, docs/ and examples/ lead to pages, whatever page they stand on."""
    for pattern, target in MOVED:
        markdown = re.sub(rf"\]\({pattern}(?=[#)\w])", rf"]({target}", markdown)
    return markdown


def reference() -> str:
    """A section a public name, in the order of `imbsam_fast.__all__`, from its docstring."""
    tree = ast.parse((ROOT / "imbsam_fast" / "__init__.py").read_text())
    assigned = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    parts = ["# Python reference", "Made from the docstrings of `imbsam_fast`.", "## imbsam_fast"]
    for name in assigned["__all__"]:
        if name in assigned["_MODULES"]:
            parts.append(f"::: imbsam_fast.{assigned['_MODULES'][name]}.{name}")
    parts.append("## Integrations")
    described = (ROOT / "docs" / "integrations.md").read_text()
    for file in sorted((ROOT / "imbsam_fast" / "integrations").glob("[!_]*.py")):
        name = f"imbsam_fast.integrations.{file.stem}"
        if name in described:  # the others serve these
            parts.append(f"::: {name}")
    return "\n\n".join(parts) + "\n"


def commands() -> str:
    """What --help says, of every command and of each of its subcommands."""
    parts = ["# Command line", "What `--help` says; [Recipes](recipes.md) says more."]
    os.environ["COLUMNS"] = "96"  # of what argparse writes
    for name in cli.COMMANDS:
        parser, _ = cli._parser([name])
        parts += _help(_subparsers(parser)[name], level=2)
    return "\n\n".join(parts) + "\n"


def _help(parser: argparse.ArgumentParser, level: int) -> list[str]:
    text = parser.format_help().rstrip()
    inner = _subparsers(parser)
    found = [f"{'#' * level} {parser.prog}", f"````text\n{text}\n````"]
    for sub in inner.values():
        found += _help(sub, level + 1)
    return found


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def examples() -> str:
    """The files of examples/, each under its name."""
    parts = ["# Examples", "Complete programs on small data, run by the tests."]
    for file in EXAMPLES:
        parts += [f"## {file.stem} {{ #{file.stem} }}", f"```python\n{file.read_text()}```"]
    return "\n\n".join(parts) + "\n"

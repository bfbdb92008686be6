"""The documentation as a site: all pages are in it, links lead somewhere, a browser shows it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import browser
import pytest

import imbsam_fast
from imbsam_fast import cli

ROOT = Path(__file__).parent.parent
SITE = ROOT / "site" / "mkdocs.yml"
MADE = {"index.md", "api.md", "commands.md", "examples.md"}
NEEDED = ("material", "mkdocs", "mkdocstrings", "mkdocstrings_handlers")
MISSING = [name for name in NEEDED if find_spec(name) is None]


def test_the_navigation_names_what_is_there():
    navigation = SITE.read_text().partition("nav:")[2].partition("theme:")[0]
    listed = re.findall(r": (\w+\.md)$", navigation, re.M)
    assert len(listed) == len(set(listed)) and set(listed) >= MADE
    assert {path.name for path in (ROOT / "docs").glob("*.md")} | MADE >= set(listed)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as `make docs` does, warnings being errors."""
    if MISSING:
        pytest.skip("mkdocs-material and mkdocstrings, which make the site, are not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    command += ["--config-file", str(SITE), "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


BOTH = ("index.html", "api.html", "results.html")  # seen on a phone and on a desk
slow = pytest.mark.slow  # the site is built, by a process of its own


def targets(page: Path) -> set[str]:
    """Of links, pictures, styles and scripts."""
    text = re.sub(r"<(code|pre)\b.*?</\1>", "", page.read_text(), flags=re.S)
    return {unescape(x) for x in re.findall(r'<[^>]*?\s(?:href|src)="?([^"\s>]+)', text)}


@slow
def test_every_link_leads_to_a_page_and_a_place_on_it(site):
    pages = sorted(site.glob("*.html"))
    assert len(pages) > 15
    wrong = []
    for page in pages:
        for target in targets(page):
            if re.match(r"(https?|mailto|data):", target) or page.name == "404.html":
                continue
            path, _, anchor = unquote(target).partition("#")
            file = (page.parent / path.partition("?")[0]) if path else page
            file = file / "index.html" if file.is_dir() else file
            places = set(re.findall(r'\b(?:id|name)="?([^"\s>]+)', file.read_text())) if (
                anchor and file.is_file()
            ) else {anchor}  # fmt: skip
            if not file.is_file() or anchor not in {*places, "", "__skip"}:
                wrong.append((page.name, target))
    assert wrong == []


@slow
def test_every_document_is_in_the_navigation(site):
    linked = targets(site / "index.html")
    assert [d.name for d in (ROOT / "docs").glob("*.md") if f"{d.stem}.html" not in linked] == []


@slow
def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.glob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*>", page.read_text())
        assert [tag for tag in loaded if re.search(r'(?:src|href)="?https?:', tag)] == []


@slow
def test_the_references_hold_every_public_name_and_command(site):
    api, commands = ((site / f"{name}.html").read_text() for name in ("api", "commands"))
    for name in imbsam_fast.__all__:
        if name != "__version__":
            assert re.search(rf'id="imbsam_fast\.[\w.]*\b{name}"', api), name
    for name in cli.COMMANDS:
        assert f"imbsam-fast {name}" in commands
    assert "--perturb-every" in commands


@slow
@pytest.mark.skipif(browser.EXECUTABLE is None, reason=browser.REASON)
def test_a_browser_shows_every_page_without_a_missing_picture(site):
    handler = partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with browser.browser() as tab:
            for page in sorted(site.glob("*.html")):
                for width in (390, 1400) if page.name in BOTH else (390,):
                    tab.open(f"http://127.0.0.1:{server.server_port}/{page.name}", width)
                    assert tab.failures == [], page.name
                    assert tab.value("document.documentElement.scrollWidth") <= width, page.name
                broken = "[...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
                assert tab.value(broken) == [], page.name
                assert tab.value("document.querySelector('h1').textContent.trim()"), page.name
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    """Without a line for every request."""

    def log_message(self, format, *args):
        pass

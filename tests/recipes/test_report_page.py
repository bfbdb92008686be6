"""The pictures and the page of `imbsam-fast report`, and what a browser makes of it."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest
from tiny_runs import write_run

from imbsam_fast.recipes.figures import COLOURS, PALETTE, styles_of
from imbsam_fast.recipes.report import figures
from imbsam_fast.recipes.report import page as pages
from imbsam_fast.recipes.report.comparison import Comparison, Section, compare
from imbsam_fast.recipes.report.page import page
from imbsam_fast.recipes.report.svg import MARKER_PATHS, THEME

pytest.importorskip("yaml")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

draws = pytest.mark.slow  # of a page that a fixture makes, with some thirty pictures

CONFUSION = ["0:4 1:1", "0:3 1:1 2:1", "2:5"]
LOG = [{"epoch": e, "loss": 3.0 / e, "train_accuracy": 30.0 * e, "seconds": 2.0} for e in (1, 2, 3)]


def one_section(root: Path) -> Section:
    (section,) = compare([root]).sections
    return section


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """SGD, its control and three ImbSAM of two seeds, with class 1 the rarest."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        write_run(root / f"sgd{seed}", [80, 10 + seed, 40], seed=seed, log=LOG)
        for eta, rho in ((100.0, 0.05), (100.0, 0.1), (20.0, 0.05)):
            directory = write_run(
                root / f"imbsam{eta}{rho}{seed}",
                [75, 20 + seed + 100 * rho, 50],
                label=f"ImbSAM, paper, eta {eta:g}" + (", rho 0.1" if rho == 0.1 else ""),
                optimizer="imbsam",
                seed=seed,
                eta=eta,
                rho=rho,
                log=[{**row, "seconds": 4.0 + rho} for row in LOG],
            )
        result = json.loads((directory.path / "result.json").read_text())
        result["last"]["plain"]["confusion"] = CONFUSION
        result["class_names"] = ["cat", "<i>dog & co", "eel"]
        (directory.path / "result.json").write_text(json.dumps(result))
    return root


@pytest.fixture(scope="module")
def section(runs) -> Section:
    return one_section(runs)


# ---------------------------------------------------------------- pictures


def test_gain_over_sgd_from_frequent_to_rare_with_its_interval(section):
    chart = figures.gain_chart(section)
    axes = [panel.figure.axes[0] for panel in chart.panels]
    heights = [[bar.get_height() for bar in a.patches] for a in axes]
    assert heights == [[-5, 10, 15], [-5, 10, 15], [-5, 10, 20]]
    assert chart.panels[0].title == "ImbSAM, paper, eta 20, minus SGD"
    assert len({a.get_ylim() for a in axes}) == 1
    labels = [text.get_text() for text in axes[0].get_xticklabels()]
    assert labels == ["cat (200)", "eel (50)", "<i>dog & co (10)"]
    ends = axes[0].containers[1].lines[2][0].get_segments()
    assert [list(end[:, 1]) for end in ends] == [[-5, -5], [10, 10], [15, 15]]


def test_the_interval_of_a_gain_is_that_of_its_pairs(tmp_path):
    for seed, gain in enumerate((2.0, 4.0, 9.0)):
        write_run(tmp_path / f"a{seed}", [50, 10 * seed, 50], seed=seed)
        write_run(tmp_path / f"b{seed}", [50, 10 * seed + gain, 50], seed=seed, optimizer="sam")
    (panel,) = figures.gain_chart(one_section(tmp_path)).panels
    rarest = panel.figure.axes[0].containers[1].lines[2][0].get_segments()[2]
    half = 4.303 * 3.6055513 / 3**0.5
    assert list(rarest[:, 1]) == pytest.approx([5 - half, 5 + half])


def test_gain_of_many_classes_is_a_moving_average(tmp_path):
    counts = [2000 - k for k in range(400)]
    write_run(tmp_path / "a", [50.0] * 400, counts)
    write_run(tmp_path / "b", [50.0 + k // 8 for k in range(400)], counts, optimizer="sam")
    (panel,) = figures.gain_chart(one_section(tmp_path)).panels
    axes = panel.figure.axes[0]
    vertices = axes.collections[0].get_paths()[0].vertices
    assert not axes.patches and vertices[:, 1].max() == pytest.approx(49.0)
    assert len(axes.get_xticklabels()) <= figures.NAMES_UP_TO


def test_no_gain_without_sgd(tmp_path):
    write_run(tmp_path / "a", [1, 2, 3], optimizer="sam")
    assert figures.gain_chart(one_section(tmp_path)) is None


def test_accuracy_against_rho_and_eta_on_one_scale(section):
    (chart,) = figures.ablation_charts(section).values()
    assert [panel.title for panel in chart.panels] == [
        "All classes", "Many classes", "Medium classes", "Few classes"
    ]  # fmt: skip
    assert len({panel.figure.axes[0].get_ylim() for panel in chart.panels}) == 1
    few = chart.panels[3].figure.axes[0]
    lines = {line.get_label(): line for line in few.containers}
    x, y = lines["eta 100"].lines[0].get_data()
    assert list(x) == [0.05, 0.1] and list(y) == [25.5, 30.5]
    assert list(lines["eta 20"].lines[0].get_xdata()) == [0.05]
    assert list(chart.legend) == ["eta 20", "eta 100"]


def test_groups_of_classes_are_on_one_scale(section):
    for chart in (figures.groups_chart(section), figures.cost_chart(section)):
        axes = [panel.figure.axes[0] for panel in chart.panels]
        assert len(axes) == 4
        assert len({(a.get_xlim(), a.get_ylim()) for a in axes}) == 1
        assert all(len(a.containers) == 4 for a in axes)


def test_cost_needs_sgd(section, tmp_path):
    write_run(tmp_path / "a", [1, 2, 3], optimizer="sam", log=LOG)
    write_run(tmp_path / "b", [1, 2, 3], optimizer="imbsam", log=LOG)
    assert figures.cost_chart(one_section(tmp_path)) is None


def test_the_front_holds_what_nothing_beats():
    points = [(1.0, 60.0), (2.7, 72.0), (1.5, 71.0), (2.0, 70.0), (1.5, 69.0), (3.0, 72.0)]
    assert figures.front(points) == [(1.0, 60.0), (1.5, 71.0), (2.7, 72.0)]


def test_curves_are_means_over_seeds_and_losses_logarithms(section):
    loss, accuracy = figures.curves_chart(section).panels
    assert (loss.title, accuracy.title) == ("Training loss", "Training accuracy")
    axes = loss.figure.axes[0]
    assert list(axes.lines[0].get_ydata()) == [3.0, 1.5, 1.0]
    assert (axes.get_yscale(), accuracy.figure.axes[0].get_yscale()) == ("log", "linear")


def test_a_loss_of_zero_has_no_logarithm(tmp_path):
    write_run(tmp_path / "a", [1, 2, 3], log=[{"epoch": 1, "loss": 0.0}])
    (panel,) = figures.curves_chart(one_section(tmp_path)).panels
    assert panel.figure.axes[0].get_yscale() == "linear"


def test_a_matrix_shows_shares_of_a_class(section):
    (panel,) = figures.confusion_chart(section).panels
    axes = panel.figure.axes[0]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "80", (1, 0): "20", (0, 1): "60", (1, 1): "20", (2, 1): "20",
                     (2, 2): "100"}  # fmt: skip
    alpha = axes.images[0].get_array()[..., 3]
    assert alpha[0].tolist() == pytest.approx([0.8**0.5, 0.2**0.5, 0])


def test_no_matrix_where_none_is_recorded_or_of_too_many_classes(tmp_path, section, monkeypatch):
    write_run(tmp_path / "a", [1, 2, 3])
    assert figures.confusion_chart(one_section(tmp_path)) is None
    monkeypatch.setattr(figures, "CONFUSION_UP_TO", 2)
    assert figures.confusion_chart(section) is None


# ---------------------------------------------------------------- looks


def test_colours_are_the_methods_whatever_else_is_compared():
    assert len(set(COLOURS.values())) == len(COLOURS)
    sampled = {"optimizer": "imbsam", "plan": "sampled"}
    every = {"optimizer": "imbsam", "perturb_every": 4, "plan": "auto"}
    looks = styles_of([("a", {"optimizer": "sam"}), ("b", sampled), ("c", every)])
    assert [looks[k].colour for k in "abc"] == [COLOURS[k] for k in ("sam", "sampled", "every")]
    assert styles_of([("b", sampled)])["b"].colour == looks["b"].colour


def test_those_of_one_colour_look_different():
    looks = styles_of((str(i), {"optimizer": "imbsam"}) for i in range(8))
    assert len(set(looks.values())) == 8 and len({s.colour for s in looks.values()}) == 1


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_colour_has_one_for_the_dark_that_can_be_read():
    assert set(PALETTE) <= THEME.keys() and set(figures.MARKERS) == MARKER_PATHS.keys()
    for light, (name, dark) in THEME.items():
        if name == "grid":
            continue
        least = 4.5 if name in ("ink", "muted") else 2.0  # of yellow on white, 2.2
        assert 1.05 / (luminance(light) + 0.05) >= least, name
        assert (luminance(dark) + 0.05) / (luminance("#15181b") + 0.05) >= 4.5, name


# ---------------------------------------------------------------- page


class Document(HTMLParser):
    """What a page refers to, its ids, its tables' cells, headings and captions, its files."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.tables: list[list[int]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.attributes.append((tag, values))
        self.tags[tag] += 1
        self.ids.update([values["id"]] if "id" in values else [])
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append(0)
        if tag in ("td", "th"):
            self.tables[-1][-1] += int(values.get("colspan", 1))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, *names: str) -> list[str]:
        return [values[n] for _, values in self.attributes for n in names if n in values]


@pytest.fixture(scope="module")
def html(runs, tmp_path_factory) -> str:
    other = tmp_path_factory.mktemp("other")
    write_run(other / "[red]", [1, 2, 3], imbalance_factor=10.0, label="[b]<script>x</script>")
    write_run(other / "[/red]<b>", None, label="<script>")
    return page(compare([runs, other]))


@pytest.mark.quick
@draws
def test_the_page_is_whole_and_needs_nothing_else(html):
    document = Document(html)
    assert document.open == [] and document.tags["figure"] >= 7
    links = document.all("href", "src", "xlink:href", "srcset", "action", "data")
    assert all(link.startswith(("#", "data:")) for link in links)
    ids = {link[1:] for link in links if link.startswith("#")}
    assert ids <= document.ids.keys()
    assert not {"script", "link", "iframe"} & document.tags.keys()
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert {name for name, n in document.ids.items() if n > 1} == set()
    assert "The paper&#39;s columns hold its published numbers" in html and "77.8" in html
    assert "<script" not in html and "&lt;script&gt;" in html and "&lt;i&gt;dog" in html


@draws
def test_tables_have_captions_scopes_and_as_many_cells_in_every_row(html):
    document = Document(html)
    assert document.tags["table"] == document.tags["caption"] > 8
    assert all(len(set(rows)) == 1 for rows in document.tables)
    for tag, values in document.attributes:
        if tag == "th":
            assert values.get("scope") in ("row", "col", "colgroup")
        if tag == "svg" and values.get("class") != "key":
            assert values["role"] == "img" and values["aria-label"]
        if values.get("class") == "scroll":
            assert values["tabindex"] == "0" and values["aria-labelledby"] in document.ids
    assert document.tags["main"] == document.tags["h1"] == 1


@draws
def test_the_text_of_pictures_is_text_in_the_colours_of_the_page(html):
    drawings = re.findall(r'<svg role="img".*?</svg>', html, re.S)
    assert len(drawings) > 20 and all("<text" in drawn for drawn in drawings)
    known = {colour.lower() for colour in THEME}
    for drawn in drawings:
        assert not known & set(re.findall(r"#[0-9a-f]{6}\b", drawn))
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    for declared in re.findall(r":root \{(.*?)\}", html, re.S):
        names = set(re.findall(r"(--[\w-]+):", declared))
        assert used <= names


@draws
def test_files_in_the_page_are_the_tables(html):
    document = Document(html)
    files = {
        values["download"]: values["href"]
        for tag, values in document.attributes
        if "download" in values
    }
    assert len(files) == 2 * (document.tags["table"] + 3)  # classes of both, confusions of one
    content = {}
    for name, address in files.items():
        kind, data = re.fullmatch(r"data:([\w/]+);charset=utf-8;base64,(.*)", address).groups()
        assert kind == {"csv": "text/csv", "json": "application/json"}[name.rpartition(".")[2]]
        content[name] = base64.b64decode(data).decode()
    rows = list(csv.DictReader(io.StringIO(content["data-1-accuracy-last.csv"])))
    assert rows[0]["configuration"] == "SGD" and float(rows[0]["plain few mean"]) == 10.5
    found = json.loads(content["data-1-confusion.json"])["rows"]
    assert {"class": "<i>dog & co", "taken_for": "cat", "images": 6}.items() <= found[2].items()


def test_faults_and_unfinished_runs_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "_pictures", lambda section, name: iter(()))
    write_run(tmp_path / "a", None, log=LOG)
    comparison = compare([tmp_path, tmp_path / "missing"])
    html = page(comparison)
    assert "no finished run" in html and "not finished (3 of 3 epochs)" in html
    assert "holds no run" in html and Document(html).open == []
    assert Document(page(Comparison([], comparison.faults))).open == []


# ---------------------------------------------------------------- browser

OUTSIDE = """[...document.querySelectorAll('main *, header *')]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll, .wide'))
  .map(e => e.tagName + ' ' + e.textContent.slice(0, 40))"""


@pytest.mark.slow  # starts a browser, which lays out the page four times
@pytest.mark.skipif(browser.EXECUTABLE is None, reason=browser.REASON)
def test_a_browser_shows_it_on_a_phone_and_on_a_desk_in_the_light_and_in_the_dark(html, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(html)
    with browser.browser() as tab:
        for width in (390, 1400):
            for dark in (False, True):
                tab.open(file.as_uri(), width, dark=dark)
                assert tab.failures == []
                assert tab.value("document.documentElement.scrollWidth") == width
                assert tab.value(OUTSIDE) == []
                paper = tab.value("getComputedStyle(document.body).backgroundColor")
                assert paper == ("rgb(21, 24, 27)" if dark else "rgb(255, 255, 255)")
                check_panels(tab, width)
        check_sticky(tab)


def check_panels(tab: browser.Tab, width: int) -> None:
    """Side by side on a desk, below each other on a phone, with text that can be read."""
    lefts = tab.value(
        "[...document.querySelector('.panels').children].map(e => e.getBoundingClientRect().left)"
    )
    assert len(lefts) == 4 and len(set(lefts)) == (1 if width < 600 else 2)
    sizes = tab.value(
        "[...document.querySelectorAll('.panel svg text')].map(e => e.getBoundingClientRect())"
        ".map(r => Math.min(r.width, r.height)).filter(x => x > 0)"
    )
    assert len(sizes) > 100 and min(sizes) >= 6  # a digit's width, or a line's height
    assert tab.value("document.querySelectorAll('svg.key').length") > 0


def check_sticky(tab: browser.Tab) -> None:
    """The names of rows stay where they are while a table is scrolled."""
    tab.call("Emulation.setDeviceMetricsOverride", width=390, height=900, deviceScaleFactor=1,
             mobile=True)  # fmt: skip
    before, after, moved = tab.value(
        """(() => { const box = document.querySelectorAll('.table .scroll')[0];
        const name = box.querySelector('tbody th'), left = () => name.getBoundingClientRect().left;
        const before = left(); box.scrollLeft = 150;
        return [before, left(), box.scrollLeft]; })()"""
    )
    assert moved == 150 and after == before

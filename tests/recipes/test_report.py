"""`imbsam-fast report`: which runs are compared, their numbers, table, pictures and page."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from statistics import stdev

import pytest
from rich.console import Console
from tiny_runs import tiny_data_set, train, write_run

from imbsam_fast import cli
from imbsam_fast.recipes.data.digits import long_tail_counts
from imbsam_fast.recipes.metrics import group_of
from imbsam_fast.recipes.report import figures
from imbsam_fast.recipes.report.comparison import (
    Comparison,
    baseline,
    compare,
    differences,
    families,
)
from imbsam_fast.recipes.report.cost import Cost, cost
from imbsam_fast.recipes.report.page import page
from imbsam_fast.recipes.report.paper_results import REWEIGHTED_SAM, TABLES, paper_result
from imbsam_fast.recipes.report.table import accuracy_rows, print_comparison

pytest.importorskip("yaml")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


def one_section(root: Path):
    (section,) = compare([root]).sections
    return section


def shown(comparison: Comparison, width: int = 100) -> str:
    file = io.StringIO()
    print_comparison(Console(file=file, width=width), comparison)
    return file.getvalue()


# ---------------------------------------------------------------- groups of seeds


def test_seeds_of_a_configuration_are_one_row_with_mean_and_standard_deviation(tmp_path):
    for seed, few in enumerate((10.0, 20.0, 60.0)):
        write_run(tmp_path / str(seed), [90.0, few, 50.0], seed=seed, data_dir=f"/data{seed}")
    (group,) = one_section(tmp_path).groups
    assert [run.config["seed"] for run in group.runs] == [0, 1, 2]
    plain = group.accuracy("last", "plain")
    assert plain["few"] == (30.0, pytest.approx(stdev([10, 20, 60])))
    assert plain["many"] == (90.0, 0.0) and plain["medium"] == (50.0, 0.0)
    assert plain["all"][0] == pytest.approx((90 + 50 + 30) / 3)
    assert group.accuracy("last", "flip")["few"][0] == 31.0
    assert group.accuracy("best", "plain") is None
    assert [mean for mean, _ in group.per_class()] == [90.0, 30.0, 50.0]


def test_seeds_start_from_seeds_of_a_first_stage(tmp_path):
    for i, (first, seed) in enumerate((("a", 0), ("a", 1), ("b", 0))):
        write_run(tmp_path / str(i), [1, 2, 3], seed=seed, stage1=f"/runs/{first}-seed{seed}")
    groups = one_section(tmp_path).groups
    assert [len(group.runs) for group in groups] == [2, 1]
    assert groups[1].label == "SGD (stage1 /runs/b-seed)"


def test_a_single_seed_has_no_standard_deviation_and_an_empty_group_no_accuracy(tmp_path):
    write_run(tmp_path / "a", [90.0, 80.0], counts=[200, 150])
    plain = one_section(tmp_path).groups[0].accuracy("last", "plain")
    assert plain["all"] == (85.0, None) and plain["few"] is None


def test_equal_labels_are_told_apart_by_what_differs(tmp_path):
    for i, rho in enumerate((0.05, 0.1)):
        write_run(tmp_path / str(i), [1, 2, 3], label="ImbSAM", optimizer="imbsam", rho=rho)
    write_run(tmp_path / "sgd", [1, 2, 3])
    labels = [group.label for group in one_section(tmp_path).groups]
    assert labels == ["SGD", "ImbSAM (rho 0.05)", "ImbSAM (rho 0.1)"]


def test_a_seed_that_is_there_twice_counts_once_and_is_named(tmp_path):
    write_run(tmp_path / "a", [1, 2, 3])
    write_run(tmp_path / "b", [7, 8, 9])
    comparison = compare([tmp_path])
    assert len(comparison.sections[0].groups[0].runs) == 1
    ((path, what),) = comparison.faults
    assert path == tmp_path / "b" and "seed 0 again" in what and str(tmp_path / "a") in what


def test_a_run_given_twice_is_read_once(tmp_path):
    write_run(tmp_path / "a", [1, 2, 3])
    comparison = compare([tmp_path, tmp_path / "a"])
    assert len(comparison.sections[0].groups[0].runs) == 1 and not comparison.faults


def test_data_sets_are_not_mixed(tmp_path):
    write_run(tmp_path / "a", [1, 2, 3])
    write_run(tmp_path / "b", [1, 2, 3], imbalance_factor=10.0)
    write_run(tmp_path / "c", [1, 2, 3], counts=[300, 10, 50])
    write_run(tmp_path / "d", None, imbalance_factor=10.0, seed=1)
    sections = compare([tmp_path]).sections
    assert [(s.imbalance_factor, s.counts) for s in sections] == [
        (100.0, [200, 10, 50]),
        (10.0, [200, 10, 50]),
        (100.0, [300, 10, 50]),
    ]
    assert len(sections[1].groups[0].runs) == 2


def test_differences_lists_settings_that_vary_and_no_other(tmp_path):
    write_run(tmp_path / "a", [1, 2, 3])
    write_run(tmp_path / "b", [1, 2, 3], label="SAM", optimizer="sam", gamma=2.0)
    table = differences(one_section(tmp_path).groups)
    assert table == {"optimizer": ["sgd", "sam"], "gamma": ["-", "2"]}


# ---------------------------------------------------------------- damaged and unfinished runs


def damage_config(run: Path) -> None:
    (run / "config.yaml").write_text("label: [")


def damage_result(run: Path) -> None:
    (run / "result.json").write_text('{"last": ')


def drop_accuracies(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    del result["last"]["flip"]["few"]
    (run / "result.json").write_text(json.dumps(result))


def shorten_accuracies(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    result["last"]["plain"]["per_class"].pop()
    (run / "result.json").write_text(json.dumps(result))


def spoil_an_accuracy(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    result["last"]["plain"]["all"] = "high"
    (run / "result.json").write_text(json.dumps(result))


def damage_log(run: Path) -> None:
    (run / "log.jsonl").write_text("epoch 1\n")


def log_without_epochs(run: Path) -> None:
    (run / "log.jsonl").write_text('{"loss": 1.0}\n')


def damage_analysis(run: Path) -> None:
    (run / "analyses").mkdir()
    (run / "analyses" / "hessian-few.json").write_text('{"analysis": "hessian"}')


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (damage_config, "left out: .*config.yaml"),
        (damage_result, "without accuracies: its result is damaged"),
        (drop_accuracies, "without accuracies: its result is damaged.*few"),
        (shorten_accuracies, "3 class counts and 2 accuracies"),
        (spoil_an_accuracy, "an accuracy is 'high'"),
        (damage_log, "without curves: its log is damaged"),
        (log_without_epochs, "without curves: its log is damaged.*epoch"),
        (damage_analysis, "left out: damaged .*no classes in it"),
    ],
)
def test_a_damaged_run_is_named_and_the_others_are_compared(tmp_path, damage, what):
    row = {"epoch": 1, "loss": 1.0}
    write_run(tmp_path / "good", [1, 2, 3], log=[row])
    write_run(tmp_path / "bad", [4, 5, 6], log=[row], seed=1)
    damage(tmp_path / "bad")
    comparison = compare([tmp_path])
    (fault,) = comparison.faults
    assert tmp_path / "bad" in (fault.path, fault.path.parent.parent)
    assert re.search(what, fault.what)
    assert comparison.sections[0].groups[0].accuracy("last", "plain")["many"][0] in (1.0, 2.5)
    assert "bad" in shown(comparison, 1000) and "bad" in page(comparison)


def test_an_unfinished_run_is_named_and_has_curves_only(tmp_path):
    write_run(tmp_path / "a", None, log=[{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}])
    comparison = compare([tmp_path])
    assert "not finished (2 of 3 epochs)" in comparison.faults[0].what
    (section,) = comparison.sections
    assert section.groups[0].curve("loss") == [(1, 2.0, None), (2, 1.0, None)]
    assert not section.groups[0].finished and accuracy_rows(section, "last") == []
    assert all("no finished run" in text for text in (shown(comparison), page(comparison)))


@pytest.mark.parametrize(
    ("config", "planned"),
    [({"stage2_epochs": 10}, 13), ({"stage2_epochs": 10, "stage1": "a-seed0"}, 10),
     ({"epochs": "three"}, "unknown")],
)  # fmt: skip
def test_the_epochs_of_an_unfinished_run_are_those_of_its_stages(config, planned, tmp_path):
    write_run(tmp_path / "a", None, **config)
    (fault,) = compare([tmp_path]).faults
    assert f"not finished (0 of {planned} epochs)" in fault.what


def test_a_path_without_runs_is_named(tmp_path):
    write_run(tmp_path / "runs" / "a", [1, 2, 3])
    (tmp_path / "empty").mkdir()
    comparison = compare([tmp_path / "empty", tmp_path / "missing", tmp_path / "runs"])
    assert [fault.path.name for fault in comparison.faults] == ["empty", "missing"]
    assert len(comparison.sections) == 1


# ---------------------------------------------------------------- the paper's numbers


def test_the_papers_groups_average_to_its_overall_accuracy():
    """On CIFAR100-LT every class counts alike, so a misread number shows."""
    counts = long_tail_counts(500, 100, 100)
    share = {g: sum(group_of(n) == g for n in counts) / 100 for g in ("many", "medium", "few")}
    rows = [*TABLES["cifar100-lt", 100].values(), *REWEIGHTED_SAM.values()]
    assert len(rows) == 11
    for row in rows:
        mean = sum(share[group] * getattr(row, group) for group in share)
        assert mean == pytest.approx(row.all, abs=0.1), row


def test_where_the_paper_has_a_row():
    assert paper_result("cifar100-lt", 100, "ce", "imbsam").few == 19.4
    assert paper_result("cifar100-lt", 50, "wb", "imbsam").all == 59.3
    assert paper_result("inaturalist2018", 100.0, "lws", "sam").all == 69.5
    assert paper_result("cifar100-lt", 100, "ce", "sam", tail_weight=10).all == 48.8
    assert paper_result("cifar100-lt", 100, "ce", "sam", tail_weight=4) is None
    assert paper_result("cifar100-lt", 50, "ce", "sam", tail_weight=10) is None
    assert paper_result("cifar100-lt", 100, "ce", "focal-sam") is None
    assert paper_result("cifar100-lt", 100, "ce", "sgd-weighted", 2) is None
    assert paper_result("cifar10-lt", 100, "ce", "sgd") is None


def test_the_papers_row_stands_once_beside_the_nearest_setting(tmp_path):
    for rho in (0.01, 0.05, 0.1):
        write_run(tmp_path / str(rho), [1, 2, 3], label=f"rho {rho}", optimizer="imbsam", rho=rho)
    rows = accuracy_rows(one_section(tmp_path), "last")
    assert [row.paper and row.paper.all for row in rows] == [None, 51.1, None]


# ---------------------------------------------------------------- table


def test_the_table_in_a_terminal(tmp_path):
    for seed, few in enumerate((10.0, 20.0)):
        write_run(tmp_path / str(seed), [90.0, few, 50.0], seed=seed)
    text = shown(compare([tmp_path]))
    assert "90.0 ±0.0" in text and "15.0 ±7.1" in text and "16.0 ±7.1" in text
    assert "cifar100-lt: 260 training images, 200 to 10 in each of 3 classes" in text
    paper = next(line for line in text.splitlines() if line.split()[:1] == ["paper"])
    assert paper.split() == ["paper", "77.8", "46.6", "13.5", "47.6"]
    assert "Settings that differ" not in text


def test_markup_in_names_is_text(tmp_path):
    write_run(tmp_path / "[red]", [1, 2, 3], label="[bold]<script>x</script>")
    write_run(tmp_path / "[/red]x", None, label="[/bold]")
    comparison = compare([tmp_path])
    assert "[bold]<script>" in shown(comparison, 300)
    html = page(comparison)
    assert "<script" not in html and "&lt;script&gt;" in html


# ---------------------------------------------------------------- pictures


@pytest.fixture
def section(tmp_path):
    """SGD, its control and two ImbSAM of two seeds, with class 1 the rarest."""
    log = [{"epoch": e, "loss": 3.0 / e, "train_accuracy": 30.0 * e} for e in (1, 2, 3)]
    for seed in (0, 1):
        write_run(tmp_path / f"sgd{seed}", [80, 10 + seed, 40], seed=seed, log=log)
        for eta, rho in ((100.0, 0.05), (100.0, 0.1), (20.0, 0.05)):
            write_run(
                tmp_path / f"imbsam{eta}{rho}{seed}",
                [75, 20 + seed + 100 * rho, 50],
                label=f"ImbSAM, paper, eta {eta:g}" + (", rho 0.1" if rho == 0.1 else ""),
                optimizer="imbsam",
                seed=seed,
                eta=eta,
                rho=rho,
                log=log,
            )
    return one_section(tmp_path)


def test_gain_over_sgd_from_frequent_to_rare(section):
    figure = figures.gain_figure(section)
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes]
    assert heights == [[-5, 10, 15], [-5, 10, 15], [-5, 10, 20]]
    assert figure.axes[0].get_title("left") == "ImbSAM, paper, eta 20, minus SGD"


def test_gain_of_many_classes_is_a_moving_average(tmp_path):
    counts = [2000 - k for k in range(400)]
    write_run(tmp_path / "a", [50.0] * 400, counts)
    write_run(tmp_path / "b", [50.0 + k // 8 for k in range(400)], counts, optimizer="sam")
    (axes,) = figures.gain_figure(one_section(tmp_path)).axes
    vertices = axes.collections[0].get_paths()[0].vertices
    assert not axes.patches and vertices[:, 1].max() == pytest.approx(49.0)


def test_no_gain_without_sgd(tmp_path):
    write_run(tmp_path / "a", [1, 2, 3], optimizer="sam")
    assert figures.gain_figure(one_section(tmp_path)) is None


def test_the_baseline_is_the_sgd_that_differs_least(tmp_path):
    for i, (optimizer, model) in enumerate((("sgd", "a"), ("sgd", "b"), ("sam", "b"))):
        write_run(tmp_path / str(i), [1, 2, 3], label=optimizer, optimizer=optimizer, model=model)
    write_run(tmp_path / "wb", [1, 2, 3], label="WB", method="wb", optimizer="sam")
    groups = one_section(tmp_path).groups
    by_label = {group.label: group for group in groups}
    assert baseline(by_label["sam"], groups).config["model"] == "b"
    assert baseline(by_label["WB"], groups) is None
    assert baseline(groups[0], groups) is None


def test_families_differ_in_rho_and_eta_alone(section):
    (family,) = families(section.groups)
    assert family.label == "ImbSAM, paper"
    assert list(family.members) == [(20.0, 0.05), (100.0, 0.05), (100.0, 0.1)]


def test_accuracy_against_rho_and_eta(section):
    (figure,) = figures.ablation_figures(section).values()
    few = figure.axes[3]
    assert few.get_title("left") == "Few classes"
    lines = {line.get_label(): line for line in few.containers}
    x, y = lines["eta 100"].lines[0].get_data()
    assert list(x) == [0.05, 0.1] and list(y) == [25.5, 30.5]
    assert list(lines["eta 20"].lines[0].get_xdata()) == [0.05]


def test_curves_are_means_over_seeds(section):
    figure = figures.curves_figure(section)
    titles = [axes.get_title("left") for axes in figure.axes if axes.get_visible()]
    assert titles == ["Training loss", "Training accuracy"]
    assert list(figure.axes[0].lines[0].get_ydata()) == [3.0, 1.5, 1.0]


def test_many_groups_look_different():
    looks = figures.styles_of([str(i) for i in range(32)])
    assert len(set(looks.values())) == 32


# ---------------------------------------------------------------- page


class Document(HTMLParser):
    """What a page refers to, its ids, and the cells of every table's rows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.open: list[str] = []
        self.cells: list[int] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags[tag] += 1
        self.ids.update([values["id"]] if "id" in values else [])
        names = ("href", "src", "xlink:href", "srcset", "action", "data")
        self.links += [values[name] for name in names if name in values]
        if tag == "tr":
            self.cells.append(0)
        if tag in ("td", "th"):
            self.cells[-1] += int(values.get("colspan", 1))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(section, tmp_path):
    write_run(tmp_path / "other", [1, 2, 3], imbalance_factor=10.0)
    html = page(compare([tmp_path]))
    document = Document(html)
    assert document.open == [] and document.tags["svg"] == document.tags["figure"] == 5
    assert all(link.startswith("#") for link in document.links)
    assert "script" not in document.tags and "link" not in document.tags
    assert "@import" not in html and "url(http" not in html
    glyphs = {name for name in document.ids if name.startswith("DejaVu")}
    repeated = {name for name, n in document.ids.items() if n > 1} - glyphs
    assert not {f"#{name}" for name in repeated} & set(document.links)
    assert "The paper's columns hold its published numbers" in html and "77.8" in html


def test_rows_of_a_table_have_its_columns(section, tmp_path):
    document = Document(page(compare([tmp_path])))
    accuracy = 4 + 3 * 4  # label, seeds, time, memory; plain, flip, paper
    assert document.cells[:6] == [accuracy, 12, *[accuracy] * 4]
    assert document.cells[6:11] == [4] * 5  # settings: label, optimizer, rho, eta


# ---------------------------------------------------------------- command


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[Path]:
    """Two seeds of SGD and ImbSAM by the real training code."""
    root = tmp_path_factory.mktemp("trained")
    with tiny_data_set():
        for seed in (0, 1):
            for optimizer in ("sgd", "imbsam"):
                train(root, optimizer, seed)
        yield root


def test_report_of_real_runs(trained, tmp_path, capsys):
    file = tmp_path / "report.html"
    assert cli.main(["report", str(trained), "--out", str(file)]) == 0
    text = capsys.readouterr().out
    results = [json.loads(f.read_text()) for f in sorted(trained.glob("sgd*/result.json"))]
    every = [result["last"]["plain"]["all"] for result in results]
    cell = f"{sum(every) / 2:.1f} ±{stdev(every):.1f}"
    assert len(every) == 2 and cell in text and str(file) in text.replace("\n", "")
    html = file.read_text()
    assert cell in html and "Training curves" in html and "Gain over SGD" in html
    assert Document(html).open == []


def test_exit_codes(tmp_path, capsys):
    write_run(tmp_path / "a", [1, 2, 3])
    (tmp_path / "b").mkdir()
    assert cli.main(["report", str(tmp_path / "b")]) == 1
    assert "holds no run" in capsys.readouterr().out.replace("\n", " ")
    assert cli.main(["report", str(tmp_path / "a")]) == 0
    missing = tmp_path / "missing" / "report.html"
    assert cli.main(["report", str(tmp_path / "a"), "--out", str(missing)]) == 2
    assert "expected a file in a directory that exists" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "a"), "--out", str(tmp_path / "b")]) == 2
    assert "cannot be written" in capsys.readouterr().err


# ---------------------------------------------------------------- cost


def test_cost_is_the_time_of_an_epoch_in_those_of_sgd_and_the_peak_memory(tmp_path):
    def log(*seconds: float) -> list[dict]:
        return [{"epoch": i, "stage": "train", "seconds": s} for i, s in enumerate(seconds, 1)]

    for seed in (0, 1):
        write_run(tmp_path / f"sgd{seed}", [1, 2, 3], log=log(2, 2, 50), seed=seed)
        imbsam = {"label": "ImbSAM", "optimizer": "imbsam", "seed": seed}
        directory = write_run(tmp_path / f"imbsam{seed}", [1, 2, 4], log=log(5, 6, 3), **imbsam)
        result = json.loads((directory.path / "result.json").read_text())
        result["peak_bytes"] = 10**9 * (seed + 1)
        (directory.path / "result.json").write_text(json.dumps(result))
    write_run(tmp_path / "sam", [1, 2, 4], label="SAM", optimizer="sam")  # without a log
    section = one_section(tmp_path)
    costs = {group.label: cost(group, section.groups) for group in section.groups}
    assert costs == {
        "SGD": Cost(1.0, None), "SAM": Cost(None, None), "ImbSAM": Cost(2.5, 2 * 10**9)
    }  # fmt: skip
    assert costs["ImbSAM"].texts() == ("2.50", "2.00")
    assert costs["SAM"].texts() == ("-", "-")
    drawn = figures.cost_figure(section)
    assert [len(axes.containers) for axes in drawn.axes] == [2] * 4
    assert "2.50" in shown(compare([tmp_path])) and "Accuracy against cost" in page(
        compare([tmp_path])
    )
    section.groups = [group for group in section.groups if group.label != "SGD"]
    assert figures.cost_figure(section) is None

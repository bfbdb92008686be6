"""`imbsam-fast report`: which runs are compared, their numbers and tables, and the command."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import stdev

import pytest
from rich.console import Console
from tiny_runs import TEST_PER_CLASS, tiny_data_set, train, write_run

from imbsam_fast import cli
from imbsam_fast.recipes.data.digits import long_tail_counts
from imbsam_fast.recipes.metrics import group_of
from imbsam_fast.recipes.report.accuracy import accuracy_rows
from imbsam_fast.recipes.report.comparison import Comparison, compare, differences
from imbsam_fast.recipes.report.paper_results import REWEIGHTED_SAM, TABLES, paper_result
from imbsam_fast.recipes.report.terminal import print_comparison

pytest.importorskip("yaml")


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


RELEASED = {"preset": "released", "batch_norm": "twice", "rho": 0.1, "plan": "joint"}


@pytest.mark.parametrize(
    ("optimizer", "settings", "rows"),
    [
        ("sgd", {**RELEASED, "eta": 20.0, "inclusive": False, "tail_weight": 2.0}, 1),
        ("sgd", {"lr": 0.1}, 2),
        ("sgd-weighted", RELEASED, 1),
        ("sgd-weighted", {"eta": 20.0}, 2),
        ("sgd-weighted", {"tail_weight": 2.0}, 2),
        ("imbsam", {"rho": 0.1}, 2),
    ],
)
def test_settings_that_an_optimizer_does_not_read_make_no_other_row(
    optimizer, settings, rows, tmp_path
):
    write_run(tmp_path / "a", [1, 2, 3], optimizer=optimizer)
    write_run(tmp_path / "b", [1, 2, 3], optimizer=optimizer, seed=1, **settings)
    labels = [group.label for group in one_section(tmp_path).groups]
    assert len(labels) == rows and all("(" in label for label in labels if rows == 2)


def test_losses_of_the_tail_are_averaged_over_runs_with_the_same_tail(tmp_path):
    for seed, (eta, loss) in enumerate([(100.0, 1.0), (20.0, 5.0), (100.0, 2.0)]):
        log = [{"epoch": 1, "loss": loss, "tail": loss}]
        write_run(tmp_path / str(seed), [1, 2, 3], log=log, seed=seed, eta=eta)
    (group,) = one_section(tmp_path).groups
    assert group.curve("tail") == [(1, 1.5, pytest.approx(0.5**0.5))]
    assert group.curve("loss")[0][1] == pytest.approx(8 / 3)


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
    write_run(tmp_path / "b", [1, 2, 3], label="SAM", optimizer="sam", beta=2.0)
    table = differences(one_section(tmp_path).groups)
    assert table == {"optimizer": ["sgd", "sam"], "beta": ["-", "2"]}


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


def add_confusions(run: Path, rows: list[str]) -> None:
    result = json.loads((run / "result.json").read_text())
    result["last"]["plain"]["confusion"] = rows
    (run / "result.json").write_text(json.dumps(result))


def spoil_a_confusion(run: Path) -> None:
    add_confusions(run, ["0:5", "0:x", ""])


def shorten_confusions(run: Path) -> None:
    add_confusions(run, ["0:5", "1:2"])


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
        (spoil_a_confusion, "'0:x' in a row of confusions, expected class:count"),
        (shorten_confusions, "3 class counts and other confusions"),
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
    assert "bad" in shown(comparison, 1000)


def test_an_unfinished_run_is_named_and_has_curves_only(tmp_path):
    write_run(tmp_path / "a", None, log=[{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}])
    comparison = compare([tmp_path])
    assert "not finished (2 of 3 epochs)" in comparison.faults[0].what
    (section,) = comparison.sections
    assert section.groups[0].curve("loss") == [(1, 2.0, None), (2, 1.0, None)]
    assert not section.groups[0].finished and accuracy_rows(section, "last") == []
    assert "no finished run" in shown(comparison)


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


@pytest.mark.quick
def test_the_table_in_a_terminal(tmp_path):
    for seed, few in enumerate((10.0, 20.0)):
        write_run(tmp_path / str(seed), [90.0, few, 50.0], seed=seed)
    text = shown(compare([tmp_path]))
    assert "90.0 ±0.0" in text and "15.0 ±7.1" in text and "16.0 ±7.1" in text
    assert "cifar100-lt: 260 training images, 200 to 10 in each of 3 classes" in text
    paper = next(line for line in text.splitlines() if line.split()[:1] == ["paper"])
    assert paper.split() == ["paper", "77.8", "46.6", "13.5", "47.6"]
    assert "Settings that differ" not in text and "minus" not in text


def test_markup_in_names_is_text(tmp_path):
    write_run(tmp_path / "[red]", [1, 2, 3], label="[bold]<script>x</script>")
    write_run(tmp_path / "[/red]x", None, label="[/bold]")
    comparison = compare([tmp_path])
    assert "[bold]<script>" in shown(comparison, 300)


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


@pytest.mark.slow  # trains, and draws a page
def test_report_of_real_runs(trained, tmp_path, capsys):
    file = tmp_path / "report.html"
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    tables = tmp_path / "tables"
    command = ["report", str(trained), "--out", str(file), "--tables", str(tables)]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    results = [json.loads(f.read_text()) for f in sorted(trained.glob("sgd*/result.json"))]
    every = [result["last"]["plain"]["all"] for result in results]
    cell = f"{sum(every) / 2:.1f} ±{stdev(every):.1f}"
    assert len(every) == 2 and cell in text and str(file) in text.replace("\n", "")
    html = file.read_text()
    assert cell in html and "Training curves" in html and "Gain over SGD" in html
    assert "What is taken for what" in html  # real runs record it
    rows = json.loads((tables / "data-1-confusion.json").read_text())["rows"]
    assert sum(row["images"] for row in rows) == 2 * 2 * 4 * TEST_PER_CLASS
    recorded = list(csv.DictReader((tables / "data-1-accuracy-last.csv").open()))
    assert float(recorded[0]["plain all mean"]) == pytest.approx(sum(every) / 2)


@pytest.mark.quick
def test_exit_codes(tmp_path, capsys):
    write_run(tmp_path / "a", [1, 2, 3])
    (tmp_path / "b").mkdir()
    assert cli.main(["report", str(tmp_path / "b")]) == 1
    assert "holds no run" in capsys.readouterr().out.replace("\n", " ")
    assert cli.main(["report", str(tmp_path / "a")]) == 0
    missing = tmp_path / "missing" / "report.html"
    assert cli.main(["report", str(tmp_path / "a"), "--out", str(missing)]) == 2
    assert "expected a file in a directory that exists" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    for option, place in (("--out", tmp_path / "b"), ("--tables", tmp_path / "a" / "config.yaml")):
        assert cli.main(["report", str(tmp_path / "a"), option, str(place)]) == 2
        assert f"{option} is" in (error := capsys.readouterr().err) and "be written" in error

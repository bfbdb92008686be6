"""What the report compares: seed by seed, with SGD and with the control; cost, marks, commands."""

from __future__ import annotations

import csv
import io
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import write_run

from imbsam_fast import cli
from imbsam_fast.recipes.metrics import confusion_rows, read_confusion
from imbsam_fast.recipes.report.comparison import Section, compare, families
from imbsam_fast.recipes.report.cost import Cost, cost
from imbsam_fast.recipes.report.pairs import (
    baseline,
    control,
    difference,
    marks,
    paired,
    paired_classes,
    student,
)
from imbsam_fast.recipes.report.repeat import command, shared_settings
from imbsam_fast.recipes.report.tables import DataTable, section_tables
from imbsam_fast.recipes.run_directory import RunDirectory
from imbsam_fast.recipes.settings.config import resolve
from imbsam_fast.recipes.settings.datasets import DATASETS
from imbsam_fast.recipes.train.options import _with_file, configurations, unread_options

pytest.importorskip("yaml")

IMBSAM = {"label": "ImbSAM", "optimizer": "imbsam", "tail_weight": 2.0}
CONTROL = {"label": "control", "optimizer": "sgd-weighted", "tail_weight": 2.0}


def one_section(root: Path) -> Section:
    (section,) = compare([root]).sections
    return section


def table(section: Section, name: str) -> DataTable:
    return next(t for t in section_tables(section) if t.name == name)


# ---------------------------------------------------------------- intervals


# Student's t, 97.5 %, from a printed table.
STUDENT = {1: 12.706, 5: 2.571, 9: 2.262, 10: 2.228, 12: 2.179, 20: 2.086, 30: 2.042, 120: 1.980}


def test_the_interval_is_students():
    assert {n: student(n) for n in STUDENT} == pytest.approx(STUDENT, rel=3e-4)
    found = difference([1.0, 4.0, 2.0, 3.5, -1.0])
    assert (found.mean, found.seeds) == (pytest.approx(1.9), 5)
    half = 2.776 * 2.0124612 / 5**0.5  # with the sample's standard deviation
    assert (found.low, found.high) == pytest.approx((1.9 - half, 1.9 + half), rel=1e-6)
    assert not found.clear and difference([1.0, 1.1, 1.2]).clear
    assert difference([3.0]) == (3.0, None, None, 1)


@pytest.fixture
def section(tmp_path: Path) -> Section:
    """Seeds that differ far more from one another than the methods do; SGD lacks the last."""
    for seed, hard in enumerate((0.0, 20.0, 40.0)):
        if seed < 2:
            write_run(tmp_path / f"sgd{seed}", [80, 10 + hard, 40], seed=seed, tail_weight=1.0)
        write_run(tmp_path / f"control{seed}", [80, 12 + hard, 40], seed=seed, **CONTROL)
        rows = [80 - seed % 2, 15 + hard + seed % 2, 40]
        write_run(tmp_path / f"imbsam{seed}", rows, seed=seed, **IMBSAM)
    return one_section(tmp_path)


def test_the_baseline_is_chosen_by_what_its_runs_read(tmp_path):
    settings = {"preset": "released", "eta": 20.0, "lr": 0.1}
    write_run(tmp_path / "a", [1, 2, 3], preset="paper", lr=0.1)
    write_run(tmp_path / "b", [1, 2, 3], **{**settings, "seed": 1})
    write_run(tmp_path / "c", [1, 2, 3], **{**settings, "lr": 0.01})
    write_run(tmp_path / "imbsam", [1, 2, 3], **settings, **IMBSAM)
    groups = one_section(tmp_path).groups
    assert [g.label for g in groups] == ["SGD (lr 0.1)", "SGD (lr 0.01)", "ImbSAM"]
    assert len(groups[0].runs) == 2 and baseline(groups[2], groups) is groups[0]


def test_differences_are_those_of_equal_seeds(section):
    sgd, weighted, imbsam = section.groups
    assert baseline(imbsam, section.groups) is sgd and control(imbsam, section.groups) is weighted
    over_sgd, over_control = paired(imbsam, sgd), paired(imbsam, weighted)
    assert over_sgd["few"].mean == pytest.approx(5.5) and over_sgd["few"].seeds == 2
    assert over_control["few"] == difference([3.0, 4.0, 3.0]) and over_control["few"].clear
    assert over_control["many"] == difference([0.0, -1.0, 0.0]) and not over_control["many"].clear
    assert over_control["medium"] == (0.0, 0.0, 0.0, 3)
    assert [d.mean for d in paired_classes(imbsam, sgd)] == pytest.approx([-0.5, 5.5, 0.0])


def test_without_a_shared_seed_the_means_are_subtracted_and_no_interval_is_claimed(tmp_path):
    write_run(tmp_path / "sgd", [80, 10, 40], seed=0)
    write_run(tmp_path / "imbsam", [80, 15, 40], seed=1, **IMBSAM)
    sgd, imbsam = one_section(tmp_path).groups
    assert paired(imbsam, sgd)["few"] == (5.0, None, None, 0)
    assert paired_classes(imbsam, sgd)[1] == (5.0, None, None, 0)


def test_groups_without_classes_have_no_difference(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", [90.0, 80.0], counts=[200, 150], seed=seed)
        write_run(tmp_path / f"b{seed}", [91.0, 81.0], counts=[200, 150], seed=seed, **IMBSAM)
    section = one_section(tmp_path)
    sgd, imbsam = section.groups
    assert paired(imbsam, sgd)["few"] is None and paired(imbsam, sgd)["all"].mean == 1.0
    assert table(section, "difference-last").rows[0][5].text == "-"


def test_the_baseline_is_the_sgd_that_differs_least(tmp_path):
    for i, (optimizer, model) in enumerate((("sgd", "a"), ("sgd", "b"), ("sam", "b"))):
        write_run(tmp_path / str(i), [1, 2, 3], label=optimizer, optimizer=optimizer, model=model)
    write_run(tmp_path / "wb", [1, 2, 3], label="WB", method="wb", optimizer="sam")
    groups = one_section(tmp_path).groups
    by_label = {group.label: group for group in groups}
    assert baseline(by_label["sam"], groups).config["model"] == "b"
    assert baseline(by_label["WB"], groups) is None
    assert baseline(groups[0], groups) is None


def test_a_control_has_equal_weights(tmp_path):
    write_run(tmp_path / "sgd", [1, 2, 3])
    for tail in (2.0, 5.0):
        write_run(tmp_path / f"c{tail}", [1, 2, 3], **{**CONTROL, "tail_weight": tail})
        write_run(tmp_path / f"i{tail}", [1, 2, 3], **{**IMBSAM, "tail_weight": tail})
    write_run(tmp_path / "paper", [1, 2, 3], label="paper", optimizer="imbsam", tail_weight=1.0)
    groups = one_section(tmp_path).groups
    found = {
        (g.config["optimizer"], g.config.get("tail_weight")): control(g, groups) for g in groups
    }
    assert {
        key: other.config["tail_weight"] for key, other in found.items() if other is not None
    } == {("imbsam", 2.0): 2.0, ("imbsam", 5.0): 5.0}


def test_a_control_of_nobody_is_named(tmp_path, capsys):
    """As the default preset makes it, whose tail weight is 1."""
    for seed in (0, 1):
        write_run(tmp_path / f"sgd{seed}", [1, 2, 3], seed=seed)
        write_run(tmp_path / f"c{seed}", [1, 2, 3], seed=seed, **CONTROL)
        write_run(tmp_path / f"i{seed}", [1, 2, 3], seed=seed, **{**IMBSAM, "tail_weight": 1.0})
    notes = table(one_section(tmp_path), "difference-last").notes
    assert len(notes) == 2 and notes[1].startswith("control is nobody's control here")
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    assert "control is nobody's control here" in " ".join(capsys.readouterr().out.split())
    for seed in (0, 1):
        write_run(tmp_path / f"j{seed}", [1, 2, 3], seed=seed, **IMBSAM)
    assert len(table(one_section(tmp_path), "difference-last").notes) == 1


# ---------------------------------------------------------------- marks and tables


def test_the_best_is_marked_and_what_pairs_do_not_tell_from_it(section):
    found = marks(section.groups, "last", "plain")
    assert found["ImbSAM"] == {"few": "best", "many": "near", "medium": "best", "all": "best"}
    assert found["control"]["many"] == "best" and "few" not in found["control"]
    assert found["SGD"]["many"] == "best" and "few" in found["SGD"]  # two seeds tell little
    assert marks(section.groups[:1], "last", "plain") == {"SGD": {}}
    assert marks(section.groups, "best", "plain")["ImbSAM"] == {}


def test_a_table_and_its_files_say_the_same(section):
    found = table(section, "difference-last")
    assert [[cell.text for cell in row[:3]] for row in found.rows] == [
        ["control", "SGD", "2"], ["ImbSAM", "SGD", "2"], ["ImbSAM", "control", "3"]
    ]  # fmt: skip
    cell = found.rows[2][5]
    assert cell.text == "+3.3 (+1.9 to +4.8)" and cell.mark == "clear"
    assert found.rows[2][4].text == "0.0 (0.0 to 0.0)"
    assert found.rows[2][3].text == "\N{MINUS SIGN}0.3 (\N{MINUS SIGN}1.8 to +1.1)"
    record = json.loads(found.json())["rows"][2]["plain few"]
    row = list(csv.DictReader(io.StringIO(found.csv())))[2]
    assert record["mean"] == float(row["plain few mean"]) == pytest.approx(10 / 3)
    assert record["low"] == float(row["plain few low"]) and row["plain few seeds"] == "3"
    for each in section_tables(section):
        assert len(each.columns) == len({column.name for column in each.columns})
        assert all(len(row) == len(each.columns) for row in each.rows), each.name
        assert len(list(csv.reader(io.StringIO(each.csv())))) == len(each.rows) + 1


def test_memory_has_a_column_where_a_run_knows_it(tmp_path):
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
    shown = table(section, "accuracy-last")
    assert [column.name for column in shown.columns[2:4]] == ["time", "peak_gb"]
    assert [[cell.text for cell in row[2:4]] for row in shown.rows] == [
        ["1.00", "-"], ["-", "-"], ["2.50", "2.00"]
    ]  # fmt: skip
    section.groups = section.groups[:2]
    assert "peak_gb" not in {column.name for column in table(section, "accuracy-last").columns}


def test_worst_classes_and_what_they_are_taken_for(tmp_path):
    for i, rows in enumerate((["0:5", "0:3 1:2", "2:5"], ["0:4 2:1", "0:1 1:1 2:3", "1:1 2:4"])):
        directory = write_run(tmp_path / str(i), [100, 40, 100], seed=i)
        result = json.loads((directory.path / "result.json").read_text())
        result["last"]["plain"]["confusion"] = rows
        result["class_names"] = ["cat", "dog, small", "eel"]
        (directory.path / "result.json").write_text(json.dumps(result))
    write_run(tmp_path / "old", [100, 60, 100], seed=9)  # of before confusions were recorded
    section = one_section(tmp_path)
    assert section.groups[0].confusion() == [[9, 0, 1], [4, 3, 3], [0, 1, 9]]
    first = table(section, "worst-classes").rows[0]
    assert [cell.text for cell in first] == ["dog, small", "10", "cat", "46.7 ±11.5"]
    rows = list(csv.DictReader(io.StringIO(table(section, "confusion").csv())))
    assert rows[1] == {"configuration": "SGD", "class": "cat", "taken_for": "eel", "images": "1"}


def test_confusions_survive_their_short_form():
    import torch

    cells = torch.randint(0, 3, (7, 7))
    assert read_confusion(confusion_rows(cells)) == cells.tolist()
    for text in ("7:1", "x:1", "1", "-1:1", "1:1.5"):
        with pytest.raises(ValueError, match="expected class:count"):
            read_confusion(["0:1", text])


# ---------------------------------------------------------------- settings and commands


def test_shared_settings_are_those_of_all(section):
    found = shared_settings(section.groups)
    assert found["rho"] == 0.05 and found["group_borders"] == [20, 100]
    assert not {"optimizer", "tail_weight", "seed", "label", "format"} & found.keys()


CASES = [
    {"optimizer": "imbsam", "preset": "released", "plan": "sampled", "sample": 0.5},
    {"optimizer": "imbsam", "perturb_every": 4, "rho": 0.1, "lr": 0.3, "model": "resnet8"},
    {"optimizer": "sgd", "method": "wb", "stage2_epochs": 3, "channels_last": False},
    {"optimizer": "sam", "tail_weight": 5.0, "group_borders": (10, 50), "seed": 3},
    {"dataset": "cifar10-lt", "optimizer": "imbsam", "images": "full", "data_dir": "a dir"},
    {"dataset": "cifar10-lt", "optimizer": "focal-sam", "images": "small", "data_dir": "x",
     "gamma": 2.0},
    {"dataset": "imagenet-lt", "optimizer": "sgd-weighted", "data_dir": "x", "eta": 50.0,
     "train_list": "a b.txt", "skip_corrupt": True},
    {"optimizer": "sam", "device": "cuda", "cuda_graph": True},
]  # fmt: skip


@pytest.mark.parametrize("given", CASES, ids=lambda given: given["optimizer"])
def test_the_command_repeats_the_runs(given, tmp_path):
    given = {"dataset": "digits", "data_dir": "", "seed": 0, **given}
    config = resolve(DATASETS[given["dataset"]], given)
    for i in (0, 1):
        again = replace(config, seed=config.seed + i)
        RunDirectory.create(tmp_path / str(i), again.to_dict())
    (group,) = one_section(tmp_path).groups
    words = shlex.split(command(group))
    parser, _ = cli._parser(words[1:])
    assert words[0] == "imbsam-fast"
    args = parser.parse_args(words[1:])
    typed, args = vars(args), _with_file(args)
    found = configurations(args)
    assert not unread_options(args, typed)
    assert found == [config, replace(config, seed=config.seed + 1)]


def test_the_command_has_no_setting_that_the_runs_do_not_read(tmp_path):
    """As from `--optimizer sgd-weighted imbsam --preset released --rho 0.2`."""
    given = {"optimizer": "sgd-weighted", "preset": "released", "rho": 0.2, "plan": "sampled"}
    config = resolve(DATASETS["digits"], {"dataset": "digits", "data_dir": "", "seed": 0, **given})
    RunDirectory.create(tmp_path / "run", config.to_dict())
    (group,) = one_section(tmp_path).groups
    assert command(group) == (
        "imbsam-fast train digits --optimizer=sgd-weighted --preset=released --save=runs"
    )


def test_captured_seeds_are_of_one_configuration_with_others(tmp_path):
    for seed, settings in enumerate(({}, {"cuda_graph": False}, {"cuda_graph": True})):
        write_run(tmp_path / str(seed), [1, 2, 3], seed=seed, **settings)
    (group,) = one_section(tmp_path).groups
    assert len(group.runs) == 3


def test_settings_that_are_not_known_have_no_command(tmp_path):
    write_run(tmp_path / "a", [1, 2, 3])
    write_run(tmp_path / "b", [1, 2, 3], method="other")
    section = one_section(tmp_path)
    assert [command(group) for group in section.groups] == [None, None]
    assert "commands" not in {t.name for t in section_tables(section)}


def test_families_differ_in_rho_and_eta_alone(tmp_path):
    for eta, rho in ((100.0, 0.05), (100.0, 0.1), (20.0, 0.05)):
        label = f"ImbSAM, paper, eta {eta:g}" + (", rho 0.1" if rho == 0.1 else "")
        settings = {"label": label, "optimizer": "imbsam", "eta": eta, "rho": rho}
        write_run(tmp_path / label, [75, 20, 50], **settings)
    write_run(tmp_path / "sgd", [1, 2, 3])
    (family,) = families(one_section(tmp_path).groups)
    assert family.label == "ImbSAM, paper"
    assert list(family.members) == [(20.0, 0.05), (100.0, 0.05), (100.0, 0.1)]

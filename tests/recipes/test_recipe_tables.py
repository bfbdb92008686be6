"""The record of training runs, and the tables of docs/results.md that are made from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import recipe_tables, report
from imbsam_fast.recipes.report.comparison import ANALYSES
from imbsam_fast.recipes.settings.config import resolve
from imbsam_fast.recipes.settings.datasets import DATASETS
from tests import tiny_runs

COUNTS = [500, 50, 5]
LINE = {"loss": 1.0, "head": 1.0, "tail": 1.0, "train_accuracy": 12.0, "seconds": 9.0}
DATE = "2031-02-0{}T04:05:06+00:00"


def write(root: Path, optimizer: str, accuracies: list[list[float]], **changes) -> None:
    """One run a seed with these accuracies of the three classes; [] for one that is not done."""
    for seed, per_class in enumerate(accuracies):
        given = {"dataset": "cifar10-lt", "data_dir": "/home/me", "images": "small", **changes}
        config = resolve(DATASETS["cifar10-lt"], {**given, "optimizer": optimizer, "seed": seed})
        run = tiny_runs.write_run(
            root / config.directory_name(),
            per_class or None,
            COUNTS,
            [{**LINE, "epoch": 1}, {**LINE, "epoch": 2, "train_accuracy": 90.0 + seed}],
            **config.to_dict(),
        )
        result = run.result()
        if result is not None:
            result["environment"] = {
                "date": DATE.format(seed + 3),
                "git_commit": "0123456789abcdef",
                "machine": {"cpu": "Abacus 3000", "torch_threads": 1},
                "versions": {"imbsam-fast": "1.2.3", "torch": "9.9", "python": "3.14"},
            }
            run.write_result(result)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write(root, "sgd", [[80.0, 40.0, 0.0], [82.0, 40.0, 4.0]])
    write(root, "sgd-weighted", [[79.0, 45.0, 10.0], [79.0, 47.0, 12.0]], preset="released")
    write(root, "imbsam", [[78.0, 48.0, 12.0], [76.0, 50.0, 18.0]], preset="released")
    write(root, "focal-sam", [[81.0, 41.0, 1.0], []])
    analyses = root / "sgd-seed0" / ANALYSES
    analyses.mkdir()
    hessian = {
        "analysis": "hessian", "classes": "few", "class_list": [2], "rows": 5, "checkpoint": "last",
        "lambda_max": {"value": 845.32, "error": 0.1, "steps": 20, "converged": True},
        "trace": {"value": 2040.4, "error": 500.2, "probes": 10},
        "density": {"values": [[1.0]], "weights": [[1.0]]}, "about": "",
    }  # fmt: skip
    (analyses / "hessian-few.json").write_text(json.dumps(hessian))
    file = root / "record" / "runs.json"
    assert recipe_tables.main([str(root), "--json", str(file)]) == 0
    return file


def test_the_record_has_what_is_finished_and_no_places(recorded):
    content = json.loads(recorded.read_text())
    assert len(content["runs"]) == 7 and len(content["environments"]) == 1
    assert content["settings"]["model"] == "resnet32"
    assert set(content["runs"][0]["config"]) >= {"optimizer", "seed", "tail_weight"}
    assert "/home/me" not in recorded.read_text() and "seconds" not in recorded.read_text()


def test_a_record_grows_by_further_runs(recorded, tmp_path, capsys):
    file = tmp_path / "r.json"
    older = json.loads(recorded.read_text())
    del older["settings"]["perturb_every"]  # as before there was one
    file.write_text(json.dumps(older))
    write(tmp_path / "runs", "imbsam", [[0.0] * 3, [0.0] * 3, [77.0, 52.0, 15.0]],
          preset="released")  # fmt: skip
    write(tmp_path / "runs", "imbsam", [[75.0, 50.0, 20.0]], preset="released", perturb_every=4)
    assert recipe_tables.main([str(file), str(tmp_path / "runs"), "--json", str(file)]) == 0
    assert capsys.readouterr().out.count("left out: seed") == 2  # those that the record has
    lines = recipe_tables.accuracy(recipe_tables.load(file))
    assert lines[2] == recipe_tables.accuracy(recipe_tables.load(recorded))[2]
    assert [line.split(" | ")[1:4] for line in lines if "ImbSAM" in line] == [
        ["3", "77.0 ± 1.0", "50.0 ± 2.0"],
        ["1", "75.0", "50.0"],
    ]
    (cheaper,) = [x for x in recipe_tables.paired(recipe_tables.load(file)) if "every 4" in x[:60]
                  and "minus ImbSAM" in x]  # fmt: skip
    assert cheaper.split(" | ")[1:3] == ["1", "-3.0"]


def test_a_run_in_another_precision_is_named_and_not_compared(recorded, tmp_path):
    file = tmp_path / "r.json"
    write(tmp_path / "runs", "sam", [[81.0, 45.0, 3.0]], amp="bf16")
    assert recipe_tables.main([str(recorded), str(tmp_path / "runs"), "--json", str(file)]) == 0
    found = recipe_tables.load(file)
    named = [x for x in recipe_tables.accuracy(found) if x.startswith("| SAM")]
    assert [x[:23] for x in named] == ["| SAM, bf16 | 1 | 81.0 "]
    assert not [x for x in recipe_tables.paired(found) if x.startswith("| SAM")]


def test_accuracies_are_those_of_the_runs(recorded):
    lines = recipe_tables.accuracy(recipe_tables.load(recorded))
    assert lines[0].startswith("| % | seeds | Many | Medium | Few | All | Many, flip | ")
    assert lines[2] == (
        "| SGD | 2 | 81.0 ± 1.4 | 40.0 ± 0.0 | 2.0 ± 2.8 | 41.0 ± 1.4 | 82.0 ± 1.4 | 41.0 ± 0.0 "
        "| 3.0 ± 2.8 | 42.0 ± 1.4 | 90.5 ± 0.7 |"
    )
    assert lines[4].startswith("| Focal-SAM | 1 | 81.0 | 41.0 | 1.0 | 41.0 | 82.0 |")


def test_runs_are_compared_seed_by_seed_with_sgd_and_with_the_control(recorded):
    lines = recipe_tables.paired(recipe_tables.load(recorded))[2:]
    control = "SGD, tail weight 2, eta 20"
    assert lines == [
        f"| {control} minus SGD | 2 | -2.0 ± 1.4 | +6.0 ± 1.4 | +9.0 ± 1.4 | +4.3 ± 0.5 |",
        "| Focal-SAM minus SGD | 1 | +1.0 | +1.0 | +1.0 | +1.0 |",
        "| ImbSAM, released, eta 20 minus SGD | 2 | -4.0 ± 2.8 | +9.0 ± 1.4 | +13.0 ± 1.4 "
        "| +6.0 ± 0.0 |",
        f"| ImbSAM, released, eta 20 minus {control} | 2 | -2.0 ± 1.4 | +3.0 ± 0.0 | +4.0 ± 2.8 "
        "| +1.7 ± 0.5 |",
    ]


def test_another_loss_is_compared_with_sgd_under_it_and_with_cross_entropy(tmp_path):
    for loss, gain in (("ce", 0.0), ("balanced-softmax", 6.0)):
        write(tmp_path, "sgd", [[80.0, 40.0, gain]], loss=loss)
        write(tmp_path, "imbsam", [[80.0, 40.0, 2 * gain + 1]], loss=loss)
    assert recipe_tables.main([str(tmp_path), "--json", str(tmp_path / "r.json")]) == 0
    lines = recipe_tables.paired(recipe_tables.load(tmp_path / "r.json"))[2:]
    ours, softmax = "ImbSAM, paper, eta 100", "balanced softmax"
    assert [line.split(" | ")[0::4] for line in lines] == [
        [f"| {ours} minus SGD", "+1.0"],
        [f"| SGD, {softmax} minus SGD", "+6.0"],
        [f"| {ours}, {softmax} minus {ours}", "+12.0"],
        [f"| {ours}, {softmax} minus SGD, {softmax}", "+7.0"],
    ]


def test_runs_of_another_network_are_no_control(tmp_path):
    write(tmp_path, "sgd", [[80.0, 40.0, 0.0]])
    write(tmp_path, "sam", [[80.0, 40.0, 0.0]], model="resnet8")
    assert recipe_tables.main([str(tmp_path), "--json", str(tmp_path / "r.json")]) == 0
    assert len(recipe_tables.paired(recipe_tables.load(tmp_path / "r.json"))) == 2


def test_sharpness_and_origin(recorded):
    found = recipe_tables.load(recorded)
    assert recipe_tables.sharpness(found)[2:] == ["| SGD, seed 0 | few | 5 | 845.3 | 2040 | 500 |"]
    assert report.provenance([found]) == [
        "7 runs: Abacus 3000, 1 thread; imbsam-fast 1.2.3, torch 9.9, Python 3.14; "
        "commit 0123456789ab, 2031-02-03 to 2031-02-04."
    ]


def test_the_report_of_benchmarks_fills_the_tables(recorded, tmp_path):
    (tmp_path / "recipes").mkdir()
    for table in recipe_tables.TABLES.values():
        for source in table.sources:
            (tmp_path / f"{source}.json").write_bytes(recorded.read_bytes())
    text = "".join(
        f"<!-- results: {name} -->\nold\n<!-- end -->\n" for name in recipe_tables.TABLES
    )
    filled, complaints = report.filled(text, report.load_results(tmp_path))
    assert complaints == [] and "old" not in filled
    assert filled.count("Abacus 3000") == len(recipe_tables.TABLES)


def test_without_finished_runs_nothing_is_recorded(tmp_path, capsys):
    write(tmp_path, "sgd", [[]])
    assert recipe_tables.main([str(tmp_path), "--json", str(tmp_path / "r.json")]) == 1
    assert "not finished" in capsys.readouterr().out
    assert not (tmp_path / "r.json").exists()


def test_runs_of_several_data_sets_are_refused(tmp_path, capsys):
    write(tmp_path, "sgd", [[80.0, 40.0, 0.0]])
    write(tmp_path, "sam", [[80.0, 40.0, 0.0]], images="full")
    assert recipe_tables.main([str(tmp_path), "--json", str(tmp_path / "r.json")]) == 1
    assert "finished runs on 2 data sets, expected one" in capsys.readouterr().out

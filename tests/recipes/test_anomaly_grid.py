"""`imbsam-fast anomaly`: grids of fits, their files, tables and pictures."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

pytest.importorskip("sklearn")

from imbsam_fast import cli
from imbsam_fast.recipes.anomaly import grid, load, options, paper, run, tables
from imbsam_fast.recipes.anomaly.detector import Detector
from imbsam_fast.recipes.anomaly.plots import aucpr_figure
from imbsam_fast.recipes.anomaly.settings import Fit, Settings, methods
from imbsam_fast.recipes.anomaly.summary import (
    Difference,
    Value,
    areas,
    at_every_ratio,
    difference,
    over_seeds,
)
from tests.commands import refused

SETTINGS = Settings(
    base="sgd", lr=0.01, momentum=0.9, rho=0.05, plan="auto", epochs=1, batch_size=64,
    pretrain_epochs=1,
)  # fmt: skip
QUICK = ["--epochs", "1", "--batch-size", "64", "--pretrain-epochs", "1", "--seeds", "1"]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("IMBSAM_BACKEND", raising=False)


@pytest.fixture
def data_dir(tmp_path):
    """Two sets of 60 rows with 6 features, all of them different."""
    directory = tmp_path / "data"
    directory.mkdir()
    for seed, name in enumerate(("MVTec-AD_screw", "other")):
        rng = np.random.default_rng(seed)
        y = (np.arange(60) % 4 == 0).astype(np.int64)
        X = rng.normal(size=(60, 6)) + 2 * y[:, None]
        np.savez(directory / f"{name}.npz", X=X.astype(np.float32), y=y)
    return directory


def command(data_dir, *arguments: object) -> list[str]:
    return ["anomaly", "--data-dir", str(data_dir), *QUICK, *map(str, arguments)]


def saved_fits(directory) -> list[Fit]:
    results = json.loads((directory / run.RESULTS_FILE).read_text())
    assert results["fields"] == list(Fit._fields)
    return [Fit(*row) for row in results["fits"]]


# ---------------------------------------------------------------- whole grids


@pytest.mark.slow  # trains 40 detectors
def test_a_grid_is_trained_shown_and_saved(data_dir, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("--ratio", 0.5, 0.1, "--tail-weight", 2, "--save", out, "--keep-detectors")
    assert cli.main(command(data_dir, *arguments)) == 0
    fits = saved_fits(out)
    names = ["sgd", "sam", "imbsam", "sgd@2", "imbsam@2"]
    assert len(fits) == len({(f.cell, f.method) for f in fits}) == 2 * 2 * 2 * 5
    assert {f.method for f in fits} == set(names) and {f.ratio for f in fits} == {0.1, 0.5}
    assert all(0 <= f.aucroc <= 100 and f.leaked == 0 and f.train_rows == 42 for f in fits)
    assert {f.labelled for f in fits} == {math.ceil(r * 11) for r in (0.5, 0.1)}
    shown = capsys.readouterr().out
    for text in (
        "DeepSAD, clean protocol, 10 % of the anomalies labelled",
        "DevNet, clean protocol, 50 % of the anomalies labelled",
        "MVTec-AD_screw",
        "ImbSAM, weight 2",
    ):
        assert text in shown
    assert (out / "aucpr_clean.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((out / "detectors").iterdir())) == len(fits)
    detector = load(out / "detectors" / "other_devnet_imbsam@2_clean_0.1_0.pt")
    assert (detector.optimizer, detector.tail_weight, detector.epochs) == ("imbsam", 2.0, 1)
    assert np.isfinite(detector.decision_function(np.zeros((3, 6)))).all()


def test_a_grid_needs_no_directory(data_dir, tmp_path, capsys):
    arguments = ("--detector", "devnet", "--optimizer", "sgd", "--sets", "other")
    assert cli.main(command(data_dir, *arguments)) == 0
    assert "DevNet, clean protocol, 25 %" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def interrupted(data_dir, out, after: int, monkeypatch) -> None:
    """A grid that Ctrl-C ends after some cells, in the middle of a line."""
    made = iter(range(after))
    run_job = grid.run_job

    def run_some(job: grid.Job) -> list[Fit]:
        if next(made, None) is None:
            raise KeyboardInterrupt
        return run_job(job)

    with monkeypatch.context() as patch:
        patch.setattr(grid, "run_job", run_some)
        assert cli.main(command(data_dir, "--save", out)) == 130
    with (out / "fits.jsonl").open("a") as file:
        file.write('["other", "clean", 0.2')


@pytest.mark.slow  # trains two grids
def test_an_interrupted_grid_goes_on(data_dir, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert cli.main(command(data_dir, "--save", whole)) == 0
    interrupted(data_dir, out, 2, monkeypatch)
    jobs = []
    run_job = grid.run_job
    monkeypatch.setattr(grid, "run_job", lambda job: jobs.append(job.cell) or run_job(job))
    assert cli.main(command(data_dir, "--save", out)) == 0
    assert len(jobs) == 2  # of four
    assert [f[:-1] for f in saved_fits(out)] == [f[:-1] for f in saved_fits(whole)]
    assert sorted({f.run for f in saved_fits(out)}) == [0, 1]
    assert len(json.loads((out / "grid.json").read_text())["runs"]) == 2
    jobs.clear()
    assert cli.main(command(data_dir, "--save", out, "--optimizer", "sgd", "--ratio", 0.1)) == 0
    assert {cell.ratio for cell in jobs} == {0.1}


@pytest.mark.slow
def test_processes_make_the_same_fits(data_dir, tmp_path):
    # One cell starts one process, which takes seconds.
    arguments = ("--sets", "other", "--detector", "devnet", "--optimizer", "imbsam", "--save")
    for name, jobs in (("one", 1), ("two", 2)):
        assert cli.main(command(data_dir, *arguments, tmp_path / name, "--jobs", jobs)) == 0
    assert saved_fits(tmp_path / "one") == saved_fits(tmp_path / "two")


@pytest.mark.parametrize("protocol", ["clean", "adbench"])
def test_no_test_row_is_trained_on_but_where_adbench_asks_for_it(protocol, data_dir, monkeypatch):
    seen: dict[str, list] = {"fit": [], "decision_function": []}
    for name in seen:
        method = getattr(Detector, name)

        def noted(self, X, *rest, name=name, method=method):
            seen[name].append({row.tobytes() for row in X})
            return method(self, X, *rest)

        monkeypatch.setattr(Detector, name, noted)
    argv = command(data_dir, "--detector", "devnet", "--protocol", protocol, "--sets", "other")
    assert cli.main(argv) == 0
    shared = [train & test for train, test in zip(seen["fit"], seen["decision_function"])]
    assert len(shared) == 3 and all(map(bool, shared)) == any(map(bool, shared))
    assert bool(shared[0]) == (protocol == "adbench")


# ---------------------------------------------------------------- refusals


def test_other_settings_do_not_join_a_grid(data_dir, tmp_path, capsys):
    out = tmp_path / "out"
    quick = ("--detector", "devnet", "--optimizer", "sgd", "--save", out)
    assert cli.main(command(data_dir, *quick)) == 0
    before = saved_fits(out)
    message = refused(command(data_dir, *quick, "--rho", 0.1), capsys)
    assert message.endswith("its fits have rho 0.05, expected 0.1 as asked for now")
    assert saved_fits(out) == before


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("fits.jsonl", "no json\n", "fits.jsonl is damaged"),
        ("fits.jsonl", '["set"]\n', "does not hold fits of this version"),
        ("fits.jsonl", "", "does not hold fits of this version"),
        ("grid.json", "{", "grid.json is damaged"),
        ("grid.json", None, "expected a new directory or one with grid.json and fits.jsonl"),
    ],
)
def test_a_damaged_directory_is_refused(name, content, expected, data_dir, tmp_path, capsys):
    out = tmp_path / "out"
    quick = ("--detector", "devnet", "--optimizer", "sgd", "--sets", "other", "--save", out)
    assert cli.main(command(data_dir, *quick)) == 0
    (out / name).unlink() if content is None else (out / name).write_text(content)
    message = refused(command(data_dir, *quick), capsys)
    assert expected in message and str(out) in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sets", "nothing"], "--sets holds nothing, expected MVTec-AD_screw, other"),
        (["--keep-detectors"], "--keep-detectors is given without --save"),
        (["--ratio", "0"], "is '0', expected a number > 0"),
        (["--ratio", "1.5"], "is '1.5', expected a number > 0"),
        (["--detector", "svm"], "invalid choice: 'svm'"),
        (["--plan", "split"], "--plan is 'split', expected auto or joint for DeepSAD"),
        (["--seeds", "0"], "is '0', expected a whole number >= 1"),
        (["--lr", "1e30"], "losses and scores are no longer finite numbers; try an lr below 1e+30"),
    ],
)
def test_bad_arguments_are_refused(arguments, expected, data_dir, capsys):
    assert expected in refused(command(data_dir, *arguments), capsys)


def test_a_bad_file_is_named_before_anything_is_trained(data_dir, tmp_path, monkeypatch, capsys):
    (data_dir / "zz.npz").write_bytes(b"no archive")
    monkeypatch.setattr(grid, "run_job", lambda job: pytest.fail("trained"))
    message = refused(command(data_dir, "--save", tmp_path / "out"), capsys)
    assert "zz.npz: cannot be read" in message


def test_missing_extras_are_named(data_dir, monkeypatch, capsys):
    monkeypatch.setattr("imbsam_fast.recipes.settings.arguments.find_spec", lambda module: None)
    message = refused(command(data_dir), capsys)
    assert "numpy and scikit-learn is not installed; pip install 'imbsam-fast[recipes]'" in message


# ---------------------------------------------------------------- what the numbers say


def fit(method: str, seed: int, aucroc: float, name: str = "MVTec-AD_a", **changes) -> Fit:
    found = Fit(
        set=name, protocol="clean", ratio=0.25, seed=seed, detector="devnet", method=method,
        aucroc=aucroc, aucpr_anomaly=aucroc - 10, aucpr_normal=aucroc + 1, train_loss=1.0,
        train_rows=10, labelled=1, leaked=0.0, run=0,
    )  # fmt: skip
    return found._replace(**changes)


TWO_SETS = [
    *(fit("sgd", seed, 80 + seed) for seed in range(3)),
    *(fit("imbsam", seed, 80 + 2 * seed) for seed in range(3)),  # differences 0 1 2
    *(fit("sgd", seed, 60, "MVTec-AD_b") for seed in range(3)),
    *(fit("imbsam", seed, 59, "MVTec-AD_b") for seed in range(3)),  # -1 -1 -1
]


def of(method: str, fits=TWO_SETS):
    return areas([f for f in fits if f.method == method], "aucroc")


def test_means_are_over_sets_and_deviations_over_seeds():
    assert over_seeds(of("sgd")) == Value(70.5, 0.5)
    assert over_seeds(areas([fit("sgd", 0, 42.0)], "aucroc")) == Value(42.0, None)


def test_differences_are_paired_by_set_and_seed():
    found = difference(of("imbsam"), of("sgd"))
    assert found == Difference(0.0, pytest.approx(math.sqrt(1 / 3 + 0) / 2), 1, 2)


def test_only_seeds_that_every_set_has_are_compared():
    fits = [f for f in TWO_SETS if (f.set, f.seed) != ("MVTec-AD_b", 2)]
    assert over_seeds(of("imbsam", fits)).mean == pytest.approx((81 + 59) / 2)
    assert difference(of("imbsam", fits), of("sgd", fits)).mean == pytest.approx((0.5 - 1) / 2)


def test_ratios_are_compared_on_the_sets_and_seeds_of_every_ratio():
    fits = [f._replace(ratio=r) for f in TWO_SETS for r in (0.1, 0.5)]
    alone = [fit("sgd", 3, 1.0, ratio=0.1), fit("sgd", 0, 1.0, "c", ratio=0.5)]
    alone.append(fit("sgd@2", 0, 1.0, ratio=0.1))  # a method that one ratio has
    assert at_every_ratio([*fits, *alone]) == fits
    assert at_every_ratio([]) == []


def test_a_table_says_where_methods_have_fewer_seeds():
    (table,) = tables.tables(
        [*TWO_SETS, fit("sam", 0, 1.0), fit("sam", 0, 1.0, "MVTec-AD_b")], SETTINGS
    )
    assert table.title.endswith("1 to 3 seeds")
    (table,) = tables.tables([*TWO_SETS, fit("sam", 0, 1.0)], SETTINGS)
    assert [row.sets for row in table.rows] == ["MVTec, 2 sets", "MVTec-AD_a", "MVTec, 2 sets"]


def test_comparing_other_sets_is_refused():
    with pytest.raises(ValueError, match="expected the same sets"):
        difference(of("imbsam", TWO_SETS[:6]), of("sgd"))
    with pytest.raises(ValueError, match="expected at least one seed"):
        over_seeds(areas([fit("sgd", 0, 1.0), fit("sgd", 1, 1.0, "b")], "aucroc"))


def test_tables_stand_beside_the_paper():
    halved = [f._replace(train_loss=0.75) if f.method == "imbsam" else f for f in TWO_SETS]
    (table,) = tables.tables(halved, SETTINGS)
    assert table.title == (
        "DevNet, clean protocol, 25 % of the anomalies labelled, base SGD, 3 seeds"
    )
    name = "MVTec, 2 sets"
    assert table.rows == [
        (name, "SGD", "70.5 ± 0.5", "95.6", "86.17", "-", "-", "60.5 ± 0.5", "-", "71.5 ± 0.5",
         "1.000"),
        (name, "ImbSAM", "70.5 ± 1.0", "96.2", "-", "+0.00 ± 0.29", "1 of 2", "60.5 ± 1.0",
         "+0.00 ± 0.29", "71.5 ± 1.0", "0.750"),
    ]  # fmt: skip


def test_the_paper_is_quoted_only_where_it_reports():
    assert paper.reported("deepsad", "imbsam", "SVHN", 0.25) == 82.4
    assert paper.reported("devnet", "sam", "MVTec", 0.25) == 94.2
    for other in (
        ("deepsad", "imbsam@2", "SVHN", 0.25),
        ("deepsad", "imbsam", "SVHN", 0.5),
        ("deepsad", "imbsam", "shuttle", 0.25),
    ):
        assert paper.reported(*other) is None


def test_adbench_is_quoted_for_its_detectors_at_its_ratios():
    assert paper.adbench_reported("deepsad", "sgd", "SVHN", 0.25) == 68.91
    assert paper.adbench_reported("devnet", "sgd", "MVTec", 1.0) == 94.52
    for other in (
        ("deepsad", "imbsam", "SVHN", 0.25),
        ("deepsad", "sgd", "SVHN", 0.1),
        ("devnet", "sgd", "shuttle", 0.25),
    ):
        assert paper.adbench_reported(*other) is None
    for at in paper.ADBENCH.values():  # more labels are better everywhere
        assert all(len(row) == len(paper.FAMILIES) for row in at.values())
        assert all(list(column) == sorted(column) for column in zip(*at.values()))


def test_families_of_adbenchs_sets():
    sets = ["CIFAR10_3", "FashionMNIST_0", "MNIST-C_fog", "MVTec-AD_pill", "SVHN_9", "shuttle"]
    assert [paper.family(s) for s in sets] == [*paper.FAMILIES, "shuttle"]


def test_methods_bring_the_control_of_a_tail_weight():
    assert methods(["imbsam", "sgd"], [2, 1]) == ["sgd", "imbsam", "sgd@2", "imbsam@2"]
    assert methods(["sgd", "sam"], [2]) == ["sgd", "sam"]
    assert SETTINGS.label("sgd@2") == "SGD, weight 2" and SETTINGS.label("sam") == "SAM"
    params = SETTINGS.detector_params("devnet", "imbsam@2.5", 3)
    assert (params["optimizer"], params["tail_weight"], params["random_state"]) == (
        "imbsam", 2.5, 3,
    )  # fmt: skip
    assert "pretrain_epochs" not in params


def test_the_picture_has_a_line_a_detector_and_method():
    fits = [f._replace(ratio=r, aucpr_anomaly=100 * r) for f in TWO_SETS for r in (0.5, 0.01)]
    fits.append(fit("sgd", 0, 90.0, "at one ratio alone", ratio=0.5))
    fits.append(fit("sgd", 3, 90.0, ratio=0.5))  # a seed at one ratio alone
    figure = aucpr_figure(fits, SETTINGS, "clean")
    assert figure.get_suptitle() == "2 sets, clean protocol, mean ± std over 3 seeds"
    anomaly, normal = figure.axes
    labels = [line.get_label() for line in anomaly.containers]
    assert labels == ["DevNet, SGD", "DevNet, ImbSAM"]
    assert [list(c.lines[0].get_ydata()) for c in anomaly.containers] == [[1.0, 50.0]] * 2
    assert [t.get_text() for t in normal.get_xticklabels()] == ["1 %", "50 %"]


def test_the_command_line_needs_no_numpy():
    """Else a missing extra would be an ImportError."""
    assert options.OPTIMIZERS == ("sgd", "sam", "imbsam")
    names = {module.__name__ for module in vars(options).values() if hasattr(module, "__name__")}
    assert not names & {"numpy", "sklearn"}

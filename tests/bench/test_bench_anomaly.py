"""The benchmark of the anomaly detectors, and the document that quotes recorded results."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from benchmarks import anomaly_rates, anomaly_report, bench_anomaly
from imbsam_fast.bench.report import load
from imbsam_fast.bench.script import run_script
from imbsam_fast.recipes.anomaly import DevNet, data
from imbsam_fast.recipes.anomaly.losses import deepsad_loss, deviation_loss
from imbsam_fast.recipes.anomaly.networks import Encoder, Scorer
from imbsam_fast.recipes.anomaly.run import write_results
from imbsam_fast.recipes.anomaly.settings import Fit

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_runs_and_counts_in_epochs_of_sgd(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["x", "--quick", "--return-memory", "--json", str(path)])
    args = bench_anomaly.__file__, bench_anomaly.groups, bench_anomaly.summary
    assert run_script(*args) == 0
    report = load(path)
    assert all(t.ms > 0 for t in report.timings) and len(report.timings) == 3 * 4
    assert report.summary[0].startswith("DeepSAD, 25 % labelled: 3 batches, 0 without: in SGD ")
    assert report.summary[2].startswith("DevNet, 25 % labelled: 20 batches, 0 without: in SGD ")


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda: Encoder(6), deepsad_loss(torch.full((10,), 0.1))),
        (lambda: Scorer(6), deviation_loss(0.0, 1.0)),
    ],
    ids=["DeepSAD", "DevNet"],
)
def test_both_imbsam_contestants_train_the_same_network(make, loss, monkeypatch):
    torch.manual_seed(0)
    network = make().double()
    copies = []
    monkeypatch.setattr(
        bench_anomaly, "deepcopy", lambda n: copies.append(deepcopy(n)) or copies[-1]
    )
    steps = bench_anomaly.steps(network, loss, bench_anomaly.sgd_base)
    trained = dict(zip(steps, copies))
    for labels in ([0, 1, 0, 0, 1, 0], [0] * 6, [0, 0, 0, 0, 1, 1]):
        batch = torch.randn(6, 6, dtype=torch.float64), torch.tensor(labels)
        for step in steps.values():
            step(*batch)
    ours, authors, sgd = (
        list(trained[who].parameters())
        for who in (bench_anomaly.IMBSAM, bench_anomaly.AUTHORS, bench_anomaly.SGD)
    )
    for a, b in zip(ours, authors):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert not all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(ours, sgd))
    assert isinstance(steps[bench_anomaly.IMBSAM].optimizer.base, torch.optim.SGD)


# ---------------------------------------------------------------- the document


def row(method: str, area: float, seed: int = 0, **changes) -> Fit:
    found = Fit(
        "MVTec-AD_a", "clean", 0.25, seed, "devnet", method, area, area - 1, area + 1, 0.5, 70, 3,
        0.0, 0,
    )  # fmt: skip
    return found._replace(**changes)


ROWS = [
    row(method, area, seed, protocol=protocol, leaked=leaked)
    for protocol, leaked in (("adbench", 0.87), ("clean", 0.0))
    for method, area in (("sgd", 90.0), ("imbsam", 92.0))
    for seed in (0, 1)
]


def results(rows=ROWS, **changes) -> dict:
    environment = {
        "date": "2031-02-03T04:05:06+00:00",
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"imbsam-fast": "1.2.3", "torch": "9.9", "python": "3.14.0"},
        "machine": {"cpu": "Abacus 3000", "cores": 8, "torch_threads": 1},
        "native": {"loaded": True, "isa_in_use": "avx2"},
        **changes,
    }
    settings = {
        "base": "sgd", "lr": None, "momentum": 0.9, "rho": 0.05, "plan": "auto", "epochs": 50,
        "batch_size": 128, "pretrain_epochs": 100,
    }  # fmt: skip
    return {
        "recipe": "anomaly", "settings": settings, "runs": [environment],
        "fields": list(Fit._fields), "fits": rows,
    }  # fmt: skip


@pytest.fixture
def root(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/results.md").write_text(
        "before\n<!-- anomaly: adbench -->\nold\n<!-- end -->\n"
        "<!-- anomaly: epoch -->\n<!-- end -->\nafter\n"
    )
    grid = tmp_path / "benchmarks/results/anomaly"
    grid.mkdir(parents=True)
    write_results(grid / "results.json", results())
    return tmp_path


def written(root, table: str, content: dict) -> list[str]:
    """The lines that `table` has when `content` was recorded."""
    write_results(root / anomaly_report.RESULTS / anomaly_report.GRID, content)
    (root / "docs/results.md").write_text(f"<!-- anomaly: {table} -->\n<!-- end -->\n")
    assert anomaly_report.main(["--root", str(root)]) == 0
    return (root / "docs/results.md").read_text().splitlines()


def test_tables_are_written_from_the_results_and_checked(root, capsys):
    text = (root / "docs/results.md").read_text
    argv = ["--root", str(root)]
    assert anomaly_report.main([*argv, "--check"]) == 1 and "old" in text()
    assert anomaly_report.main(argv) == 0
    written = text()
    assert written.startswith("before\n") and written.endswith("after\n")
    assert (
        "| MVTec-AD_a | ImbSAM | 92.0 ± 0.0 | 96.2 | - | +2.00 ± 0.00 | 1 of 1 | 91.0 ± 0.0 |"
        in written
    )
    assert "87 % of MVTec's test rows are training rows too" in written
    assert "Abacus 3000" in written and "commit 0123456789ab, 2031-02-03" in written
    assert "Not recorded yet." in written  # the epochs
    assert anomaly_report.main([*argv, "--check"]) == 0
    (root / "docs/results.md").write_text(written.replace("92.0 ± 0.0 |", "95.0 ± 0.0 |", 1))
    assert anomaly_report.main([*argv, "--check"]) == 1


def test_an_unknown_table_is_an_error(root, capsys):
    (root / "docs/results.md").write_text("<!-- anomaly: x -->\n<!-- end -->\n")
    assert anomaly_report.main(["--root", str(root)]) == 1
    assert "no table is called x" in capsys.readouterr().out


def test_methods_are_compared_beside_the_paper(root):
    two_sets = [
        *(row("sgd", 90 + seed, seed) for seed in (0, 1)),
        *(row("imbsam", 91 + 3 * seed, seed) for seed in (0, 1)),  # differences 1 and 3
        *(row(m, 80.0, seed, set="MVTec-AD_b") for m in ("sgd", "imbsam") for seed in (0, 1)),
        *(row("sgd", a, seed, protocol="adbench") for a, seed in ((95.0, 0), (96.0, 1))),
        *(row("sgd@2", 93.0, seed, protocol="adbench") for seed in (0, 1)),
        row("imbsam@2", 70.0),
        row("sgd@2", 70.0),  # on one set of two
    ]
    lines = written(root, "comparisons", results(two_sets))
    assert [line for line in lines if line.startswith("| DevNet")] == [
        "| DevNet | MVTec, 2 sets | ImbSAM minus SGD | +1.00 ± 0.50, 1 of 2 sets | - | +0.6 |",
        "| DevNet | MVTec, 2 sets | SGD, weight 2 minus SGD | - | -2.50 ± 0.50 | - |",
    ]


def test_ratios_are_compared_on_the_same_sets_and_seeds(root):
    fits = [
        row(method, area + 10 * ratio, seed, ratio=ratio)
        for ratio in (0.5, 0.1)
        for method, area in (("sgd", 60.0), ("sam", 60.5))
        for seed in (0, 1)
    ]
    more = row("sgd", 0.0, 2, ratio=0.1), row("sgd", 0.0, set="MVTec-AD_b", ratio=0.5)
    lines = written(root, "ratios", results([*fits, *more]))
    assert "2 seeds:" in lines
    assert [line for line in lines if "AUCPR of anomalies" in line] == [
        "| DevNet | MVTec-AD_a | AUCPR of anomalies (%) | SGD | 60.0 ± 0.0 | 64.0 ± 0.0 |",
        "| DevNet | MVTec-AD_a | AUCPR of anomalies (%) | SAM minus SGD | +0.50 ± 0.00 | +0.50 ± "
        "0.00 |",
    ]


def test_levels_stand_beside_other_bases_and_adbench(root):
    fits = [
        row(method, area + 10 * ratio + seed, seed, ratio=ratio, protocol="adbench")
        for ratio in (1.0, 0.25)
        for method, area in (("sgd", 60.0), ("imbsam", 60.5), ("sgd@2", 61.0))
        for seed in (0, 1)
    ]
    elsewhere = [
        row("sgd", 50.0, seed, set="MVTec-AD_b", ratio=r) for r in (1.0, 0.25) for seed in (0, 1)
    ]
    adam = results([row("sgd", 95.0, ratio=0.25)])
    adam["settings"]["base"] = "adam"
    write_results(root / anomaly_report.RESULTS / "base_adam.json", adam)
    other = results([row("sgd", 95.0, detector="deepsad")])
    write_results(root / anomaly_report.RESULTS / "base_other.json", other)

    def shown(fits: list[Fit]) -> list[str]:
        write_results(root / anomaly_report.RESULTS / anomaly_report.LEVELS, results(fits))
        return written(root, "levels", results())

    lines = shown(fits)
    assert "1 set, 2 seeds:" in lines
    assert [line for line in lines if line.startswith("| DevNet")] == [
        "| DevNet | SGD | 63.0 ± 0.7 | 70.5 ± 0.7 |",
        "| DevNet | ImbSAM | 63.5 ± 0.7 | 71.0 ± 0.7 |",
        "| DevNet | SGD, weight 2 | 64.0 ± 0.7 | 71.5 ± 0.7 |",
        "| DevNet | ImbSAM minus SGD | +0.50 ± 0.00 | +0.50 ± 0.00 |",
        "| DevNet | SGD, weight 2 minus SGD | +1.00 ± 0.00 | +1.00 ± 0.00 |",
        "| DevNet | Adam | 95.0 | - |",
        "| DevNet | ADBench's tables | 86.17 | 94.52 |",
    ]
    lines = shown([*fits, *elsewhere])  # of two sets the second was run with SGD alone
    assert [line for line in lines if line.startswith("| DevNet")] == [
        "| DevNet | SGD | 56.5 ± 0.4 | 60.2 ± 0.4 |",
        "| DevNet | ADBench's tables | 86.17 | 94.52 |",
    ]


def test_pretraining_is_compared_on_the_same_sets_and_seeds(root):
    def adam(name: str, areas: list[float], epochs: int) -> None:
        fits = [
            row("sgd", area, seed, detector="deepsad", protocol="adbench")
            for seed, area in enumerate(areas)
        ]
        content = results(fits)
        content["settings"] |= {"base": "adam", "pretrain_epochs": epochs}
        write_results(root / anomaly_report.RESULTS / name, content)

    adam("base_adam.json", [90.0, 80.0, 50.0], 100)
    adam("base_adam_anew.json", [85.0, 83.0], 0)
    lines = written(root, "pretraining", results())
    assert [line for line in lines if line.startswith("| Adam")] == [
        "| Adam | 1 | 2 | +1.00 ± 4.00 | -3.0 to +5.0 |"
    ]
    lines = written(root, "other-bases", results())
    assert sum("base Adam, not pre-trained, 2 seeds" in line for line in lines) == 1


def test_other_bases_have_tables_of_their_own(root):
    content = results([row("sgd", 95.0, seed) for seed in (0, 1)])
    content["settings"]["base"] = "adam"
    write_results(root / anomaly_report.RESULTS / "base_adam.json", content)
    lines = written(root, "other-bases", results())
    assert any("base Adam, 2 seeds" in line for line in lines)
    assert any(line.startswith("| MVTec-AD_a | Adam | 95.0 ± 0.0 |") for line in lines)


@pytest.mark.quick
def test_rates_are_means_over_the_sets_of_a_family(root):
    trials = [
        anomaly_rates.Trial("devnet", lr, name, "clean", 0.5, area + 1000 * lr)
        for lr in (0.01, 0.001)
        for name, area in (("MVTec-AD_a", 70.0), ("MVTec-AD_b", 80.0), ("SVHN_0", 60.0))
    ]
    content = {"environment": results()["runs"][0], "seed": 0, "trials": trials}
    (root / anomaly_report.RESULTS / "rates_all.json").write_text(json.dumps(content))
    lines = written(root, "rates", results())
    assert "| detector, rate | MVTec, clean | SVHN, clean |" in lines
    assert "| DevNet, 0.01 | 85.0 | 70.0 |" in lines and "| DevNet, 0.001 | 76.0 | 61.0 |" in lines


def test_rates_are_compared_on_training_rows_alone(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    y = (np.arange(90) % 3 == 0).astype(np.int64)
    X = (rng.normal(size=(90, 4)) + 3 * y[:, None]).astype(np.float32)
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "a.npz", X=X, y=y)
    parts = data.part(data.read(tmp_path / "data" / "a.npz"), "clean", 0.25, 0)
    seen = []
    for name in ("fit", "decision_function"):
        method = getattr(DevNet, name)

        def noted(self, rows, *rest, method=method):
            seen.append({row.tobytes() for row in rows})
            return method(self, rows, *rest)

        monkeypatch.setattr(DevNet, name, noted)
    monkeypatch.setattr(anomaly_rates, "RATES", (0.001, 1e30))
    path = tmp_path / "rates.json"
    argv = ["--data-dir", str(tmp_path / "data"), "--protocol", "clean", "--json", str(path)]
    assert anomaly_rates.main(argv) == 0
    fitted, held = seen[:2]
    assert not fitted & held and fitted | held == {row.tobytes() for row in X[parts.train_rows]}
    content = json.loads(path.read_text())
    trials = [anomaly_rates.Trial(*row) for row in content["trials"]]
    assert [(t.detector, t.lr) for t in trials] == [
        (name, lr) for name in ("deepsad", "devnet") for lr in (0.001, 1e30)
    ]
    assert all(t.aucroc > 60 for t in trials if t.lr == 0.001)
    assert all(t.train_loss is None and t.aucroc == 50 for t in trials if t.lr == 1e30)


def test_uncommitted_changes_are_told(root):
    lines = written(root, "clean", results(git_commit="0123456789abcdef-dirty"))
    assert any("commit 0123456789ab with uncommitted changes" in line for line in lines)


def test_the_document_has_every_table_once_and_says_what_the_results_say():
    text = (REPOSITORY / anomaly_report.DOCUMENT).read_text()
    found = [name for _, name, _, _ in anomaly_report.MARKER.findall(text)]
    assert sorted(found) == sorted(anomaly_report.TABLES)
    assert anomaly_report.main(["--check"]) == 0

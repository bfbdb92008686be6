"""The benchmark of the anomaly detectors, and the document that quotes recorded results."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

pytest.importorskip("sklearn")

from benchmarks import anomaly_report, bench_anomaly
from imbsam_fast import bench
from imbsam_fast.recipes.anomaly.losses import deepsad_loss, deviation_loss
from imbsam_fast.recipes.anomaly.networks import Encoder, Scorer
from imbsam_fast.recipes.anomaly.run import write_results
from imbsam_fast.recipes.anomaly.settings import Fit


def test_the_benchmark_runs_and_counts_in_epochs_of_sgd(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["x", "--quick", "--return-memory", "--json", str(path)])
    args = bench_anomaly.__file__, bench_anomaly.groups, bench_anomaly.summary
    assert bench.run_script(*args) == 0
    report = bench.load(path)
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


def results(**changes) -> dict:
    rows = [
        Fit("MVTec-AD_a", protocol, 0.25, seed, "devnet", method, area, area - 1, area + 1, 0.5, 70,
            3, leaked, 0)
        for protocol, leaked in (("adbench", 0.87), ("clean", 0.0))
        for method, area in (("sgd", 90.0), ("imbsam", 92.0))
        for seed in (0, 1)
    ]  # fmt: skip
    environment = {
        "date": "2031-02-03T04:05:06+00:00",
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"imbsam-fast": "1.2.3", "torch": "9.9", "python": "3.14.0"},
        "machine": {"cpu": "Abacus 3000", "cores": 8, "torch_threads": 1},
        "native": {"loaded": True, "isa_in_use": "avx2"},
    }
    settings = {
        "base": "sgd", "lr": None, "momentum": 0.9, "rho": 0.05, "plan": "auto", "epochs": 50,
        "batch_size": 128, "pretrain_epochs": 100,
    }  # fmt: skip
    return {
        "recipe": "anomaly", "settings": settings, "runs": [environment],
        "fields": list(Fit._fields), "fits": rows, **changes,
    }  # fmt: skip


@pytest.fixture
def root(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/anomaly.md").write_text(
        "before\n<!-- results: anomaly-adbench -->\nold\n<!-- end -->\n"
        "<!-- results: anomaly-epoch -->\n<!-- end -->\nafter\n"
    )
    grid = tmp_path / "benchmarks/results/anomaly"
    grid.mkdir(parents=True)
    write_results(grid / "results.json", results())
    return tmp_path


def test_tables_are_written_from_the_results_and_checked(root, capsys):
    text = (root / "docs/anomaly.md").read_text
    argv = ["--root", str(root)]
    assert anomaly_report.main([*argv, "--check"]) == 1 and "old" in text()
    assert anomaly_report.main(argv) == 0
    written = text()
    assert written.startswith("before\n") and written.endswith("after\n")
    assert (
        "| MVTec-AD_a | ImbSAM | 92.0 ± 0.0 | 96.2 | +2.00 ± 0.00 | 1 of 1 | 91.0 ± 0.0 |"
        in written
    )
    assert "87 % of MVTec's test rows are training rows too" in written
    assert "Abacus 3000" in written and "commit 0123456789ab, 2031-02-03" in written
    assert "Not recorded yet." in written  # the epochs
    assert anomaly_report.main([*argv, "--check"]) == 0
    (root / "docs/anomaly.md").write_text(written.replace("92.0 ± 0.0 |", "95.0 ± 0.0 |", 1))
    assert anomaly_report.main([*argv, "--check"]) == 1


def test_an_unknown_table_is_an_error(root, capsys):
    (root / "docs/anomaly.md").write_text("<!-- results: anomaly-x -->\n<!-- end -->\n")
    assert anomaly_report.main(["--root", str(root)]) == 1
    assert "no table is called anomaly-x" in capsys.readouterr().out


def test_the_document_says_what_the_results_say():
    assert anomaly_report.main(["--check"]) == 0

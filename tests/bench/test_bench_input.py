"""The benchmark of the input: that it runs, what it records, and the tables made of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision")

from PIL import Image

from benchmarks import bench_input, input_tables
from imbsam_fast.bench.report import load
from imbsam_fast.bench.script import run_script


@pytest.mark.slow  # starts workers and measures
@pytest.mark.skipif(sys.platform != "linux", reason="CPU time and descriptors are read in /proc")
def test_the_input_is_measured_and_tabulated(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    monkeypatch.setattr(bench_input, "WORKERS", (1, 2))
    monkeypatch.setattr("sys.argv", ["x", "--quick", "--json", str(path)])
    assert run_script(bench_input.__file__, bench_input.groups, bench_input.summary) == 0
    report = load(path)
    assert {t.operation for t in report.timings} == {
        bench_input.DECODE,
        bench_input.IMAGE,
        bench_input.PASS,
    }
    assert all(t.ms > 0 for t in report.timings)
    found = report.settings["transport"]
    ours, before = found[bench_input.OURS], found[bench_input.BEFORE]
    assert before["descriptors"] > ours["descriptors"]
    assert before["dev_shm_bytes"] > 4 * 4 * 3 * bench_input.SIZE**2 > ours["dev_shm_bytes"]
    assert ours["own_shared_bytes"] == 9 * 4 * 3 * bench_input.SIZE**2  # two a worker and one
    assert all(who["cpu_ms"] > 0 for who in found.values())
    shown = "\n".join([*input_tables.images(report), *input_tables.transport(report)])
    assert all(who in shown for who in (bench_input.OURS, bench_input.TORCHVISION, "2 workers"))


def test_its_files_are_different_photographs_of_one_size(tmp_path):
    paths = bench_input.make_files(tmp_path, 2, 80, 40)
    assert [Image.open(path).size for path in paths] == [(80, 40)] * 2
    assert len({Path(path).read_bytes() for path in paths}) == 2


def test_the_recorded_results_fill_the_tables():
    report = load(Path(bench_input.__file__).parent / "results/bench_input.json")
    shown = "\n".join([*input_tables.images(report), *input_tables.transport(report)])
    assert bench_input.OURS in shown and bench_input.TORCHVISION in shown

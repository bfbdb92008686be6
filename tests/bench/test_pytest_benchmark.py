"""`pytest benchmarks --benchmark-only`: its groups, what it times, and what it records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imbsam_fast.bench.measure import Operation

pytest.importorskip("pytest_benchmark")
from benchmarks import test_benchmarks as door

ROOT = Path(__file__).parent.parent.parent


def test_only_laps_are_timed_and_calls_are_counted():
    def contestant(watch):
        watch.laps = {"a": 2.0, "b": 4.0}

    clock = door.LapClock()
    clock.run(Operation("name", "size", {"who": contestant}, calls=3), "who")
    assert clock() == 2.0


def test_every_operation_is_there_once():
    names = [(operation.name, operation.size) for operation in door.operations()]
    assert len(names) == len(set(names))
    assert {name for name, _ in names} >= {
        "machine limit", "squared_norm", "perturb_", "sgd_update_", "merge_", "grad_check",
        "ImbSAM optimizer step", "loss forward", "training step",
    }  # fmt: skip


@pytest.mark.slow  # starts a pytest of its own
def test_groups_and_what_is_recorded(tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-k", "merge_"]
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # of no xdist
    subprocess.run(
        [*command, f"--benchmark-json={path}", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=alone,
        check=True,
        capture_output=True,
    )
    found = json.loads(path.read_text())["benchmarks"]
    assert len(found) == 2 and len({b["group"] for b in found}) == 1
    for b in found:
        info, stats = b["extra_info"], b["stats"]
        assert stats["rounds"] == door.ROUNDS and stats["min"] > 0
        assert info["gb_per_s"] == pytest.approx(info["bytes"] / stats["median"] / 1e9)
        assert info["percent_of_limit"] > 0

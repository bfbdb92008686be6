"""What two runs are compared by: ratios to peers, never times."""

from __future__ import annotations

from copy import deepcopy

import pytest

from benchmarks import compare, guard
from imbsam_fast.bench.measure import LIMIT, Timing
from imbsam_fast.bench.report import Report, save

ENVIRONMENT = {
    "machine": {"cpu": "A", "cores": 2, "torch_threads": 1},
    "native": {"isa_in_use": "avx2"},
    "versions": {"torch": "2.14.1"},
}


def timing(operation, contestant, samples, size="small"):
    return Timing(operation, size, contestant, 1.0, {}, samples, None, None)


def report(*timings) -> Report:
    return Report("guard", list(timings), settings={"environment": deepcopy(ENVIRONMENT)})


def run(ours, first=2.0, second=4.0, scale=1.0) -> Report:
    """One operation in three rounds, the last of them disturbed for one contestant each."""
    return report(
        timing(LIMIT, "read", [1.0] * 3),
        timing("perturb_", "imbsam-fast, native", [ours * scale, ours * scale, 50.0]),
        timing("perturb_", "imbsam-fast, reference", [first * scale, first * scale, 90.0]),
        timing("perturb_", "authors", [second * scale, second * scale, 1.0]),
    )


def saved(tmp_path, *reports):
    paths = [tmp_path / f"{i}.json" for i in range(len(reports))]
    for path, found in zip(paths, reports):
        save(found, path)
    return [str(path) for path in paths]


def test_an_advantage_is_the_median_over_rounds_of_the_same_round():
    (found,) = compare.advantages(run(1.0)).values()
    assert found == {"imbsam-fast, reference": 2.0, "authors": 4.0}


def test_training_steps_compare_each_of_ours_with_the_others():
    found = compare.advantages(
        report(
            timing("training step", "SGD", [1.0]),
            timing("training step", "ImbSAM, TrainStep joint", [2.0]),
            timing("training step", "authors' loop", [3.0]),
            timing("training step", "ImbSAM, TrainStep split", [1.5]),
        )
    )
    assert found == {
        ("training step", "small", "ImbSAM, TrainStep joint"): {"SGD": 0.5, "authors' loop": 1.5},
        ("training step", "small", "ImbSAM, TrainStep split"): {
            "SGD": pytest.approx(2 / 3),
            "authors' loop": 2.0,
        },
    }


@pytest.mark.parametrize(
    ("new", "code"),
    [
        (run(1.0, scale=3.0), 0),  # a slower machine
        (run(1.3), 0),  # 23 % of the advantage
        (run(1.4), 1),  # 29 %
        (run(0.5), 0),  # faster
        (run(1.0, second=0.1), 1),  # half of the peers caught up
        (report(timing("merge_", "imbsam-fast, native", [1.0])), 2),
    ],
)
def test_the_exit_status_says_whether_more_than_a_quarter_is_lost(tmp_path, capsys, new, code):
    assert compare.main(saved(tmp_path, run(1.0), new)) == code
    assert ("LOSS" in capsys.readouterr().out) == (code == 1)


def test_the_share_that_may_be_lost_is_an_option(tmp_path, capsys):
    paths = saved(tmp_path, run(1.0), run(1.4))
    assert compare.main([*paths, "--loss", "0.3"]) == 0
    with pytest.raises(SystemExit):
        compare.main([*paths, "--loss", "1"])
    assert "--loss is 1.0, expected at least 0 and less than 1" in capsys.readouterr().err


def test_a_file_that_is_missing_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "none.json"), str(tmp_path / "none.json")])
    assert "none.json is no file" in capsys.readouterr().err


def test_another_machine_is_said(tmp_path, capsys):
    other = run(1.0)
    other.settings["environment"]["native"]["isa_in_use"] = "avx512"
    compare.main(saved(tmp_path, run(1.0), other))
    assert "not the same machine or torch: isa: avx2, now avx512" in capsys.readouterr().out


def guarded(tmp_path, monkeypatch, old, *new):
    (path,) = saved(tmp_path, old)
    left = iter(new)
    monkeypatch.setattr(guard, "measured", lambda: next(left))
    return guard.main(["--recorded", path])


def test_the_guard_measures_again_what_seems_lost(tmp_path, monkeypatch, capsys):
    assert guarded(tmp_path, monkeypatch, run(1.0), run(1.0)) == 0
    assert guarded(tmp_path, monkeypatch, run(1.0), run(1.4), run(1.0)) == 0
    assert "twice" not in capsys.readouterr().out
    assert guarded(tmp_path, monkeypatch, run(1.0), run(1.4), run(1.5)) == 1
    assert "perturb_ (small), imbsam-fast, native: 3.00 before, 2.00 now" in capsys.readouterr().out


def test_the_guard_does_not_compare_across_machines(tmp_path, monkeypatch, capsys):
    other = run(9.0)
    other.settings["environment"]["machine"]["cpu"] = "B"
    assert guarded(tmp_path, monkeypatch, run(1.0), other) == 0
    assert "not compared, recorded elsewhere: cpu: A, now B" in capsys.readouterr().out


def test_what_is_recorded_has_every_operation_of_the_quick_sizes():
    old = guard.load(guard.RECORDED)
    assert {key[0] for key in compare.advantages(old)} >= {
        "squared_norm", "perturb_", "sgd_update_", "merge_", "grad_check",
        "ImbSAM optimizer step", "loss forward", "loss forward, head and tail backward",
    }  # fmt: skip
    assert all(len(t.samples_ms) == guard.ROUNDS for t in old.timings)

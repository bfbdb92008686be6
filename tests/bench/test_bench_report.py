"""Documents from recorded results: tables, where they come from, what --check finds, plots."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bench_growth, bench_step, peers, report
from benchmarks.tables import LOSS, PHASES, TABLES
from imbsam_fast.bench.cases import MASKS
from imbsam_fast.bench.measure import LIMIT, Memory, Timing
from imbsam_fast.bench.optimizers import AUTHORS, AUTHORS_FUSED, IMBSAM
from imbsam_fast.bench.report import Report, save

REPOSITORY = Path(__file__).parents[2]
OURS = "imbsam-fast, native"


def timing(operation: str, size: str, contestant: str, ms: float, **more) -> Timing:
    more = {"laps_ms": {}, "bytes": None, "moved_bytes": None, **more}
    return Timing(operation, size, contestant, ms, samples_ms=[ms], **more)


def settings(**changes) -> dict:
    environment = {
        "date": "2031-02-03T04:05:06+00:00",
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"imbsam-fast": "1.2.3", "torch": "9.9", "python": "3.14.0"},
        "machine": {"cpu": "Abacus 3000", "cores": 8, "torch_threads": 4},
        "native": {"loaded": True, "isa_in_use": "avx2"},
    }
    found = {"rounds": 15, "quick": False, "freed_memory": "kept", "cores_used_by_others": 0.04}
    return {**found, "environment": environment, **changes}


def optimizer_report() -> Report:
    size = "ResNet-50: 161 tensors, 40.2M"
    timings = [
        timing(LIMIT, "copy, 160 MB", "plain stores", 1, gb_per_s=20.0),
        timing(LIMIT, "copy, 160 MB", "plain stores", 1, gb_per_s=30.0, group=1),
    ]
    timings += [timing(phase, size, OURS, 12.5, percent_of_limit=90.4) for phase in PHASES]
    for rules, contenders in (
        (IMBSAM, {OURS: (100, 11), AUTHORS: (270, 27), AUTHORS_FUSED: (210, 21)}),
        (peers.SAM, {OURS: (90, 10), peers.DAVDA: (117, 13)}),
        (peers.SGD, {OURS: (45, 5), peers.PLAIN_SGD: (45, 5)}),
    ):
        first = contenders[OURS][0]
        for who, (ms, moves) in contenders.items():
            more = {"bytes": rules.moves * 100, "moved_bytes": moves * 100}
            share = 95 * first / ms
            timings.append(
                timing(rules.name, size, who, ms, ratio=ms / first, percent_of_limit=share, **more)
            )
    small = timing(IMBSAM.name, "small", OURS, 0.1234, bytes=11, moved_bytes=11)
    return Report("bench_optimizer", [*timings, small], settings=settings())


def loss_report() -> Report:
    timings = [
        timing(operation, "512 x 8142", who, ms, ratio=ms / 10, percent_of_limit=80.0)
        for operation in ("loss forward", LOSS)
        for who, ms in ((OURS, 10), (MASKS, 31), (peers.COMPILED_ROW_WEIGHTS, 13))
    ]
    return Report("bench_split_cross_entropy", timings, settings=settings())


def step_report() -> Report:
    times = {
        bench_step.SGD: 100, bench_step.SAM: 200, bench_step.AUTHORS: 270, bench_step.JOINT: 255,
        bench_step.JOINT_BY_HAND: 250, bench_step.SPLIT: 147, bench_step.SPLIT_BY_HAND: 144,
    }  # fmt: skip
    timings = [
        timing(
            bench_step.STEP, size, who, ms, ratio=ms / 100,
            laps_ms={bench_step.PASSES: ms - 10, bench_step.OPTIMIZER: 10},
            peak_bytes=int(ms * 1e6),
        )
        for size in ("BatchNorm ResNet, f = 0.44", "LayerNorm ViT, f = 0.44")
        for who, ms in times.items()
        if "split" not in who or "ViT" in size
    ]  # fmt: skip
    return Report("bench_step", timings, settings=settings())


def growth_report() -> Report:
    timings = [
        timing(IMBSAM.name, bench_growth.label("elements", n), who, 0.5 + 3e-6 * k * n)
        for n in (100_000, 1_000_000)
        for k, who in enumerate((OURS, AUTHORS), 1)
    ]
    timings += [
        timing(IMBSAM.name, bench_growth.label("tensors", n), OURS, 0.25 + 2e-3 * n)
        for n in (1, 10_000)
    ]
    return Report("bench_growth", timings, settings=settings())


def memory_report() -> Report:
    found = [
        Memory("MLP", who, 10_000_000, kept * 10_000_000, peak * 1_000_000)
        for who, kept, peak in (("SGD", 2, 31), ("LeanImbSAM", 2, 33), ("authors", 4, 52))
    ]
    counted = settings()
    for timed in ("rounds", "freed_memory", "cores_used_by_others"):
        del counted[timed]
    return Report("bench_memory", [], settings=counted, memory=found)


def host_report() -> Report:
    calls = ("first_step", "second_step", "third_step")
    timings = [
        timing(IMBSAM.name, "161 tensors", who, ms, laps_ms=dict.fromkeys(calls, ms / 3))
        for who, ms in ((OURS, 0.3), (AUTHORS, 3.0))
    ]
    return Report("bench_host", timings, settings=settings())


REPORTS = {
    "bench_host": host_report,
    "bench_optimizer": optimizer_report,
    "bench_split_cross_entropy": loss_report,
    "bench_step": step_report,
    "bench_growth": growth_report,
    "bench_memory": memory_report,
}

EXPECTED = {
    "limits": ["| copy, 160 MB, plain stores | 25.0 | 20.0 | 30.0 |"],
    "phases": [
        "| ms (of the limit) | squared_norm | perturb_ | sgd_update_ | merge_ | grad_check |",
        "| ResNet-50: 161 tensors, 40.2M" + 5 * " | 12.5 (90 %)" + " |",
    ],
    "optimizer": [
        "| ms (times ours) | moves | ResNet-50: 161 tensors, 40.2M | small |",
        f"| ImbSAM optimizer step: {OURS} | 11n | 100 (1.00) | 0.123 (1.00) |",
        f"| ImbSAM optimizer step: {AUTHORS_FUSED} | 21n | 210 (2.10) | - |",
        f"| SAM optimizer step: {peers.DAVDA} | 13n | 117 (1.30) | - |",
        f"| SGD optimizer step: {peers.PLAIN_SGD} | 5n | 45 (1.00) | - |",
    ],
    "traffic": [
        f"| ImbSAM optimizer step: {AUTHORS} | 27n | 86 % | - |",  # 95 % / 2.7 * 27 / 11
        f"| SGD optimizer step: {peers.PLAIN_SGD} | 5n | 95 % | - |",
    ],
    "host": [
        "| microseconds (of each call) | 161 tensors |",
        f"| ImbSAM optimizer step: {OURS} | 300 (100 + 100 + 100) |",
    ],
    "loss": [
        "| ms (times ours) | 512 x 8142 |",
        f"| loss forward: {OURS} | 10 (1.00) |",
        f"| {LOSS}: {MASKS} | 31 (3.10) |",
    ],
    "training": [
        "| BatchNorm ResNet, f = 0.44 | 100 | 1.00 | 2.00 | 2.70 | 2.55 | 2.50 | - | - |",
        "| LayerNorm ViT, f = 0.44 | 100 | 1.00 | 2.00 | 2.70 | 2.55 | 2.50 | 1.47 | 1.44 |",
    ],
    "training-optimizer": [
        "| BatchNorm ResNet, f = 0.44 | 10.00 | 10.00 | 10.00 | 10.00 | 10.00 | - | - |",
    ],
    "training-memory": [
        "| BatchNorm ResNet, f = 0.44 | 100.0 | 200.0 | 270.0 | 255.0 | 250.0 | - | - |",
    ],
    "memory": [
        "| n | SGD | LeanImbSAM | authors |",
        "| MLP, n = 10.0 MB, at the peak | 3.10 | 3.30 | 5.20 |",
        "| MLP, n = 10.0 MB, from step to step | 2.00 | 2.00 | 4.00 |",
    ],
    "added": [
        "| BatchNorm ResNet, f = 0.44 | - | +2.0 % | -1.9 % |",  # 255 / 250, 255 / 260
        "| LayerNorm ViT, f = 0.44 | +2.1 % | +2.0 % | -1.9 % |",
    ],
    "growth": [
        f"| {IMBSAM.name}: {OURS} | 500 | 3 | 250 | 2 |",
        f"| {IMBSAM.name}: {AUTHORS} | 500 | 6 | - | - |",
    ],
    "summary": [
        "| optimizer step, ResNet-50: 161 tensors, 40.2M | 100 ms, 95 % | 2.70 | 2.10 | - |",
        f"| {LOSS}, 512 x 8142 | 10 ms, 80 % | 3.10 | - | 1.30 |",
        "| training step, split plan, LayerNorm ViT, f = 0.44 | 147 ms | 1.84 | - | - |",
    ],
}


def document(*names: str) -> str:
    blocks = (f"Before {n}\n\n<!-- results: {n} -->\nold\n<!-- end -->\n\nAfter\n" for n in names)
    return "\n".join(blocks)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A place with both documents and fake results of every benchmark."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(document("summary"))
    (tmp_path / "docs/performance.md").write_text(document(*sorted(set(TABLES) - {"summary"})))
    for name, make in REPORTS.items():
        save(make(), tmp_path / "results" / f"{name}.json")
    return tmp_path


def run(directory: Path, *arguments: str) -> int:
    places = {"--root": directory, "--results": directory / "results", "--plots": directory / "p"}
    return report.main([*arguments, *(str(x) for pair in places.items() for x in pair)])


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("name", TABLES)
def test_a_table_says_what_the_results_say(name):
    results = {source: REPORTS[source]() for source in TABLES[name].sources}
    text, complaints = report.filled(document(name), results)
    assert complaints == []
    assert text.startswith(f"Before {name}\n\n<!-- results: {name} -->\n\n| ")
    assert text.endswith("\n\n<!-- end -->\n\nAfter\n") and "old" not in text
    lines = text.splitlines()
    for expected in EXPECTED[name]:
        assert expected in lines
    rows = [line for line in lines if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    for source in TABLES[name].sources:
        (line,) = (x for x in lines if x.startswith(f"Measured ({source}): "))
        timed = "; 15 rounds, freed memory kept. Other processes kept 0.0 cores busy."
        assert line.endswith(
            "Abacus 3000, 8 cores, 4 used, avx2; imbsam-fast 1.2.3, torch 9.9, Python 3.14.0; "
            "commit 0123456789ab, 2031-02-03" + (timed if results[source].timings else ".")
        )


def test_what_a_result_is_not_good_for_is_said():
    made = step_report()
    made.settings["quick"] = True
    made.settings["cores_used_by_others"] = None
    made.settings["environment"]["git_commit"] += "-dirty"
    made.settings["environment"]["native"] = {"loaded": False}
    (line,) = report.provenance([made])
    assert "no compiled kernels" in line and "Other processes" not in line
    assert "commit 0123456789ab with uncommitted changes" in line
    assert line.endswith("Tiny sizes, to see that it runs: not a result.")
    made.settings["environment"]["git_commit"] = None
    assert "commit unknown, " in report.provenance([made])[0]


# ---------------------------------------------------------------- documents


@pytest.mark.slow  # draws plots
def test_documents_are_filled_and_then_check(directory, capsys):
    assert run(directory) == 0
    for path, names in (
        (directory / "README.md", ["summary"]),
        (directory / "docs/performance.md", sorted(set(TABLES) - {"summary"})),
    ):
        text = path.read_text()
        assert "old" not in text
        assert all(line in text for name in names for line in EXPECTED[name])
    capsys.readouterr()
    assert run(directory, "--check") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.slow  # draws plots
def test_check_finds_a_number_that_no_result_says(directory, capsys):
    run(directory)
    path = directory / "README.md"
    wrong = path.read_text().replace("| 2.70 |", "| 3.70 |")
    path.write_text(wrong)
    capsys.readouterr()
    assert run(directory, "--check") == 1
    assert capsys.readouterr().out == (
        "README.md: differs from the results; run python -m benchmarks.report\n"
    )
    assert path.read_text() == wrong


@pytest.mark.slow  # draws plots
@pytest.mark.parametrize("arguments", [[], ["--check"]], ids=str)
def test_a_marker_without_its_result_fails_and_keeps_its_table(directory, arguments, capsys):
    run(directory)
    (directory / "results/bench_step.json").unlink()
    before = (directory / "README.md").read_text()
    capsys.readouterr()
    assert run(directory, *arguments) == 1
    assert "README.md: no result for summary: bench_step was not run" in capsys.readouterr().out
    assert (directory / "README.md").read_text() == before


def test_markers_that_cannot_be_filled_are_named():
    text, complaints = report.filled(document("speed"), {})
    assert text == document("speed")
    assert complaints[0].startswith("no table is called speed; there are limits, phases, ")
    _, complaints = report.filled("<!-- results: loss -->\n", {})
    assert complaints == ["1 markers start, expected an end for each"]


def test_the_documents_of_this_repository_have_every_table_once():
    found = [
        name
        for document in report.documents_of(REPOSITORY)
        for _, name, _, _ in report.MARKER.findall(document.read_text())
    ]
    assert sorted(found) == sorted(report.TABLES)


@pytest.mark.quick
@pytest.mark.skipif(
    not (REPOSITORY / "benchmarks/results").exists(), reason="no results are recorded yet"
)
def test_the_documents_of_this_repository_say_what_the_results_say():
    assert report.main(["--check"]) == 0


# ---------------------------------------------------------------- plots


def test_plots_are_drawn(directory, capsys):
    pytest.importorskip("matplotlib")
    assert run(directory) == 0
    drawn = sorted(path.name for path in (directory / "p").iterdir())
    assert drawn == [
        "bench_optimizer.png", "bench_step.png", "growth_elements.png", "growth_tensors.png",
    ]  # fmt: skip
    assert capsys.readouterr().out.count(".png\n") == 4
    for path in (directory / "p").iterdir():
        assert path.read_bytes()[1:4] == b"PNG" and path.stat().st_size > 5000


def test_without_matplotlib_there_are_tables_only(directory, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert run(directory) == 0
    assert "no plots: matplotlib is not installed" in capsys.readouterr().out
    assert not (directory / "p" / "bench_step.png").exists()

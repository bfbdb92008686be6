"""benchmarks/bench_distributed.py: what it counts, its model, and the tables made of both."""

from __future__ import annotations

from pathlib import Path

import pytest
from sharded import needs_fsdp

from benchmarks import bench_distributed, distributed_tables
from benchmarks.bench_distributed import (
    ALL_GATHER,
    ALL_REDUCE,
    AUTHORS,
    JOINT,
    LOCAL,
    REDUCE_SCATTER,
    SGD,
    SHARDED,
    SPLIT,
    STEP,
)
from imbsam_fast.bench.measure import Timing
from imbsam_fast.bench.report import Report, load

pytestmark = [pytest.mark.slow, needs_fsdp]  # starts ranks and measures

NETWORK = next(iter(bench_distributed.QUICK_NETWORKS))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of two ranks, as it comes back from its file."""
    path: Path = tmp_path_factory.mktemp("bench") / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_distributed, "RANKS", (1, 2))
        assert bench_distributed.main(["--quick", "--json", str(path)]) == 0
    return load(path)


def test_steps_exchange_what_the_documents_say(report):
    size = bench_distributed.size_of(NETWORK, 2)
    n = next(t.bytes for t in report.timings if t.size == size)
    found = {
        who: {kind: (calls, total / n) for kind, (calls, total) in kinds.items()}
        for who, kinds in report.settings["exchanged"][size].items()
    }
    for who, times in {SGD: 1, AUTHORS: 3, JOINT: 2, SPLIT: 2, LOCAL: 1}.items():
        assert found[who] == {ALL_REDUCE: (times, times)}
    for who, gathered, scattered in ((SGD, 2, 1), (JOINT, 5, 3), (SPLIT, 6, 3)):
        kinds = dict(found[SHARDED + who])
        norm = kinds.pop(ALL_REDUCE, None)
        assert norm == (None if who == SGD else (1, 8 / n))  # one float64
        layers = 3  # each in shards of its own
        assert kinds == {
            ALL_GATHER: (layers * gathered, gathered),
            REDUCE_SCATTER: (layers * scattered, scattered),
        }


def test_tables_are_made_of_it(report):
    assert all(t.ms > 0 for t in report.timings)
    for table in (distributed_tables.exchange, distributed_tables.steps):
        assert all(any(who in line for line in table(report)) for who in (SGD, JOINT, SPLIT))
    assert len(distributed_tables.costs(report)) == 3  # header, rule, two ranks
    assert "in the median" in distributed_tables.steps(report)[-1]


def test_the_model_adds_collectives_to_shared_cores():
    def timing(operation: str, size: str, who: str, ms: float, bytes_: int) -> Timing:
        return Timing(operation, size, who, ms, {}, [ms], bytes_, None)

    timings = [timing(STEP, f"net, {ranks}", SGD, 10.0, 400) for ranks in ("1 rank", "4 ranks")]
    for kind in (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER):
        for size in (100, 1000, 10_000):
            ms = 0.5 + 0.001 * size
            timings.append(timing(bench_distributed.COLLECTIVE, "4 ranks", kind, ms, size))
    settings = {
        "environment": {"machine": {"cores": 2}},
        "exchanged": {"net, 4 ranks": {SGD: {ALL_REDUCE: [3, 1200], ALL_GATHER: [1, 50]}}},
    }
    found = Report("", timings, settings=settings)
    expected = 10 * 4 / 2 + 3 * 0.5 + 1.2 + 0.5 + 0.05
    assert bench_distributed.predicted_ms(found, "net", SGD, 4) == pytest.approx(expected)
    assert [*bench_distributed.sizes(found)] == [("net", 1), ("net", 4)]


def test_more_ranks_cost_more_on_paper():
    rows = [line.split("|")[1:-1] for line in distributed_tables.extended()[2:]]
    columns = [[float(cell) for cell in column] for column in zip(*rows)]
    assert columns[0] == list(distributed_tables.SOME_RANKS)
    assert all(column == sorted(column) for column in columns)
    for sgd, authors, ours, local, *_ in zip(*columns[1:]):
        assert sgd == local and authors == pytest.approx(3 * sgd, abs=0.2)
        assert ours == pytest.approx(2 * sgd, abs=0.2)

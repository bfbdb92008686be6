"""The tables of docs/distributed.md: steps on several processes, and what they would cost on more.

Measured on a CPU with gloo, except the last table: that one is arithmetic alone.
"""

from __future__ import annotations

import math
import statistics

from benchmarks import bench_distributed
from benchmarks.bench_distributed import (
    ALL_GATHER,
    ALL_REDUCE,
    REDUCE_SCATTER,
    STEP,
    predicted_ms,
    size_of,
    sizes,
)
from benchmarks.tables import NO_VALUE, Lines, Table, markdown, milliseconds
from imbsam_fast.bench.report import Report

KINDS = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER)

# On paper: the weights of ResNet-50 with 8,142 classes, and one 400 Gb/s network port a GPU, as
# NVIDIA states of the DGX H100. The latency of one message is assumed.
BYTES = 4 * 40.2e6
BYTES_PER_S = 400e9 / 8
LATENCY_S = 5e-6
SOME_RANKS = (8, 64, 512, 4096)


def exchange(report: Report) -> Lines:
    """What one step exchanges, in the bytes of all weights, on the most ranks that were run."""
    network, ranks = list(sizes(report))[-1]
    size = size_of(network, ranks)
    n = next(t.bytes for t in report.timings if t.size == size)
    rows = []
    for who, found in report.settings["exchanged"][size].items():
        cells = []
        for kind in KINDS:
            calls, total = found.get(kind, (0, 0))
            cells.append(f"{total / n:.2f}n ({calls})" if calls else NO_VALUE)
        sent = sum((2 if k == ALL_REDUCE else 1) * found.get(k, (0, 0))[1] for k in KINDS)
        rows.append((who, *cells, f"{sent / n:.2f}n"))
    header = (f"{network}: bytes (calls)", *KINDS, "sent by a rank, many ranks in a ring")
    return markdown(header, rows)


def costs(report: Report) -> Lines:
    """Latency and bandwidth of collectives alone: the straight lines through their times."""
    rows = []
    for ranks in dict.fromkeys(ranks for _, ranks in sizes(report)):
        if ranks > 1:
            lines = bench_distributed.costs(report, ranks)
            rows.append(
                (
                    f"{ranks} ranks",
                    *(f"{line.fixed_ms:.3g}, {1e-6 / line.ms_each:.2f}" for line in lines.values()),
                )
            )
    return markdown(("latency in ms, GB/s of the whole tensor", *KINDS), rows)


def steps(report: Report) -> Lines:
    """Measured, and in brackets what the model says from one rank and the table of costs."""
    whos = list(dict.fromkeys(t.contestant for t in report.timings if t.operation == STEP))
    rows = []
    shares = []
    for network, ranks in sizes(report):
        size = size_of(network, ranks)
        cells = []
        for who in whos:
            ms = report.ms(STEP, who, size)
            cells.append(milliseconds(ms))
            if ranks > 1:
                model = predicted_ms(report, network, who, ranks)
                cells[-1] += f" ({milliseconds(model)})"
                shares.append(model / ms)
        rows.append((size, *cells))
    agreement = (
        f"The model's times are {min(shares):.2f} to {max(shares):.2f} of the measured ones, "
        f"in the median {statistics.median(shares):.2f}."
    )
    return [*markdown(("ms (model)", *whos), rows), "", agreement]


def extended() -> Lines:
    """Milliseconds of communication in one step, were none of it hidden behind computing."""

    def ring(ranks: int) -> float:
        """An all-gather or a reduce-scatter, half of an all-reduce."""
        return (ranks - 1) * (LATENCY_S + BYTES / ranks / BYTES_PER_S)

    def tree(ranks: int) -> float:
        return 2 * (math.ceil(math.log2(ranks)) * LATENCY_S + BYTES / BYTES_PER_S)

    rows = []
    for ranks in SOME_RANKS:
        all_reduce = min(2 * ring(ranks), tree(ranks))
        halves = (3, 8, 9)  # of fully_shard: SGD, joint, split
        costs = (*(k * all_reduce for k in (1, 3, 2, 1)), *(k * ring(ranks) for k in halves))
        rows.append((f"{ranks}", *(f"{1e3 * cost:.1f}" for cost in costs)))
    header = (
        "ranks", "SGD", "authors' loop", "joint or split", "the same, local perturbation",
        "fully_shard: SGD", "fully_shard: joint", "fully_shard: split",
    )  # fmt: skip
    return markdown(header, rows)


SOURCE = ("bench_distributed",)
TABLES = {
    "distributed-exchange": Table(SOURCE, exchange, optional=True),
    "distributed-costs": Table(SOURCE, costs, optional=True),
    "distributed-steps": Table(SOURCE, steps, optional=True),
    "distributed-extended": Table((), extended),
}

"""The tables of docs/performance.md on reading images."""

from __future__ import annotations

from benchmarks.tables import Lines, Table, markdown
from imbsam_fast.bench.report import Report

DECODE, IMAGE, PASS = "decode", "file to image", "pass"


def images(report: Report) -> Lines:
    """Of one core, or by the clock: images a second and milliseconds an image."""
    rows = []
    for t in report.timings:
        per = "a core" if t.operation in (DECODE, IMAGE) else "by the clock"
        what = f"{t.operation}, {t.size}"
        rows.append((what, t.contestant, f"{1e3 / t.ms:,.0f} {per}", f"{t.ms:.2f}"))
    return markdown(("", "who", "images/s", "ms an image"), rows)


def transport(report: Report) -> Lines:
    """What three batches of the recipe's size take on their way, with the recipe's workers."""
    rows = []
    for who, found in report.settings["transport"].items():
        shared, own = (found[key] / 1e6 for key in ("dev_shm_bytes", "own_shared_bytes"))
        cells = (f"{found['descriptors']}", f"{shared:,.0f} MB", f"{own:,.0f} MB")
        rows.append((who, *cells, f"{found['cpu_ms']:.2f} ms"))
    header = ("", "descriptors", "in /dev/shm", "other shared memory", "CPU an image")
    return markdown(header, rows)


TABLES = {
    "input": Table(("bench_input",), images, optional=True),
    "input-transport": Table(("bench_input",), transport, optional=True),
}

"""Writes recorded results into the documents, and draws plots of them.

    python -m benchmarks.report [--check] [--results DIR] [--root DIR]

A table goes between `<!-- results: NAME -->` and `<!-- end -->`; the names are in TABLES.
Exits 1 where a marker cannot be filled, with --check also where a document says something else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import (
    bfloat16_study,
    correction_study,
    distributed_tables,
    documents,
    gpu_tables,
    gpu_timing,
    input_tables,
    plots,
    recipe_tables,
    studies,
    tables,
)
from benchmarks.tables import Lines
from imbsam_fast.bench.report import Report, load

TABLES = {
    **tables.TABLES,
    **gpu_tables.TABLES,
    **distributed_tables.TABLES,
    **input_tables.TABLES,
    **recipe_tables.TABLES,
    **bfloat16_study.TABLES,
    **correction_study.TABLES,
}
NOT_MEASURED = "Not measured."
Results = dict[str, Any]  # a Report, GpuReport, RecipeReport or Study by its file, without suffix
WORD = "results"
MARKER = documents.marker(WORD)


def filled(text: str, results: Results) -> tuple[str, list[str]]:
    """The document with its tables made anew, and a complaint for each that cannot be made."""

    def lines(name: str) -> Lines:
        table = TABLES[name]
        missing = [source for source in table.sources if source not in results]
        if missing and table.optional:
            return [NOT_MEASURED]
        if missing:
            raise documents.UnfilledError(f"no result for {name}: {', '.join(missing)} was not run")
        reports = [results[source] for source in table.sources]
        return [*table.lines(*reports), "", *provenance(reports)]

    return documents.fill(text, WORD, TABLES, lines)


def provenance(reports: Sequence[Any]) -> Lines:
    """Where, when and from what the numbers of a table come, one line if all agree."""
    return list(dict.fromkeys(_provenance(report) for report in reports))


def _provenance(
    report: Report | gpu_timing.GpuReport | recipe_tables.RecipeReport | studies.Study,
) -> str:
    if isinstance(report, studies.Study):
        return report.provenance
    if isinstance(report, recipe_tables.RecipeReport):
        return recipe_tables.provenance(report)
    if isinstance(report, gpu_timing.GpuReport):
        return gpu_tables.provenance(report)
    s = report.settings
    e = s["environment"]
    machine, native = e["machine"], e["native"]
    others = s.get("cores_used_by_others")
    facts = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} used, "
        f"{native['isa_in_use'] if native['loaded'] else 'no compiled kernels'}",
        tables.software(e),
        f"{tables.commit(e)}, {e['date'][:10]}",
    ]
    if report.timings:
        facts.append(f"{s['rounds']} rounds, freed memory {s['freed_memory']}")
    load = "" if others is None else f" Other processes kept {others:.1f} cores busy."
    tiny = " Tiny sizes, to see that it runs: not a result." if s["quick"] else ""
    return f"Measured ({report.title}): {'; '.join(facts)}.{load}{tiny}"


def documents_of(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def load_results(directory: Path) -> Results:
    found: Results = {path.stem: load(path) for path in sorted(directory.glob("*.json"))}
    for path in sorted(directory.glob("gpu/bench_gpu*.json")):
        measured = gpu_timing.load(path)
        if measured.dry_run:
            raise SystemExit(f"{path} is of a dry run, which measured nothing: move it away")
        found[f"gpu/{path.stem}"] = measured
    for path in sorted(directory.glob("recipes/*.json")):
        found[f"recipes/{path.stem}"] = recipe_tables.load(path)
    for path in sorted(directory.glob("studies/*.json")):
        found[f"studies/{path.stem}"] = studies.read(path)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    parser.add_argument("--results", type=Path, default=here / "results", metavar="DIR")
    parser.add_argument("--root", type=Path, default=here.parent, help="where the documents are")
    parser.add_argument("--plots", type=Path, default=here / "plots", metavar="DIR")
    args = parser.parse_args(argv)
    results = load_results(args.results)
    fine = documents.update(
        documents_of(args.root),
        args.root,
        partial(filled, results=results),
        args.check,
        "python -m benchmarks.report",
    )
    if not args.check:
        _draw(results, args.plots)
    return int(not fine)


def _draw(results: Results, directory: Path) -> None:
    try:
        drawn = plots.draw(results, directory)
    except ModuleNotFoundError as error:
        print(f"no plots: {error.name} is not installed (extra `bench`)")
        return
    for path in drawn:
        print(path)


if __name__ == "__main__":
    sys.exit(main())

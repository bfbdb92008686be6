"""Writes recorded results into the documents, and draws plots of them.

    python -m benchmarks.report [--check] [--results DIR] [--root DIR]

A table goes between `<!-- results: NAME -->` and `<!-- end -->`; the names are in TABLES.
Exits 1 where a marker cannot be filled, with --check also where a document says something else.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    distributed_tables,
    gpu_tables,
    gpu_timing,
    plots,
    recipe_tables,
    tables,
)
from benchmarks.tables import Lines
from imbsam_fast import bench

TABLES = {
    **tables.TABLES,
    **gpu_tables.TABLES,
    **distributed_tables.TABLES,
    **recipe_tables.TABLES,
}
NOT_MEASURED = "Not measured."
Results = dict[str, Any]  # a Report, GpuReport or RecipeReport by its file, without suffix
MARKER = re.compile(r"(<!-- results: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def filled(text: str, results: Results) -> tuple[str, list[str]]:
    """The document with its tables made anew, and a complaint for each that cannot be made."""
    complaints = []

    def fill(marker: re.Match[str]) -> str:
        start, name, _, end = marker.groups()
        if name not in TABLES:
            complaints.append(f"no table is called {name}; there are {', '.join(TABLES)}")
            return marker[0]
        sources = TABLES[name].sources
        missing = [source for source in sources if source not in results]
        if missing and TABLES[name].optional:
            return f"{start}\n{NOT_MEASURED}\n\n{end}"
        if missing:
            complaints.append(f"no result for {name}: {', '.join(missing)} was not run")
            return marker[0]
        reports = [results[source] for source in sources]
        lines = ["", *TABLES[name].lines(*reports), "", *provenance(reports), ""]
        return start + "\n".join(lines) + "\n" + end

    new = MARKER.sub(fill, text)
    markers = text.count("<!-- results:")
    if markers != len(MARKER.findall(text)):
        complaints.append(f"{markers} markers start, expected an end for each")
    return new, complaints


def provenance(reports: Sequence[Any]) -> Lines:
    """Where, when and from what the numbers of a table come, one line if all agree."""
    return list(dict.fromkeys(_provenance(report) for report in reports))


def _provenance(
    report: bench.Report | gpu_timing.GpuReport | recipe_tables.RecipeReport,
) -> str:
    if isinstance(report, recipe_tables.RecipeReport):
        return recipe_tables.provenance(report)
    if isinstance(report, gpu_timing.GpuReport):
        return gpu_tables.provenance(report)
    s = report.settings
    e = s["environment"]
    machine, versions, native = e["machine"], e["versions"], e["native"]
    others = s.get("cores_used_by_others")
    facts = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} used, "
        f"{native['isa_in_use'] if native['loaded'] else 'no compiled kernels'}",
        f"imbsam-fast {versions['imbsam-fast']}, torch {versions['torch']}, "
        f"Python {versions['python']}",
        f"commit {(e['git_commit'] or 'unknown')[:12]}{_dirty(e['git_commit'])}, {e['date'][:10]}",
    ]
    if report.timings:
        facts.append(f"{s['rounds']} rounds, freed memory {s['freed_memory']}")
    load = "" if others is None else f" Other processes kept {others:.1f} cores busy."
    tiny = " Tiny sizes, to see that it runs: not a result." if s["quick"] else ""
    return f"Measured ({report.title}): {'; '.join(facts)}.{load}{tiny}"


def _dirty(commit: str | None) -> str:
    return " with uncommitted changes" if (commit or "").endswith("-dirty") else ""


def documents(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def load_results(directory: Path) -> Results:
    found: Results = {path.stem: bench.load(path) for path in sorted(directory.glob("*.json"))}
    for path in sorted(directory.glob("gpu/bench_gpu*.json")):
        found[f"gpu/{path.stem}"] = gpu_timing.load(path)
    for path in sorted(directory.glob("recipes/*.json")):
        found[f"recipes/{path.stem}"] = recipe_tables.load(path)
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
    failed = False
    for path in documents(args.root):
        document = path.relative_to(args.root)
        text = path.read_text()
        new, complaints = filled(text, results)
        if args.check and new != text:
            complaints.append("differs from the results; run python -m benchmarks.report")
        if not args.check:
            path.write_text(new)
        for complaint in complaints:
            print(f"{document}: {complaint}")
        failed = failed or bool(complaints)
    if not args.check:
        _draw(results, args.plots)
    return int(failed)


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

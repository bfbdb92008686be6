"""`imbsam-fast info`: the content of `environment()` for people to read."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on `parser`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def main(args: argparse.Namespace) -> int:
    """Print what is installed and which backend runs; returns the exit status."""
    from .env import environment  # with torch: not for --help

    found = environment()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    console = Console()
    console.print(_facts(found))
    for kind, report in found["backends"].items():
        console.print(_backend_table(kind, report))
        for backend, reason in report["available"].items():
            if reason is not None:
                console.print(f"{backend}: {reason}", style="dim", markup=False)
        if report["error"]:
            console.print(f"error: {report['error']}", style="red", markup=False)
    return 0


def _facts(found: dict[str, Any]) -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column()
    for name, value in found["versions"].items():
        if name == "cuda":
            name, value = "CUDA of torch", value or "none"
        facts.add_row(name, value)
    if found["git_commit"]:
        facts.add_row("commit", found["git_commit"])
    machine = found["machine"]
    facts.add_row("platform", machine["platform"])
    facts.add_row(
        "CPU",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} torch threads",
    )
    native = found["native"]
    if native["loaded"]:
        sets = ", ".join(f"{isa} (in use)" if isa == native["isa_in_use"] else isa
                         for isa in native["isas"])  # fmt: skip
        facts.add_row("instruction sets", sets)
        facts.add_row("OpenMP", "yes" if native["openmp"] else "no: operations run on one thread")
    for device in found["devices"][1:]:
        memory = f", {device['memory_gib']} GiB" if "memory_gib" in device else ""
        capability = f", compute {device['capability']}" if "capability" in device else ""
        name = f"{device['name']}{memory}{capability}"
        facts.add_row(f"{device['type']}:{device['index']}", name)
    return facts


def _backend_table(kind: str, report: dict[str, Any]) -> Table:
    forced = f", {report['forced']} forced" if report["forced"] else ""
    table = Table(title=f"Backends on {kind}{forced}", title_justify="left")
    table.add_column("operation")
    for backend in report["available"]:
        table.add_column(backend, justify="center")
    for operation, used in report["operations"].items():
        table.add_row(operation, *(_cell(backend, used, report) for backend in report["available"]))
    return table


def _cell(backend: str, used: str | None, report: dict[str, Any]) -> str:
    if backend == used:
        return "[bold green]used[/]"
    return "available" if report["available"][backend] is None else "-"

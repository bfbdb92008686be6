"""What a study of gradients records: settings, rows, and where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.tables import commit, software
from imbsam_fast.env import environment


class Study(NamedTuple):
    """A recorded study; `script` is its module in benchmarks/."""

    script: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    environment: dict[str, Any]

    @property
    def provenance(self) -> str:
        """Where, when and from what the numbers come."""
        e = self.environment
        return (
            f"Measured ({self.script}): {e['machine']['cpu']}, rho {self.settings['rho']:g}; "
            f"{software(e)}; {commit(e)}, {e['date'][:10]}."
        )


def read(path: Path) -> Study:
    """Of a file named after its study, as `write` leaves it."""
    return Study(f"{path.stem}_study", **json.loads(path.read_text()))


def write(path: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Record a study that was made here and now."""
    content = {"settings": settings, "rows": rows, "environment": environment()}
    path.write_text(json.dumps(content, indent=1) + "\n")

"""What an analysis can be asked for; without torch, so that a command line can list it."""

from __future__ import annotations

from dataclasses import dataclass

HESSIAN, LANDSCAPE = KINDS = ("hessian", "landscape")
BATCH_NORM_MODES = ("running", "batch")
ANALYSES = "analyses"  # the folder of a run directory in which they are written


@dataclass(frozen=True)
class AnalysisSettings:
    """How exact an analysis is; every estimate is better with larger numbers."""

    rows: int = 1000  # at most so many images, drawn at random; 0 for all
    seed: int = 0
    batch_size: int = 250
    batch_norm: str = "running"
    lanczos_steps: int = 50
    tolerance: float = 1e-3  # of the largest eigenvalue, relative
    trace_probes: int = 50
    density_probes: int = 2
    radius: float = 1.0  # in filter norms
    line_points: int = 41
    plane_points: int = 21

    @property
    def hessian_ticks(self) -> int:
        """Products of the Hessian with a vector, at most."""
        return self.lanczos_steps * (1 + self.density_probes) + self.trace_probes

    @property
    def landscape_ticks(self) -> int:
        """Losses that one landscape computes."""
        return self.line_points + self.plane_points**2

"""The two sets of choices in which sources describe ImbSAM (docs/design.md section 2)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One full set of the choices on which the paper and the released code differ."""

    name: str
    eta: float  # threshold of the class split
    inclusive: bool  # whether a class of exactly eta images is tail
    tail_weight: float  # factor on the tail part of the loss
    batch_norm: str  # how often a step updates running statistics: "once" or "twice"
    rho: float = 0.05  # radius of the perturbation


PAPER = Preset("paper", eta=100, inclusive=True, tail_weight=1.0, batch_norm="once")
RELEASED = Preset("released", eta=20, inclusive=False, tail_weight=2.0, batch_norm="twice")

PRESETS = {preset.name: preset for preset in (PAPER, RELEASED)}

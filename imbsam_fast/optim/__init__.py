"""The optimizers: what happens to gradients and weights between the passes of a step."""

from .imbsam import ImbSAM
from .lean import LeanImbSAM

__all__ = ["ImbSAM", "LeanImbSAM"]

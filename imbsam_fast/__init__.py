"""ImbSAM for PyTorch: class-aware sharpness-aware minimisation for long-tailed data."""

from importlib.metadata import version as _version

from .batch_norm import frozen_batch_norm_statistics
from .lean import LeanImbSAM
from .losses import SplitCrossEntropy, SplitLoss, split_loss
from .optim import ImbSAM
from .split import ClassSplit
from .train_step import StepResult, TrainStep

__version__ = _version("imbsam-fast")

__all__ = [
    "ClassSplit",
    "ImbSAM",
    "LeanImbSAM",
    "SplitCrossEntropy",
    "SplitLoss",
    "StepResult",
    "TrainStep",
    "__version__",
    "frozen_batch_norm_statistics",
    "split_loss",
]

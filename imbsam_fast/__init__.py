"""ImbSAM for PyTorch: class-aware sharpness-aware minimisation for long-tailed data."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .losses import SplitBCEWithLogits, SplitCrossEntropy, SplitLoss, split_loss
    from .optim import ImbSAM, LeanImbSAM
    from .split import ClassSplit
    from .training.batch_norm import frozen_batch_norm_statistics
    from .training.plans import StepResult
    from .training.train_step import TrainStep

    __version__: str

__all__ = [
    "ClassSplit",
    "ImbSAM",
    "LeanImbSAM",
    "SplitBCEWithLogits",
    "SplitCrossEntropy",
    "SplitLoss",
    "StepResult",
    "TrainStep",
    "__version__",
    "frozen_batch_norm_statistics",
    "split_loss",
]

# Loaded when they are asked for: `imbsam-fast --help` need not wait for torch.
_MODULES = {
    "ClassSplit": "split",
    "ImbSAM": "optim",
    "LeanImbSAM": "optim",
    "SplitBCEWithLogits": "losses",
    "SplitCrossEntropy": "losses",
    "SplitLoss": "losses",
    "StepResult": "training.plans",
    "TrainStep": "training.train_step",
    "frozen_batch_norm_statistics": "training.batch_norm",
    "split_loss": "losses",
}
_SUBMODULES = ("losses", "ops", "optim", "split", "training")


if not TYPE_CHECKING:  # type checkers know the names, and refuse others

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            value: Any = import_module("importlib.metadata").version("imbsam-fast")
        elif name in _MODULES:
            value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        elif name in _SUBMODULES:
            return import_module(f".{name}", __name__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value  # found at once from now on
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})

"""Semi-supervised anomaly detection: DeepSAD and DevNet trained with SGD, SAM or ImbSAM.

    from imbsam_fast.recipes.anomaly import DeepSAD, load

    detector = DeepSAD(optimizer="imbsam").fit(X, y)  # y: 1 for a labelled anomaly, else 0
    detector.decision_function(X_new)                 # higher is more anomalous
    detector.save("detector.pt")
    load("detector.pt").predict(X_new)                # 1 above the threshold, else 0

Needs numpy and scikit-learn (extra `recipes`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .deepsad import DeepSAD
    from .detector import Detector, TrainingDivergedError
    from .detectors import load
    from .devnet import DevNet

__all__ = ["DeepSAD", "Detector", "DevNet", "TrainingDivergedError", "load"]

_MODULES = {
    "DeepSAD": "deepsad",
    "DevNet": "devnet",
    "Detector": "detector",
    "TrainingDivergedError": "detector",
    "load": "detectors",
}


def __getattr__(name: str) -> Any:
    # Not at import: the command line has to say which extra is missing.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)

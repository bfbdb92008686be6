"""The detectors by name, and how a saved one is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from .deepsad import DeepSAD
from .detector import FORMAT, Detector
from .devnet import DevNet

DETECTORS: dict[str, type[Detector]] = {"deepsad": DeepSAD, "devnet": DevNet}


def load(path: str | Path) -> Detector:
    """A detector that `Detector.save` wrote. Nothing in the file is executed.

    Raises ValueError for a file that is not a saved detector.
    """
    kinds = {kind.__name__: kind for kind in DETECTORS.values()}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, expected {FORMAT}")
        detector = kinds[content["detector"]](**content["params"])
        detector.restore_state(content)
    except OSError:
        raise
    except Exception as error:  # torch.load and what follows fail in many ways
        raise ValueError(f"{path} is not a saved detector: {error}") from error
    return detector

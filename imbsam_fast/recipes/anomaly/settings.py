"""What `imbsam-fast anomaly` trains: a grid of fits, all with the same settings.

Needs no numpy, so that the command line can be parsed without the extra.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

BASE_NAMES = {"sgd": "SGD", "adam": "Adam", "rmsprop": "RMSprop"}
DETECTOR_NAMES = {"deepsad": "DeepSAD", "devnet": "DevNet"}
OPTIMIZERS = ("sgd", "sam", "imbsam")
PROTOCOLS = ("clean", "adbench")


def methods(optimizers: Iterable[str], tail_weights: Iterable[float] = (1.0,)) -> list[str]:
    """What is trained, by name: `optimizers`, and for every tail weight w other than 1
    "imbsam@w" beside "sgd@w", the control: the base alone with the anomalies' loss times w.
    """
    asked = [o for o in OPTIMIZERS if o in optimizers]
    heavier = [w for w in tail_weights if w != 1] if "imbsam" in asked else []
    return asked + [f"{o}@{w:g}" for w in heavier for o in ("sgd", "imbsam")]


def parsed_method(name: str) -> tuple[str, float]:
    """The optimizer and the tail weight of a name that `methods` made."""
    optimizer, _, weight = name.partition("@")
    return optimizer, float(weight or 1)


def method_order(name: str) -> tuple[float, int]:
    """A sort key: by tail weight, then as in OPTIMIZERS."""
    optimizer, weight = parsed_method(name)
    return weight, OPTIMIZERS.index(optimizer)


@dataclass(frozen=True)
class Settings:
    """Everything but the grid that decides a fit, one value an option; None: the detector's own."""

    base: str
    lr: float | None
    momentum: float
    rho: float
    plan: str
    epochs: int
    batch_size: int
    pretrain_epochs: int

    def label(self, method: str) -> str:
        """The name of a method in tables."""
        optimizer, weight = parsed_method(method)
        name = {"sgd": BASE_NAMES[self.base], "sam": "SAM", "imbsam": "ImbSAM"}[optimizer]
        return name if weight == 1 else f"{name}, weight {weight:g}"

    def detector_params(self, detector: str, method: str, seed: int) -> dict[str, Any]:
        """The arguments of a detector's class."""
        optimizer, weight = parsed_method(method)
        params = {
            **asdict(self),
            "optimizer": optimizer,
            "tail_weight": weight,
            "random_state": seed,
        }
        if detector != "deepsad":
            del params["pretrain_epochs"]
        return params


class Cell(NamedTuple):
    """The fits that share data, labels and pre-training: they differ in the method alone."""

    set: str
    protocol: str
    ratio: float  # of the training anomalies that are labelled
    seed: int
    detector: str


class Fit(NamedTuple):
    """One row of fits.jsonl: a cell with a method, and how it came out."""

    set: str
    protocol: str
    ratio: float
    seed: int
    detector: str
    method: str  # as `methods` names them
    aucroc: float  # in %, as all areas
    aucpr_anomaly: float
    aucpr_normal: float
    train_loss: float  # mean over the last epoch
    train_rows: int
    labelled: int  # anomalies among them that are labelled
    leaked: float  # share of test rows that are training rows too
    run: int  # which of the runs listed in grid.json

    @property
    def cell(self) -> Cell:
        """What was trained, without the method."""
        return Cell(*self[:5])

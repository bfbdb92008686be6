"""The settings of one training run, with the defaults of every data set and preset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .image_data import LongTailImages
from .methods import LABELS, MethodSettings
from .presets import PAPER, PRESETS

OPTIMIZERS = ("sgd", "sgd-weighted", "sam", "imbsam", "focal-sam")
PERTURBING = ("sam", "imbsam", "focal-sam")
METHODS = ("ce", "wb", "lws")
SMALL, FULL = "small", "full"


COMMON_DEFAULTS: dict[str, Any] = {
    "method": "ce",
    "gamma": 1.0,
    "lam": 0.8,
    "plan": "auto",
    "validation": 0,
    "amp": "off",
    "channels_last": True,
    "compile": False,
    "threads": 1,
    "device": "cpu",
}


@dataclass(frozen=True)
class Dataset:
    """What a recipe trains on: its published settings, and how it is read."""

    help: str
    load: Callable[[RunConfig], LongTailImages]
    defaults: dict[str, Any]
    # Settings that follow from the value of `images`.
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConfig(MethodSettings):
    """Every setting of one run; a run is one optimizer and one seed.

    `lr` is that of the first step after warm-up; epochs are counted over all stages.
    """

    dataset: str
    data_dir: str
    images: str  # "small" or "full"
    imbalance_factor: float
    method: str
    optimizer: str
    preset: str
    gamma: float
    lam: float
    model: str
    norm: str
    epochs: int
    warmup_epochs: int
    batch_size: int
    group_borders: tuple[int, int]
    validation: int
    seed: int
    amp: str
    channels_last: bool
    compile: bool
    threads: int

    @property
    def step_method(self) -> str:
        """The optimizer as a key of methods.LABELS."""
        return self.optimizer.replace("-", "_")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the run's label."""
        values = asdict(self)
        values["group_borders"] = list(self.group_borders)
        return {"label": self.label(), **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        names = [field.name for field in fields(cls)]
        settings = {name: values[name] for name in names}
        settings["group_borders"] = tuple(settings["group_borders"])
        return cls(**settings)

    # ------------------------------------------------------------ names

    def label(self) -> str:
        """The run's name in tables; runs that differ in the seed alone share it."""
        return ", ".join(long for _, long in self._name_parts())

    def directory_name(self) -> str:
        return "-".join([*(short for short, _ in self._name_parts()), f"seed{self.seed}"])

    def _name_parts(self) -> list[tuple[str, str]]:
        """What tells this run from others of its recipe: short for paths, long for people."""
        parts = [(self.optimizer, LABELS[self.step_method].format(tail_weight=self.tail_weight))]
        if self.method != "ce":
            parts.insert(0, (self.method, self.method.upper()))
        if self.optimizer == "imbsam":
            parts.append((self.preset, self.preset))
        if self.optimizer in ("imbsam", "sgd-weighted"):
            parts.append((f"eta{self.eta:g}", f"eta {self.eta:g}"))
        if self.tail_weight != default_tail_weight(self.optimizer, self.preset):
            parts.append((f"tail{self.tail_weight:g}", f"tail weight {self.tail_weight:g}"))
        if self.optimizer in PERTURBING:
            if self.rho != PAPER.rho:
                parts.append((f"rho{self.rho:g}", f"rho {self.rho:g}"))
            if self.plan != "auto":
                parts.append((self.plan, f"{self.plan} plan"))
        return parts


def default_tail_weight(optimizer: str, preset: str) -> float:
    """The preset's for ImbSAM; the control has the released code's, so that it is one."""
    if optimizer == "imbsam":
        return PRESETS[preset].tail_weight
    return PRESETS["released"].tail_weight if optimizer == "sgd-weighted" else 1.0


def resolve(dataset: Dataset, given: Mapping[str, Any]) -> RunConfig:
    """A full configuration: what is given, then the data set's settings, then the preset's."""
    values: dict[str, Any] = {**COMMON_DEFAULTS, **dataset.defaults}
    preset = PRESETS[given.get("preset", "paper")]
    values.update(preset=preset.name, eta=preset.eta, inclusive=preset.inclusive)
    values.update(batch_norm=preset.batch_norm, rho=preset.rho)
    values["tail_weight"] = default_tail_weight(given["optimizer"], preset.name)
    images = given.get("images", values["images"])
    values.update(dataset.variants.get(images, {}))
    return RunConfig.from_dict({**values, **given})

"""The settings of one training run, with the defaults of every data set, method and preset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ...training.choices import SAMPLE
from .presets import PAPER, PRESETS

if TYPE_CHECKING:
    from ...split import ClassSplit

# With their names in tables. The second is the control for a tail weight: plain SGD with the class
# weights that ImbSAM gives its tail.
LABELS = {
    "sgd": "SGD",
    "sgd-weighted": "SGD, tail weight {tail_weight:g}",
    "sam": "SAM",
    "imbsam": "ImbSAM",
    "focal-sam": "Focal-SAM",
}
OPTIMIZERS = tuple(LABELS)
_FOCAL = ("gamma", "lam")
_PERTURBATION = ("preset", "batch_norm", "rho", "plan", "sample", "perturb_every", *_FOCAL)
# What does not change a run with these optimizers, whatever it is: of the tail SGD knows nothing,
# and its control no more than the weights.
UNREAD = {
    "sgd": frozenset((*_PERTURBATION, "eta", "inclusive", "tail_weight")),
    "sgd-weighted": frozenset(_PERTURBATION),
    "sam": frozenset(_FOCAL),
    "imbsam": frozenset(_FOCAL),
    "focal-sam": frozenset(("tail_weight",)),
}
PERTURBING = tuple(name for name in OPTIMIZERS if "rho" not in UNREAD[name])
WEIGHTING = tuple(name for name in OPTIMIZERS if "tail_weight" not in UNREAD[name])
METHODS = ("ce", "wb", "lws")
# With their names in tables. Balanced softmax is logit adjustment with tau = 1.
LOSSES = {
    "ce": "cross-entropy",
    "logit-adjust": "logit adjustment",
    "balanced-softmax": "balanced softmax",
}
DISTRIBUTED = ("off", "ddp", "fsdp")
SMALL, FULL = "small", "full"

# Settings of methods that were removed, which runs and records of earlier versions have, and the
# value that means: without the method.
REMOVED = {"lagged": False}
COMMON_DEFAULTS: dict[str, Any] = {
    "method": "ce",
    "loss": "ce",
    "tau": 1.0,
    "images": FULL,
    "largest_class": 500,
    "imbalance_factor": 100.0,
    "train_list": None,
    "test_list": None,
    "validation_list": None,
    "image_root": None,
    "image_size": 224,
    "color_jitter": 0.0,
    "skip_corrupt": False,
    "check_files": False,
    "workers": 4,
    "validation": 0,
    # Ours, in the range that the authors of Focal-SAM search.
    "gamma": 1.0,
    "lam": 0.8,
    "plan": "auto",
    "sample": SAMPLE,
    "perturb_every": 1,
    "norm": "batch",
    "epochs": 200,
    "warmup_epochs": 0,
    "momentum": 0.9,
    "group_borders": (20, 100),
    "stage1": None,
    "beta": 0.9999,
    "amp": "off",
    "channels_last": True,
    "compile": False,
    "cuda_graph": False,
    "distributed": "off",
    "tensorboard": False,
    "threads": 1,
    "device": "cpu",
}

# What the methods add to the data set's settings; "weight_decay" is that of stage one.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "ce": {
        "stage2_epochs": 0,
        "stage2_lr": 0.0,
        "stage2_weight_decay": 0.0,
        "stage2_batch_size": 0,
    },
    "wb": {
        "weight_decay": 5e-3,
        "stage2_epochs": 10,
        "stage2_lr": 0.01,
        "stage2_weight_decay": 0.1,
        "stage2_batch_size": 64,
    },
    "lws": {
        "stage2_epochs": 5,
        "stage2_lr": 0.2,
        "stage2_weight_decay": 5e-4,
        "stage2_batch_size": 512,
    },
}


@dataclass(frozen=True)
class Dataset:
    """What a recipe trains on, but for how it is read (data/datasets.py)."""

    help: str
    defaults: dict[str, Any]
    files: bool = True  # whether --data-dir has to say where it is
    lists: bool = False  # whether it is read from lists of image files
    long_tailed: bool = True  # whether it is made so, by --largest-class and --imbalance-factor
    mirrored: bool = True  # whether a mirror image shows the same, for the flip average
    package: str = "torchvision"  # the module that reads it
    # Settings that follow from the value of `images`; empty where there is no such option.
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConfig:
    """Every setting of one run; a run is one optimizer and one seed.

    `lr`, `weight_decay`, `epochs` and `batch_size` are those of stage one; `batch_size` counts
    the images of all ranks. None stands for a path that was not given.
    """

    dataset: str
    data_dir: str
    images: str  # small or full
    largest_class: int  # training images
    imbalance_factor: float
    train_list: str | None
    test_list: str | None
    validation_list: str | None
    image_root: str | None
    image_size: int  # pixels
    color_jitter: float
    skip_corrupt: bool
    check_files: bool  # look for every image before the first epoch
    workers: int  # processes that read image files
    validation: int  # images of each class
    method: str
    loss: str
    tau: float  # of logit adjustment
    optimizer: str
    preset: str
    eta: float
    inclusive: bool
    tail_weight: float
    batch_norm: str
    rho: float
    plan: str
    sample: float
    perturb_every: int
    gamma: float
    lam: float
    model: str
    norm: str
    epochs: int
    warmup_epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    stage1: str | None  # a run directory whose network stage two starts from
    stage2_epochs: int
    stage2_lr: float
    stage2_weight_decay: float
    stage2_batch_size: int
    beta: float
    group_borders: tuple[int, int]
    seed: int
    amp: str
    channels_last: bool
    compile: bool
    cuda_graph: bool
    distributed: str
    tensorboard: bool
    threads: int
    device: str

    def split(self, counts: Sequence[int]) -> ClassSplit:
        """Head and tail classes by `eta`."""
        from ...split import ClassSplit  # with torch: not for a command line

        return ClassSplit.from_counts(counts, self.eta, self.inclusive)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the run's label."""
        values = asdict(self)
        values["group_borders"] = list(self.group_borders)
        return {"label": self.label(), **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """What `to_dict` returned; a setting that was added since has its default.

        Raises KeyError for a setting that is missing and has none, ValueError for a method that
        was removed since.
        """
        for name, expected in REMOVED.items():
            if (value := values.get(name, expected)) != expected:
                raise ValueError(f"{name} is {value!r}, expected {expected!r}: it was removed")
        defaults = {**COMMON_DEFAULTS, **METHOD_DEFAULTS[values["method"]]}
        known = {**defaults, **values}
        settings = {setting.name: known[setting.name] for setting in fields(cls)}
        settings["group_borders"] = tuple(settings["group_borders"])
        return cls(**settings)

    # ------------------------------------------------------------ names

    def label(self) -> str:
        """The run's name in tables; runs that differ in the seed alone share it."""
        return ", ".join(long for _, long in self._name_parts() if long)

    def directory_name(self) -> str:
        """The name of the run's directory: what differs from the defaults, and the seed."""
        return "-".join([*(short for short, _ in self._name_parts()), f"seed{self.seed}"])

    def _name_parts(self) -> list[tuple[str, str]]:
        """What tells this run from others of its recipe: short for paths, long for people."""
        parts = [(self.optimizer, LABELS[self.optimizer].format(tail_weight=self.tail_weight))]
        if self.method != "ce":
            parts.insert(0, (self.method, self.method.upper()))
        if self.optimizer == "imbsam":
            parts.append((self.preset, self.preset))
        if self.optimizer in ("imbsam", "sgd-weighted"):
            parts.append((f"eta{self.eta:g}", f"eta {self.eta:g}"))
        if self.optimizer in WEIGHTING and self.tail_weight != default_tail_weight(
            self.optimizer, self.preset
        ):
            # The control's long name has its weight already.
            long = "" if self.optimizer == "sgd-weighted" else f"tail weight {self.tail_weight:g}"
            parts.append((f"tail{self.tail_weight:g}", long))
        if self.optimizer in PERTURBING:
            if self.rho != PAPER.rho:
                parts.append((f"rho{self.rho:g}", f"rho {self.rho:g}"))
            if self.plan == "sampled":
                parts.append((f"sampled{self.sample:g}", f"sampled {self.sample:g}"))
            elif self.plan != "auto":
                parts.append((self.plan, f"{self.plan} plan"))
            if self.perturb_every != 1:
                parts.append((f"every{self.perturb_every}", f"every {self.perturb_every}"))
            if self.batch_norm != default_batch_norm(self.preset, self.plan):
                parts.append((f"bn-{self.batch_norm}", f"statistics {self.batch_norm}"))
        if self.loss != "ce":
            parts.append((self.loss, LOSSES[self.loss]))
            if self.tau != 1:
                parts.append((f"tau{self.tau:g}", f"tau {self.tau:g}"))
        return parts


def default_tail_weight(optimizer: str, preset: str) -> float:
    """The preset's for ImbSAM; the control has the released code's, so that it is one."""
    if optimizer == "imbsam":
        return PRESETS[preset].tail_weight
    return PRESETS["released"].tail_weight if optimizer == "sgd-weighted" else 1.0


def default_batch_norm(preset: str, plan: str) -> str:
    """The preset's, but for the sampled plan, which knows "once" alone."""
    return "once" if plan == "sampled" else PRESETS[preset].batch_norm


def resolve(dataset: Dataset, given: Mapping[str, Any]) -> RunConfig:
    """A full configuration: what is given, then the data set's settings, then the preset's.

    Raises ValueError for settings that contradict one another.
    """
    values: dict[str, Any] = {**COMMON_DEFAULTS}
    preset = PRESETS[given.get("preset", PAPER.name)]
    values.update(preset=preset.name, eta=preset.eta, inclusive=preset.inclusive)
    plan = given.get("plan", values["plan"])
    values.update(batch_norm=default_batch_norm(preset.name, plan), rho=preset.rho)
    values["tail_weight"] = default_tail_weight(given["optimizer"], preset.name)
    values.update(dataset.defaults)
    values.update(dataset.variants.get(given.get("images", values["images"]), {}))
    values.update(METHOD_DEFAULTS[given.get("method", values["method"])])
    config = RunConfig.from_dict({**values, **given})
    _check(config)
    return config


def unread(
    dataset: Dataset, given: Mapping[str, Any], optimizers: Sequence[str], names: Iterable[str]
) -> list[str]:
    """Those of the settings `names` that change nothing with any of `optimizers`.

    But for what has its default, and the preset, which decides others.
    """
    by_none = frozenset.intersection(*(UNREAD[optimizer] for optimizer in optimizers)) - {"preset"}
    read = {name: value for name, value in given.items() if name not in by_none}
    usual = [resolve(dataset, {**read, "optimizer": optimizer}) for optimizer in optimizers]
    return [
        name
        for name in sorted(by_none.intersection(names))
        if all(getattr(config, name) != given[name] for config in usual)
    ]


def _check(config: RunConfig) -> None:
    low, high = config.group_borders
    if low > high:
        raise ValueError(f"group_borders is {low} {high}, expected LOW <= HIGH")
    if config.warmup_epochs > config.epochs:
        raise ValueError(
            f"warmup_epochs is {config.warmup_epochs}, expected at most the {config.epochs} epochs"
        )
    _check_sampled(config)
    _check_loss(config)
    _check_cuda_graph(config)
    if config.method == "ce":
        if config.stage1:
            raise ValueError(f"stage1 is '{config.stage1}', expected none: ce has no second stage")
        return
    for name in ("stage2_epochs", "stage2_lr", "stage2_batch_size"):
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} is {getattr(config, name)}, expected > 0 for {config.method}")
    if config.method == "wb" and config.beta >= 1:
        raise ValueError(f"beta is {config.beta:g}, expected below 1")


def _check_sampled(config: RunConfig) -> None:
    if config.plan != "sampled" and config.sample != SAMPLE:
        raise ValueError(
            f"sample is {config.sample:g}, expected {SAMPLE:g} with plan "
            f"{config.plan!r}: it is a setting of 'sampled'"
        )
    if config.plan == "sampled" and config.batch_norm != "once":
        raise ValueError(
            f"batch_norm is {config.batch_norm!r}, expected 'once' with plan 'sampled'"
        )


def _check_cuda_graph(config: RunConfig) -> None:
    if not config.cuda_graph:
        return
    for name, expected in (("device", "cuda"), ("distributed", "off"), ("compile", False)):
        value = getattr(config, name)
        if value != expected:
            raise ValueError(f"{name} is {value!r}, expected {expected!r} with cuda_graph")


def _check_loss(config: RunConfig) -> None:
    if config.loss != "ce" and config.method != "ce":
        raise ValueError(
            f"loss is {config.loss!r}, expected 'ce' with method {config.method!r}, whose second "
            "stage evens out the classes itself; stage1 may name a run with another loss"
        )
    if config.loss != "logit-adjust" and config.tau != 1:
        raise ValueError(
            f"tau is {config.tau:g}, expected 1 with loss {config.loss!r}: it is a setting of "
            "'logit-adjust'"
        )

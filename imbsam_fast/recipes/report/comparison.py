"""Runs side by side: which are seeds of one configuration, and what their accuracies are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..analysis.settings import ANALYSES
from ..metrics import BORDERS, COLUMNS, mean_and_std, read_confusion
from ..run_directory import CONFIG_FILE, RunDirectory, RunDirectoryError
from ..settings.config import REMOVED, UNREAD
from ..settings.datasets import DATASETS

# What may differ between seeds of one configuration: where and how fast a run is computed, and
# how it is shown, not what is computed (but for the size of a sample that is all tail rows).
PLACE_KEYS = frozenset(
    ("format", "seed", "data_dir", "image_root", "device", "workers", "threads", "tensorboard",
     "cuda_graph")
)  # fmt: skip
# What says which classes are tail.
TAIL_KEYS = ("eta", "inclusive")
# What makes a data set: runs that differ in one of these are not compared.
DATA_KEYS = (
    *("dataset", "images", "largest_class", "imbalance_factor", "train_list", "group_borders"),
)
# What is read of an analysis, by its kind.
ANALYSIS_KEYS = {
    "hessian": ("classes", "lambda_max", "trace", "density", "about"),
    "landscape": ("groups", "line", "plane", "about"),
}
CHECKPOINTS = ("last", "best")
VIEWS = ("plain", "flip")

Value = tuple[float, float | None]  # mean and standard deviation over seeds


@dataclass
class ComparedRun:
    """What is read of one run directory; `result` is None where the run is not complete."""

    path: Path
    config: dict[str, Any]
    log: list[dict[str, Any]]
    result: dict[str, Any] | None
    analyses: dict[str, dict[str, Any]] = field(default_factory=dict)  # by file name


class Fault(NamedTuple):
    """A run that is not compared, or not in full, and why."""

    path: Path
    what: str


@dataclass
class Group:
    """The runs of one configuration: their seeds differ, and settings that it does not read."""

    label: str
    config: dict[str, Any]  # of the first run
    runs: list[ComparedRun]

    def reads(self, key: str) -> bool:
        """Whether the setting changes what these runs compute."""
        return key not in UNREAD.get(str(self.config.get("optimizer")), ())

    @property
    def read(self) -> dict[str, Any]:
        """The settings that change what these runs compute."""
        return {key: value for key, value in self.config.items() if self.reads(key)}

    @property
    def finished(self) -> list[ComparedRun]:
        """The runs that have a result."""
        return [run for run in self.runs if run.result is not None]

    def accuracy(self, checkpoint: str, view: str) -> dict[str, Value | None] | None:
        """Test accuracy in % by COLUMNS, None for a group without classes; None without runs.

        `checkpoint` is one of CHECKPOINTS, `view` of VIEWS.
        """
        found = list(self.tested(checkpoint, view).values())
        if not found:
            return None
        table: dict[str, Value | None] = {}
        for column in COLUMNS:
            values = [groups[column] for groups in found if groups[column] is not None]
            table[column] = mean_and_std(values) if values else None
        return table

    def per_class(self, checkpoint: str = "last", view: str = "plain") -> list[Value]:
        """Test accuracy of every class in %, empty without finished runs."""
        per_class = [groups["per_class"] for groups in self.tested(checkpoint, view).values()]
        return [mean_and_std(accuracies) for accuracies in zip(*per_class)]

    def tested(self, checkpoint: str, view: str) -> dict[Any, dict[str, Any]]:
        """Seed -> a group dictionary of run_directory.py, for the runs that have one."""
        found = {}
        for run in self.finished:
            evaluation = (run.result or {})[checkpoint]
            if evaluation is not None:
                found[run.config.get("seed")] = evaluation[view]
        return found

    def confusion(self, checkpoint: str = "last", view: str = "plain") -> list[list[int]] | None:
        """(K, K): test images of a class taken for each, over the seeds that recorded it."""
        recorded = [
            read_confusion(groups["confusion"])
            for groups in self.tested(checkpoint, view).values()
            if "confusion" in groups
        ]
        if not recorded:
            return None
        return [[sum(cells) for cells in zip(*rows)] for rows in zip(*recorded)]

    def curve(self, key: str) -> list[tuple[int, float, float | None]]:
        """(epoch, mean, std over seeds) of a number in the log, for epochs that all runs have."""
        by_epoch: dict[int, list[float]] = {}
        runs = [run for run in self.runs if key not in ("head", "tail") or self._has_tail_of(run)]
        for run in runs:
            for row in run.log:
                value = row.get(key)
                if isinstance(value, dict):  # a dictionary of accuracies
                    value = value.get("all")
                if value is not None:
                    by_epoch.setdefault(row["epoch"], []).append(value)
        complete = max(map(len, by_epoch.values()), default=0)
        return [
            (epoch, *mean_and_std(values))
            for epoch, values in sorted(by_epoch.items())
            if len(values) == complete
        ]

    def _has_tail_of(self, run: ComparedRun) -> bool:
        """Whether the run's tail classes are those of the group's first run."""
        return all(run.config.get(key) == self.config.get(key) for key in TAIL_KEYS)


@dataclass
class Section:
    """Groups that share a data set, by DATA_KEYS, and its class counts.

    `counts` is None while no run is finished.
    """

    data: dict[str, Any]
    counts: list[int] | None
    groups: list[Group]

    @property
    def class_names(self) -> list[str]:
        """As a run recorded them, or else the classes' numbers; empty while no run is finished."""
        for group in self.finished:
            for run in group.finished:
                names = (run.result or {}).get("class_names")
                if isinstance(names, list) and len(names) == len(self.counts or ()):
                    return [str(name) for name in names]
        return [str(k) for k in range(len(self.counts or ()))]

    @property
    def dataset(self) -> str:
        """The data set's name."""
        return self.data["dataset"]

    @property
    def views(self) -> tuple[str, ...]:
        """Those of VIEWS that differ: without the flip average where mirror images mean others."""
        dataset = DATASETS.get(self.dataset)
        return VIEWS if dataset is None or dataset.mirrored else VIEWS[:1]

    @property
    def imbalance_factor(self) -> float | None:
        """Images of the largest class over those of the smallest, where it was chosen."""
        return self.data["imbalance_factor"]

    @property
    def borders(self) -> tuple[int, int]:
        """Few < low <= medium <= high < many, in training images."""
        low, high = self.data["group_borders"] or BORDERS
        return low, high

    @property
    def title(self) -> str:
        """The data set and the sizes of its classes."""
        if self.counts is None:
            return f"{self.dataset} (no finished run)"
        return (
            f"{self.dataset}: {sum(self.counts):,} training images, {max(self.counts):,} to "
            f"{min(self.counts):,} in each of {len(self.counts):,} classes"
        )

    @property
    def finished(self) -> list[Group]:
        """The groups with at least one finished run."""
        return [group for group in self.groups if group.finished]


class Comparison(NamedTuple):
    """Runs that can be compared, one section for each data set, and what could not be read."""

    sections: list[Section]
    faults: list[Fault]


def compare(paths: Iterable[Path]) -> Comparison:
    """Read the runs in `paths`, run directories or directories that hold some at any depth.

    A run that cannot be read, or only in part, is named in `faults` and does not keep the
    others from being compared.
    """
    faults: list[Fault] = []
    runs: dict[Path, ComparedRun] = {}
    for path in paths:
        directories = _run_paths(path)
        if not directories:
            faults.append(Fault(path, f"holds no run: no {CONFIG_FILE} in it or below"))
        for directory in directories:
            try:
                runs.setdefault(directory.resolve(), read_run(directory, faults))
            except RunDirectoryError as error:
                faults.append(Fault(directory, f"left out: {error}"))
    found = sections(list(runs.values()), faults)
    return Comparison(found, list(dict.fromkeys(faults)))


def _run_paths(path: Path) -> list[Path]:
    if (path / CONFIG_FILE).exists():
        return [path]
    return sorted(file.parent for file in path.rglob(CONFIG_FILE))


def read_run(path: Path, faults: list[Fault]) -> ComparedRun:
    """The run in `path`; damaged files other than its configuration are left out and named."""
    directory = RunDirectory.open(path)
    if not isinstance(directory.config.get("dataset"), str):
        raise RunDirectoryError(f"'{path / CONFIG_FILE}' names no dataset")
    run = ComparedRun(path, directory.config, [], None)
    try:
        run.log = [_checked_row(row) for row in directory.log()]
    except (RunDirectoryError, OSError, UnicodeDecodeError, TypeError, KeyError) as error:
        faults.append(Fault(path, f"without curves: its log is damaged ({error})"))
    try:
        result = directory.result()
        run.result = None if result is None else _checked_result(result)
    except (RunDirectoryError, OSError, TypeError, KeyError, ValueError) as error:
        faults.append(Fault(path, f"without accuracies: its result is damaged ({error})"))
    else:
        if run.result is None:
            epochs = f"{len(run.log)} of {_planned_epochs(run.config)} epochs"
            faults.append(Fault(path, f"not finished ({epochs}): its curves are shown, no more"))
    run.analyses = _read_analyses(path / ANALYSES, faults)
    return run


def _planned_epochs(config: dict[str, Any]) -> int | str:
    """Of all stages; the first is left out where another run made it."""
    try:
        first = 0 if config.get("stage1") else config["epochs"]
        return first + config.get("stage2_epochs", 0)
    except (KeyError, TypeError):
        return "unknown"


def _checked_row(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict) or not isinstance(row["epoch"], int):
        raise TypeError(f"a line is {row!r}, expected a dictionary with an epoch")
    return row


def _checked_result(result: Any) -> dict[str, Any]:
    """`result` as it is. Raises KeyError, TypeError or ValueError where something is missing."""
    counts = [int(count) for count in result["class_counts"]]
    if result["last"] is None:
        raise ValueError("it has no accuracies of the last epoch")
    for checkpoint in CHECKPOINTS:
        for view in VIEWS if result[checkpoint] is not None else ():
            groups = result[checkpoint][view]
            if len(groups["per_class"]) != len(counts):
                raise ValueError(
                    f"it has {len(counts)} class counts and {len(groups['per_class'])} accuracies"
                )
            if "confusion" in groups and len(read_confusion(groups["confusion"])) != len(counts):
                raise ValueError(f"it has {len(counts)} class counts and other confusions")
            for number in (*groups["per_class"], *(groups[column] for column in COLUMNS)):
                if not isinstance(number, (int, float, type(None))):
                    raise TypeError(f"an accuracy is {number!r}")
    return result


def _read_analyses(directory: Path, faults: list[Fault]) -> dict[str, dict[str, Any]]:
    analyses = {}
    for file in sorted(directory.glob("*.json")):
        try:
            content = json.loads(file.read_text())
            missing = [key for key in ANALYSIS_KEYS[content["analysis"]] if key not in content]
            if missing:
                raise ValueError(f"no {missing[0]} in it")
            analyses[file.stem] = content
        except (OSError, ValueError, TypeError, KeyError) as error:
            faults.append(Fault(file, f"left out: damaged ({error})"))
    return analyses


# ---------------------------------------------------------------- groups


def sections(runs: Sequence[ComparedRun], faults: list[Fault]) -> list[Section]:
    """Finished runs decide the sections; the others join one of their data set.

    A seed that is there twice is left out once, and named in `faults`.
    """
    found: dict[str, Section] = {}
    members: dict[str, list[ComparedRun]] = {}
    for run in sorted(runs, key=lambda run: run.result is None):
        data = {key: run.config.get(key) for key in DATA_KEYS}
        counts = run.result["class_counts"] if run.result else None
        same = (key for key, section in found.items() if section.data == data)
        key = json.dumps([data, counts])
        if counts is None:
            key = next(same, key)
        found.setdefault(key, Section(data, counts, []))
        members.setdefault(key, []).append(run)
    for key, section in found.items():
        section.groups = _groups(members[key], faults)
    return list(found.values())


def _groups(runs: Sequence[ComparedRun], faults: list[Fault]) -> list[Group]:
    """Runs by configuration: cross-entropy first, then by OPTIMIZER_ORDER and by label."""
    groups: dict[str, Group] = {}
    for run in runs:
        known = {k: v for k, v in run.config.items() if (k, v) not in REMOVED.items()}
        config = {k: v for k, v in known.items() if k not in PLACE_KEYS}
        if config.get("stage1"):  # another run's directory, whose name ends in its seed
            config["stage1"] = re.sub(r"seed\d+$", "seed", str(Path(config["stage1"])))
        alone = Group(_label(config), config, [])
        key = json.dumps(alone.read, sort_keys=True, default=str)
        group = groups.setdefault(key, alone)
        seed = run.config.get("seed")
        twin = next((r for r in group.runs if r.config.get("seed") == seed), None)
        if twin is None:
            group.runs.append(run)
        else:
            faults.append(Fault(run.path, f"left out: seed {seed} again, as in '{twin.path}'"))
    ordered = sorted(groups.values(), key=_order)
    _tell_apart(ordered)
    return ordered


def _label(config: dict[str, Any]) -> str:
    fallback = " ".join(str(config[k]) for k in ("method", "optimizer") if k in config)
    return str(config.get("label") or fallback or "run")


OPTIMIZER_ORDER = ("sgd", "sgd-weighted", "sam", "focal-sam", "imbsam")


def _order(group: Group) -> tuple:
    optimizer = group.config.get("optimizer")
    known = optimizer in OPTIMIZER_ORDER
    return (
        str(group.config.get("method", "")),
        group.config.get("loss", "ce") != "ce",
        OPTIMIZER_ORDER.index(optimizer) if known else len(OPTIMIZER_ORDER),
        *(float(group.read.get(key) or 0) for key in ("eta", "rho")),
        group.label,
    )


def _tell_apart(groups: Sequence[Group]) -> None:
    """Add to equal labels the settings in which their groups differ."""
    by_label: dict[str, list[Group]] = {}
    for group in groups:
        by_label.setdefault(group.label, []).append(group)
    for label, members in by_label.items():
        differing = differences(members) if len(members) > 1 else {}
        for i, group in enumerate(members):
            settings = [f"{key} {text[i]}" for key, text in differing.items()]
            group.label = f"{label} ({', '.join(settings)})" if settings else label


def differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Setting -> its value in every group, for the settings that are not equal in all.

    "-" stands for a setting that a group does not have, or does not read.
    """
    keys = dict.fromkeys(key for group in groups for key in group.config)
    found = {}
    for key in keys:
        read = [_text(g.config.get(key, "-")) for g in groups if g.reads(key)]
        if key not in ("label", "name") and len(set(read)) > 1:
            found[key] = [_text(g.config.get(key, "-")) if g.reads(key) else "-" for g in groups]
    return found


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class Family(NamedTuple):
    """Groups that differ in rho and eta alone, (eta, rho) -> group."""

    label: str
    members: dict[tuple[float, float], Group]


def families(groups: Sequence[Group]) -> list[Family]:
    """The families with more than one member, in the order of `groups`."""
    found: dict[str, dict[tuple[float, float], Group]] = {}
    for group in groups:
        eta, rho = group.read.get("eta"), group.read.get("rho")
        if not group.finished or eta is None or rho is None:
            continue
        rest = {k: v for k, v in group.config.items() if k not in ("eta", "rho", "label")}
        key = json.dumps(rest, sort_keys=True, default=str)
        found.setdefault(key, {})[float(eta), float(rho)] = group
    return [
        Family(_shared_label([group.label for group in members.values()]), members)
        for members in (dict(sorted(m.items())) for m in found.values())
        if len(members) > 1
    ]


def _shared_label(labels: Sequence[str]) -> str:
    """The parts, between commas, that all of `labels` have."""
    parts = [label.split(", ") for label in labels]
    return ", ".join(part for part in parts[0] if all(part in other for other in parts))

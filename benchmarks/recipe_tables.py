"""The tables on long-tailed classification in docs/results.md, and the record that they come from.

    python -m benchmarks.recipe_tables RUN... --json FILE

writes what the finished runs of `imbsam-fast train` in RUN... say into one small file: settings,
final losses and accuracies, what `imbsam-fast analyze` found, environments. A RUN may be such a
file itself, whose runs come before those of directories. Files in benchmarks/results/recipes/ are
read by `python -m benchmarks.report`.
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.tables import NO_VALUE, Lines, Table, commit, markdown, software
from imbsam_fast.recipes.metrics import COLUMNS, mean_and_std
from imbsam_fast.recipes.report.comparison import (
    PLACE_KEYS,
    VIEWS,
    ComparedRun,
    Group,
    Section,
    Value,
    compare,
    differences,
    sections,
)
from imbsam_fast.recipes.settings.config import REMOVED, UNREAD, RunConfig
from imbsam_fast.recipes.train.methods import sharpness_split

FORMAT = 1
# Where runs may differ from their control: everything that makes the method.
METHOD_KEYS = frozenset(("label", "optimizer", *UNREAD["sgd"], *REMOVED))
# Where a cheaper step may differ from the paper's.
LOSS_KEYS = frozenset(("label", "loss", "tau"))
STEP_KEYS = frozenset(("label", "plan", "sample", "perturb_every", "batch_norm", *REMOVED))
NOT_RECORDED = PLACE_KEYS - {"seed"}
LOGGED = ("epoch", "loss", "head", "tail", "train_accuracy")  # no times: other work ran beside
ANALYSED = ("analysis", "classes", "class_list", "rows", "checkpoint", "lambda_max", "trace")


class RecipeReport(NamedTuple):
    """Finished runs on one data set, and where they were made."""

    section: Section
    environments: list[dict[str, Any]]  # of each run


# ---------------------------------------------------------------- the record


def condensed(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """What is recorded of finished runs, as plain values."""
    configs = [{k: v for k, v in run.config.items() if k not in NOT_RECORDED} for run in runs]
    shared = {k: v for k, v in configs[0].items() if all(c.get(k, c) == v for c in configs)}
    environments: list[dict[str, Any]] = []
    recorded = []
    for run, config in zip(runs, configs):
        result = dict(run.result or {})
        environment = dict(result.pop("environment"))
        date = environment.pop("date")
        if environment not in environments:
            environments.append(environment)
        result.pop("seconds", None)
        recorded.append(
            {
                "config": {k: v for k, v in config.items() if k not in shared},
                "log": [{key: row[key] for key in LOGGED} for row in run.log[-1:]],
                "result": result,
                "environment": environments.index(environment),
                "date": date,
                "analyses": {
                    name: {key: analysis[key] for key in ANALYSED}
                    for name, analysis in run.analyses.items()
                    if analysis["analysis"] == "hessian"
                },
            }
        )
    return {"format": FORMAT, "settings": shared, "runs": recorded, "environments": environments}


def load(path: Path) -> RecipeReport:
    content = json.loads(path.read_text())
    runs, environments = [], []
    for run in content["runs"]:
        config = _with_defaults({**content["settings"], **run["config"]})
        environment = {**content["environments"][run["environment"]], "date": run["date"]}
        environment["gpu"] = _gpu(run["result"], environment)
        result = {**run["result"], "environment": environment}
        runs.append(ComparedRun(path, config, run["log"], result, run["analyses"]))
        environments.append(environment)
    (section,) = sections(runs, [])
    return RecipeReport(section, environments)


def _gpu(result: Mapping[str, Any], environment: Mapping[str, Any]) -> str | None:
    """On which one a run was made, or ended; None for the CPU."""
    if result.get("peak_bytes") is None:
        return None
    return next((d["name"] for d in environment["devices"] if d["type"] == "cuda"), None)


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """With the settings that were added since the run was recorded, and those removed since."""
    known = _known(config).to_dict()
    return {k: v for k, v in {**known, **config}.items() if k not in NOT_RECORDED}


def _known(config: Mapping[str, Any]) -> RunConfig:
    """What this version knows of a configuration, wherever it was run."""
    return RunConfig.from_dict({**dict.fromkeys(NOT_RECORDED, 0), **config, **REMOVED})


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 unless there are finished runs, on one data set. What is left out is named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe_tables", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    records = [path for path in args.runs if path.is_file()]
    comparison = compare([path for path in args.runs if path not in records])
    read = [*(load(path).section for path in records), *comparison.sections]
    runs = [run for section in read for group in section.groups for run in group.runs]
    found = [section for section in sections(runs, comparison.faults) if section.finished]
    for fault in comparison.faults:
        print(f"{fault.path}: {fault.what}")
    if len(found) != 1:
        print(f"RUN has finished runs on {len(found)} data sets, expected one")
        return 1
    finished = [run for group in found[0].groups for run in group.finished]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(condensed(finished), separators=(",", ":")) + "\n")
    print(f"{len(finished)} runs: {args.json}")
    return 0


# ---------------------------------------------------------------- the tables


def cell(value: Value | None, sign: str = "") -> str:
    if value is None:
        return NO_VALUE
    mean, std = value
    mean = round(mean, 1) + 0.0  # no "-0.0"
    return f"{mean:{sign}.1f}" + ("" if std is None else f" ± {std:.1f}")


def accuracy(report: RecipeReport) -> Lines:
    """Test accuracy after the last epoch, and how far training came."""
    groups = report.section.groups
    views = [
        view
        for view in VIEWS
        if view == "plain"
        or any(g.accuracy("last", view) != g.accuracy("last", "plain") for g in groups)
    ]
    rows = []
    for group in groups:
        tested = [group.accuracy("last", view) or {} for view in views]
        trained = [run.log[-1]["train_accuracy"] for run in group.finished]
        rows.append(
            (_name(group), str(len(group.finished)), *(cell(t[c]) for t in tested for c in COLUMNS),
             cell(mean_and_std(trained)))
        )  # fmt: skip
    names = [column.capitalize() for column in COLUMNS]
    headings = [name + ("" if view == "plain" else f", {view}") for view in views for name in names]
    header = ("%", "seeds", *headings, "training")
    return markdown(header, rows)


def _name(group: Group) -> str:
    """Its label, and the precision of its passes where that is not float32."""
    amp = group.config["amp"]
    return group.label if amp == "off" else f"{group.label}, {amp}"


def paired(report: RecipeReport) -> Lines:
    """Differences of a seed's runs: to the control and to SGD, and to the paper's step."""
    rows = []
    for group in report.section.groups:
        for other in _compared_with(group, report.section):
            by_seed = list(_differences(group, other))
            if by_seed:
                cells = [
                    cell(mean_and_std([difference[i] for difference in by_seed]), "+")
                    for i in range(len(COLUMNS))
                ]
                rows.append((f"{_name(group)} minus {_name(other)}", str(len(by_seed)), *cells))
    return markdown(("points", "seeds", *(column.capitalize() for column in COLUMNS)), rows)


def sharpness(report: RecipeReport) -> Lines:
    """The Hessian of the mean loss on chosen classes, of the runs that were analysed."""
    rows = []
    for group in report.section.groups:
        for run in group.finished:
            for analysis in run.analyses.values():
                top, trace = analysis["lambda_max"], analysis["trace"]
                name = f"{_name(group)}, seed {run.config['seed']}"
                error = NO_VALUE if trace["error"] is None else f"{trace['error']:.3g}"
                values = (f"{top['value']:.4g}", f"{trace['value']:.4g}", error)
                rows.append((name, analysis["classes"], str(analysis["rows"]), *values))
    header = ("run", "classes", "images", "λ_max", "trace", "its standard error")
    return markdown(header, rows) if rows else ["Not recorded."]


def _compared_with(group: Group, section: Section) -> Iterator[Group]:
    """The control, SGD with the same class weights, and SGD, where it is another one.

    For a step that is not the paper's, that one too, of several the one that differs in least; for
    another loss, cross-entropy.
    """
    weights = _class_weights(group, section)
    papers: list[tuple[int, Group]] = []
    for other in section.groups:
        if other is group:
            continue
        differing = set(differences([group, other]))
        if differing <= LOSS_KEYS:
            if other.config["loss"] == "ce":
                yield other
            continue
        if not other.config["optimizer"].startswith("sgd"):
            if differing <= STEP_KEYS and _is_papers(other) and not _is_papers(group):
                papers.append((len(differing), other))
            continue
        if differing - METHOD_KEYS:
            continue
        is_control = torch.equal(weights, _class_weights(other, section))
        if other.config["optimizer"] == "sgd" or is_control:
            yield other
    if papers:
        yield min(papers, key=operator.itemgetter(0))[1]


def _is_papers(group: Group) -> bool:
    """Whether its steps have the passes of Algorithm 1."""
    config = group.config
    exact = config["plan"] in ("auto", "joint") and config.get("perturb_every", 1) == 1
    return exact and not any(config.get(name) for name in REMOVED)


def _class_weights(group: Group, section: Section) -> torch.Tensor:
    """(K,), plain plus sharp: the weights of the loss without any perturbation."""
    config = _known({**group.config, "seed": 0})
    split = sharpness_split(config, section.counts or [])
    return (split.plain + split.sharp).float()


def _differences(group: Group, other: Group) -> Iterator[list[float]]:
    """By COLUMNS, for every seed that both have, images as they are."""
    of_seed = {run.config["seed"]: run.result for run in other.finished}
    for run in group.finished:
        result = of_seed.get(run.config["seed"])
        if result is not None and run.result is not None:
            ours, theirs = (r["last"]["plain"] for r in (run.result, result))
            yield [ours[column] - theirs[column] for column in COLUMNS]


def provenance(report: RecipeReport) -> str:
    """One sentence for each environment."""
    found: dict[tuple[str, ...], list[str]] = {}
    for e in report.environments:
        threads = e["machine"]["torch_threads"]
        key = (
            e["gpu"] or f"{e['machine']['cpu']}, {threads} thread{'s' if threads > 1 else ''}",
            software(e),
            commit(e),
        )
        found.setdefault(key, []).append(e["date"][:10])
    return " ".join(
        f"{len(dates)} runs: {'; '.join(key)}, {' to '.join(sorted({min(dates), max(dates)}))}."
        for key, dates in found.items()
    )


DIGITS = ("recipes/digits",)
CHEAPER = ("recipes/digits_cheaper",)
LOSSES = ("recipes/digits_losses",)
SMALL = ("recipes/cifar10_lt_small",)
SHORT = ("recipes/cifar10_lt_small_60_epochs",)
H100 = ("recipes/cifar10_lt_small_h100",)
RADIUS = ("recipes/cifar10_lt_small_rho",)
ETA_AND_WEIGHT = ("recipes/cifar10_lt_small_eta_and_weight",)
GROUP_NORM = ("recipes/cifar10_lt_small_group_norm",)
CIFAR100 = ("recipes/cifar100_lt",)
TABLES = {
    "digits": Table(DIGITS, accuracy),
    "digits-paired": Table(DIGITS, paired),
    "digits-cheaper": Table(CHEAPER, accuracy),
    "digits-cheaper-paired": Table(CHEAPER, paired),
    "digits-losses": Table(LOSSES, accuracy),
    "digits-losses-paired": Table(LOSSES, paired),
    "cifar10-lt-small": Table(SMALL, accuracy),
    "cifar10-lt-small-paired": Table(SMALL, paired),
    "cifar10-lt-small-sharpness": Table(SMALL, sharpness),
    "cifar10-lt-small-60-epochs": Table(SHORT, paired),
    "cifar10-lt-small-h100": Table(H100, accuracy),
    "cifar10-lt-small-h100-paired": Table(H100, paired),
    "cifar10-lt-small-h100-sharpness": Table(H100, sharpness),
    "cifar10-lt-small-rho": Table(RADIUS, accuracy),
    "cifar10-lt-small-rho-paired": Table(RADIUS, paired),
    "cifar10-lt-small-rho-sharpness": Table(RADIUS, sharpness),
    "cifar10-lt-small-eta-and-weight": Table(ETA_AND_WEIGHT, accuracy),
    "cifar10-lt-small-group-norm": Table(GROUP_NORM, accuracy),
    "cifar10-lt-small-group-norm-paired": Table(GROUP_NORM, paired),
    "cifar100-lt": Table(CIFAR100, accuracy),
    "cifar100-lt-paired": Table(CIFAR100, paired),
}

if __name__ == "__main__":
    sys.exit(main())

"""The settings that all groups share, and the command that makes a group's runs again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..settings.config import RunConfig, resolve
from ..settings.config_file import option_words
from ..settings.datasets import DATASETS
from .comparison import Group

NOT_SETTINGS = ("format", "label", "name")
GIVEN = ("dataset", "optimizer")
DECIDING = ("images", "method", "preset", "plan")  # other settings follow from these


def shared_settings(groups: Sequence[Group]) -> dict[str, Any]:
    """Setting -> its value, for those that are equal in all of `groups`."""
    first = groups[0].config
    return {
        key: value
        for key, value in first.items()
        if key not in NOT_SETTINGS
        and all(key in g.config and g.config[key] == value for g in groups)
    }


def command(group: Group) -> str | None:
    """The line that trains `group` again, all its seeds; None where a setting is unknown.

    It has the options that differ from what `imbsam-fast train` takes without them.
    """
    try:
        config = RunConfig.from_dict(group.runs[0].config)
        dataset = DATASETS[config.dataset]
        bare = {"data_dir": "", "seed": 0, **{k: getattr(config, k) for k in GIVEN}}
        # What it is without any option, and without those that do not follow from others.
        plain = resolve(dataset, bare)
        decided = resolve(dataset, {**bare, **{k: getattr(config, k) for k in DECIDING}})
    except (KeyError, TypeError, ValueError):
        return None
    words = ["imbsam-fast", "train", config.dataset, f"--optimizer={config.optimizer}"]
    for setting in fields(RunConfig):
        name, value = setting.name, getattr(config, setting.name)
        default = getattr(plain if name in DECIDING else decided, name)
        # Without any perturbation too, the preset decides which classes are tail.
        is_read = group.reads(name) or name == "preset"
        if is_read and name not in (*GIVEN, "seed") and value not in (default, None):
            words += option_words(name, list(value) if isinstance(value, tuple) else value)
    return shlex.join([*words, *_seeds(group), "--save=runs"])


def _seeds(group: Group) -> list[str]:
    """As options, where the seeds follow one another; else those of the first alone."""
    seeds = sorted(run.config["seed"] for run in group.runs)
    if seeds != list(range(seeds[0], seeds[0] + len(seeds))):
        seeds = seeds[:1]
    return [
        *([f"--seed={seeds[0]}"] if seeds[0] else []),
        *([f"--seeds={len(seeds)}"] if len(seeds) > 1 else []),
    ]

"""Settings from a YAML or TOML file, checked by the parser of the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .arguments import UsageError

# Other settings of a run follow from these.
DECIDING = ("dataset", "images", "method", "preset", "optimizer")


def read_arguments(
    file: Path, parser: argparse.ArgumentParser, given: Mapping[str, Any]
) -> dict[str, Any]:
    """What `parser` makes of the settings in `file`, whose keys are its options' names.

    null is as if the key were not there, and of a run's own config.yaml, which has a `format`,
    the settings of other data sets are left out. Raises UsageError for a file that cannot be
    read, a key that is no option, by name, a value that the option refuses, and a run's
    config.yaml where `given`, the command line's settings and `dataset`, decides otherwise.
    """
    values = {key: value for key, value in _read(file).items() if value is not None}
    options = {action.dest for action in parser._actions} - {"help", "config"}
    if "format" in values:
        _check_same_run(file, values, given)
        values = {key: value for key, value in values.items() if key in options}
    for key in values:
        if key not in options:
            raise UsageError(
                f"'{file}' has the unknown key {key!r}, expected one of "
                f"{', '.join(sorted(options))}"
            )
    words = [word for key, value in values.items() for word in option_words(key, value)]
    parsed = vars(parser.parse_args(words))
    return {key: parsed[key] for key in values}


def _check_same_run(file: Path, values: dict[str, Any], given: Mapping[str, Any]) -> None:
    for key in DECIDING:
        own = values.get(key)
        if key in given and given[key] not in (own, [own]):
            raise UsageError(
                f"{key} is {given[key]!r} and '{file}' is the configuration of a run with {own!r}, "
                "from which its other settings follow; expected the same, or a file without them"
            )


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text()
        values = _parse_toml(text) if file.suffix == ".toml" else _parse_yaml(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"--config is '{file}', which cannot be read: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"--config is '{file}', expected a mapping of settings to values")
    return {key.replace("-", "_"): value for key, value in values.items()}


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _parse_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def option_words(key: str, value: Any) -> list[str]:
    """A setting as it would stand on the command line."""
    option = f"--{key.replace('_', '-')}"
    if isinstance(value, bool):
        return [option if value else option.replace("--", "--no-", 1)]
    if isinstance(value, list):
        return [option, *map(str, value)]
    return [f"{option}={value}"]

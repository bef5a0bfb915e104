"""Every setting of a training as a command-line option, and back to a checked configuration."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from gradlab.checks import UsageError, unknown_name
from trainers.config import TrainConfig

_PREFIX = "setting:"
_ASSIGNED = {"env_args": "the environment", "aggregate_args": "the aggregator"}
"""Settings that are keyword arguments to something, each given by an option of its own."""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of `TrainConfig`, nested ones as `--section.field`.

    Args:
        parser: Where to add them.
    """
    for setting, what in _ASSIGNED.items():
        parser.add_argument(
            f"--{setting.removesuffix('s').replace('_', '-')}",
            action="append",
            default=[],
            dest=setting,
            metavar="NAME=VALUE",
            help=f"keyword argument to {what}; may be given several times",
        )
    for path, field in _fields(TrainConfig):
        if path in _ASSIGNED:
            continue
        several = get_origin(field.annotation) is tuple
        default = field.get_default(call_default_factory=True)
        shown = " ".join(map(str, default)) if several else default
        said = "" if default is None else f" (default: {shown})"
        parser.add_argument(
            f"--{path.replace('_', '-')}",
            dest=_PREFIX + path,
            default=argparse.SUPPRESS,
            nargs="*" if several else None,
            metavar=path.rpartition(".")[2].upper(),
            help=f"{field.description}{said}",
        )


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Collect what was set, in a file or by an option; options win.

    Args:
        options: The parsed command line.

    Returns:
        Nested settings, unchecked.

    Raises:
        UsageError: If the file can't be read or is not a YAML mapping.
    """
    settings = _read(options.config) if options.config else {}
    for name, value in vars(options).items():
        if name.startswith(_PREFIX):
            section, _, field = name.removeprefix(_PREFIX).rpartition(".")
            target = settings.setdefault(section, {}) if section else settings
            if not isinstance(target, dict):
                raise UsageError(f"{options.config}: `{section}` must hold settings by name.")
            target[field] = value
    for setting, what in _ASSIGNED.items():
        if given := getattr(options, setting):
            assigned = dict(_assignment(text, what) for text in given)
            settings[setting] = {**settings.get(setting, {}), **assigned}
    return settings


def make_config(settings: Mapping[str, Any]) -> TrainConfig:
    """Check settings.

    Args:
        settings: Nested settings; what is missing gets its default.

    Returns:
        The configuration.

    Raises:
        UsageError: If a name or a value is not one that may be.
    """
    try:
        return TrainConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section = where.rpartition(".")[0]
        known = [path for path, _ in _fields(TrainConfig) if path.rpartition(".")[0] == section]
        raise unknown_name("setting", where, known)
    raise UsageError(f"`{where}`: {first['msg']}. Got {where}={first['input']!r}.")


def _fields(model: type[BaseModel], prefix: str = "") -> list[tuple[str, FieldInfo]]:
    """Dotted path and description of every setting, sections taken apart."""
    found: list[tuple[str, FieldInfo]] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += _fields(kind, f"{prefix}{name}.")
        else:
            found.append((prefix + name, field))
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UsageError(f"{file} can't be read: {error.strerror}. Give a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        cause = " ".join(str(error).split())
        raise UsageError(f"{file} is not YAML: {cause}.") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UsageError(f"{file} must hold settings by name. Got a {type(settings).__name__}.")
    return settings


def _assignment(text: str, what: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise UsageError(f"an argument to {what} must read NAME=VALUE. Got {text!r}.")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"the value in {text!r} is not YAML. Put quotes around it.") from None

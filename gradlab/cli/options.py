"""Every setting of a training as a command-line option."""

import argparse
from pathlib import Path
from typing import Any, get_origin

from gradlab.checks import UsageError
from trainers.documents import parse_document, read_document
from trainers.settings import setting_fields

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
    for path, field in setting_fields():
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
            beneath = settings.get(setting, {})
            if not isinstance(beneath, dict):
                raise UsageError(f"{options.config}: `{setting}` must hold arguments by name.")
            settings[setting] = {**beneath, **assigned}
    return settings


def _read(file: Path) -> dict[str, Any]:
    settings = read_document(file).content
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UsageError(f"{file} must hold settings by name. Got a {type(settings).__name__}.")
    return settings


def _assignment(text: str, what: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise UsageError(f"an argument to {what} must read NAME=VALUE. Got {text!r}.")
    return name, parse_document(value, f"the value in {text!r}").content

"""The paper's scenarios as settings by name, from YAML files that ship with the package.

A file holds `settings` as `TrainConfig` takes them, and `cases`: settings for some sharing schemes,
algorithms or numbers of agents only, each under the condition (`when`) that goes with it. A file
may stand on another (`base`), which holds what several scenarios have in common; files whose names
begin with an underscore are nothing else. See docs/presets.md.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any

import yaml

from gradlab.checks import UsageError, unknown_name
from trainers.config import TrainConfig, with_usual

SETTING = "preset"
"""The setting that names a preset."""

_SHARED = "_"
_SUFFIX = ".yaml"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Settings for some trainings only.

    Attributes:
        when: Patterns of settings' values for which the case holds, by the settings' names; `*`
            stands for any characters.
        settings: Its settings, nested.
    """

    when: Mapping[str, object]
    settings: Mapping[str, Any]

    def holds(self, settings: Mapping[str, Any]) -> bool:
        """Tell whether the case is the one of some settings.

        Args:
            settings: Settings by name, as numbers or as they were written on the command line.

        Returns:
            Whether every setting that the condition names matches its pattern.
        """
        return all(
            fnmatchcase(str(settings[name]), str(pattern)) for name, pattern in self.when.items()
        )


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of one scenario.

    Attributes:
        name: What it is called.
        about: The scenario in a line.
        algorithms: What the paper trains it with.
        differs: A sentence for each thing in which a training with it is not the paper's.
        settings: Settings, nested, for every training.
        cases: Settings for some trainings only; of two that hold, the later one wins.
    """

    name: str
    about: str
    algorithms: tuple[str, ...]
    differs: tuple[str, ...]
    settings: Mapping[str, Any]
    cases: tuple[Case, ...]

    def under(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Lay this preset beneath settings that are given.

        Args:
            given: Nested settings, unchecked. They win, one by one, and they say which cases hold.

        Returns:
            Nested settings, unchecked.
        """
        chosen = {
            name: field.get_default(call_default_factory=True)
            for name, field in TrainConfig.model_fields.items()
        }
        chosen = merged(chosen, with_usual(merged(self.settings, given)))
        settings = dict(self.settings)
        for case in self.cases:
            if case.holds(chosen):
                settings = merged(settings, case.settings)
        return merged(settings, given)


def preset_names() -> list[str]:
    """List the presets that ship.

    Returns:
        Their names.
    """
    stems = (
        file.name.removesuffix(_SUFFIX)
        for file in resources.files(__name__).iterdir()
        if file.name.endswith(_SUFFIX)
    )
    return sorted(stem for stem in stems if not stem.startswith(_SHARED))


def load_preset(name: str) -> Preset:
    """Read a preset.

    Args:
        name: One of `preset_names`.

    Returns:
        The preset.

    Raises:
        UsageError: If there is none of that name.
    """
    if name not in preset_names():
        raise unknown_name("preset", name, preset_names())
    found = _read(name)
    return Preset(
        name=name,
        about=found["about"],
        algorithms=tuple(found["algorithms"]),
        differs=tuple(found["differs"]),
        settings=found["settings"],
        cases=tuple(Case(**case) for case in found["cases"]),
    )


def with_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """Lay the preset that settings name, if any, beneath them.

    Args:
        given: Nested settings, unchecked.

    Returns:
        Nested settings, unchecked; `preset` still names what they came from.

    Raises:
        UsageError: If there is no preset of that name.

    >>> with_preset({"preset": "dispersion", "frames": 1000})["frames"]
    1000
    """
    name = given.get(SETTING)
    if name is None:
        return dict(given)
    if not isinstance(name, str):
        raise UsageError(f"`{SETTING}` must be the name of a preset. Got {SETTING}={name!r}.")
    return load_preset(name).under(given)


def merged(beneath: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay settings over others, one by one in the sections that both have.

    Args:
        beneath: Nested settings.
        above: Nested settings that win.

    Returns:
        Both.
    """
    both = dict(beneath)
    for name, value in above.items():
        under = both.get(name)
        if isinstance(under, Mapping) and isinstance(value, Mapping):
            value = merged(under, value)
        both[name] = value
    return both


def _read(stem: str) -> dict[str, Any]:
    """A file's content on top of that of the file it stands on."""
    parts: dict[str, Any] = {"algorithms": [], "differs": [], "settings": {}, "cases": []}
    parts |= deepcopy(_parsed(stem))
    base = parts.pop("base", None)
    if base is None:
        return parts
    under = _read(base)
    return {
        "about": parts.get("about", under.get("about")),
        "algorithms": parts["algorithms"] or under["algorithms"],
        "differs": under["differs"] + parts["differs"],
        "settings": merged(under["settings"], parts["settings"]),
        "cases": under["cases"] + parts["cases"],
    }


@cache  # a sweep of thousands of runs asks for the same few files
def _parsed(stem: str) -> Any:  # noqa: ANN401
    text = resources.files(__name__).joinpath(f"{stem}{_SUFFIX}").read_text(encoding="utf-8")
    return yaml.safe_load(text)

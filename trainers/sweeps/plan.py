"""What a sweep trains: every combination of a grid's values, and single runs, each by a name."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from gradlab.checks import UsageError, unknown_name
from trainers.config import TrainConfig
from trainers.envs import check_name
from trainers.generators import METHODS
from trainers.presets import SETTING, merged, with_preset
from trainers.settings import BadSetting, make_config

PARTS = ("settings", "grid", "runs")
"""What a sweep's document may hold."""

MOST = 100_000
"""Runs of a sweep at most, so that a slip in a grid is told before it fills the memory."""

Keys = tuple[str | int, ...]
"""Keys and numbers that lead to a part of a document."""

Place = Callable[[Keys], str]
"""Says where a part of a document stands, e.g. "sweep.yaml, line 3, column 5: "."""

_FIRST, _LAST = ("preset", "env", "agents", "algorithm", "method"), "seed"
_BARE = ("preset", "env", "algorithm", "method")
_METHODS = ("method", "actor_method", "critic_method", "network.match")
_LONGEST = 150  # file systems take names of 255 bytes


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        name: Its folder's name, made of what differs between the sweep's runs.
        config: All its settings.
        differing: The settings that differ between the sweep's runs, as they were written, by
            dotted name; without those that this run leaves at their defaults.
    """

    name: str
    config: TrainConfig
    differing: Mapping[str, Any]


@dataclass(frozen=True)
class _Written:
    """A setting's value, and where it stands."""

    value: Any
    path: Keys


_Row = dict[str, _Written]


def plan_runs(document: Mapping[str, Any], place: Place = lambda _: "") -> list[PlannedRun]:
    """Plan the runs of a sweep.

    Args:
        document: `settings` of every run, nested or by dotted name; a `grid` of settings with lists
            of values, every combination of which is a run; and `runs`, each the settings of one
            more. What stands in `grid` and `runs` wins over `settings`.
        place: Says where a part of the document stands.

    Returns:
        The runs: first the grid's, whose last setting varies fastest.

    Raises:
        UsageError: If a setting is unknown or can't be used, two runs would be the same, or there
            is none.

    >>> for run in plan_runs({"grid": {"method": ["fups", "nops"], "seed": [0, 1]}}):
    ...     print(run.name)
    fups-seed0
    fups-seed1
    nops-seed0
    nops-seed1
    """
    for part in document:
        if part not in PARTS:
            raise UsageError(f"{place((part,))}{unknown_name('part of a sweep', part, PARTS)}")
    rows = list(_rows(document, place))
    if not rows:
        raise UsageError(
            f"{place(())}a sweep must have a `grid` with lists of values, or `runs`. Got none."
        )
    checked: set[str] = set()
    configs = [_config(row, origin, place, checked) for row, origin in rows]
    found: dict[str, tuple[_Row, Keys]] = {}
    for (row, origin), config in zip(rows, configs, strict=True):
        same = found.setdefault(training_key(config), (row, origin))
        if same[0] is not row:
            said = ", ".join(f"{name}={written.value}" for name, written in row.items())
            raise UsageError(
                f"{place(origin)}this run is in the sweep twice: {said or 'all defaults'} "
                f"({' and '.join({_said(same[1]): 0, _said(origin): 0})}). Leave one out, or let a "
                "setting differ, e.g. `seed`."
            )
    return _named([row for row, _ in rows], configs)


def _said(origin: Keys) -> str:
    return "the grid" if origin[0] == "grid" else f"run {int(origin[1]) + 1} of `runs`"


def _rows(document: Mapping[str, Any], place: Place) -> Iterator[tuple[_Row, Keys]]:
    """What is written for each run, and where."""
    shared = _written(document.get("settings"), ("settings",), place)
    grid = _written(document.get("grid"), ("grid",), place)
    for name, written in grid.items():
        if not isinstance(written.value, list) or not written.value:
            raise UsageError(
                f"{place(written.path)}`{name}` must be a list of at least one value in a grid. "
                f"Got {name}={written.value!r}."
            )
    count = math.prod(len(written.value) for written in grid.values()) if grid else 0
    if count > MOST:
        raise UsageError(
            f"{place(('grid',))}`grid` must have at most {MOST:,} combinations. Got {count:,}."
        )
    for values in product(*(written.value for written in grid.values())) if grid else ():
        row = dict(shared)
        for (name, written), value in zip(grid.items(), values, strict=True):
            row |= _written({name: value}, written.path[:-1], place)
        yield row, ("grid",)
    runs = document.get("runs") or []
    if not isinstance(runs, list):
        raise UsageError(f"{place(('runs',))}`runs` must be a list of runs' settings.")
    for number, run in enumerate(runs):
        yield shared | _written(run, ("runs", number), place), ("runs", number)


def _written(settings: object, path: Keys, place: Place, prefix: str = "") -> _Row:
    """Settings by dotted name, sections taken apart."""
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise UsageError(
            f"{place(path)}{_named_part(path)} must hold settings by name. Got {settings!r}."
        )
    row: _Row = {}
    for name, value in settings.items():
        here = (*path, name)
        if not isinstance(name, str):
            raise UsageError(f"{place(here)}a setting's name must be text. Got {name!r}.")
        inside = isinstance(value, Mapping)
        of_name = (
            _written(value, here, place, f"{prefix}{name}.")
            if inside
            else {prefix + name: _Written(value, here)}
        )
        if twice := row.keys() & of_name.keys():
            raise UsageError(f"{place(here)}`{min(twice)}` is given twice. Leave one out.")
        row |= of_name
    return row


def _named_part(path: Keys) -> str:
    last = path[-1]
    return f"run {last + 1}" if isinstance(last, int) else f"`{last}`"


def _config(row: _Row, origin: Keys, place: Place, checked: set[str]) -> TrainConfig:
    """The checked configuration of one run; `checked` are environments that are known to be."""

    def bad(setting: str, message: object) -> UsageError:
        while setting and setting not in row:
            setting = setting.rpartition(".")[0]
        path = row[setting].path if setting else origin
        return UsageError(f"{place(path)}{message}")

    settings: dict[str, Any] = {}
    for name, written in row.items():
        value: Any = written.value
        for part in reversed(name.split(".")):
            value = {part: value}
        settings = merged(settings, value)
    try:
        settings = with_preset(settings)
    except UsageError as error:
        raise bad(SETTING, error) from None
    try:
        config = make_config(settings)
    except BadSetting as error:
        raise bad(error.setting, error) from None
    for setting in _METHODS:
        section, _, name = setting.rpartition(".")
        method = getattr(getattr(config, section) if section else config, name)
        if method is not None and method not in METHODS:
            raise bad(setting, unknown_name("method", method, METHODS))
    if config.env not in checked:  # once, as names are read off the families' source files
        try:
            check_name(config.env)
        except UsageError as error:
            raise bad("env", error) from None
        checked.add(config.env)
    return config


def training_key(config: TrainConfig) -> str:
    """Write down a training.

    Args:
        config: Its settings.

    Returns:
        A text that only the same training has; where else it is recorded makes no difference.
    """
    return json.dumps(config.model_dump(mode="json", exclude={"log"}), sort_keys=True)


def _named(rows: Sequence[_Row], configs: Sequence[TrainConfig]) -> list[PlannedRun]:
    values: dict[str, set[str]] = {}
    for setting in {name: None for row in rows for name in row}:
        values[setting] = {repr(row[setting].value) if setting in row else "" for row in rows}
    differ = [setting for setting, found in values.items() if len(found) > 1]
    differ.sort(key=lambda s: _FIRST.index(s) if s in _FIRST else len(_FIRST) + (s == _LAST))
    names = [
        "-".join(_label(setting, row[setting].value) for setting in differ if setting in row)
        or _slug(config.scheme)
        for row, config in zip(rows, configs, strict=True)
    ]
    often = Counter(names)
    runs = []
    for name, row, config in zip(names, rows, configs, strict=True):
        if often[name] > 1 or len(name) > _LONGEST:
            digest = hashlib.sha256(training_key(config).encode()).hexdigest()
            name = f"{name[:_LONGEST]}-{digest[:8]}"
        differing = {setting: row[setting].value for setting in differ if setting in row}
        runs.append(PlannedRun(name=name, config=config, differing=differing))
    return runs


def _label(setting: str, value: object) -> str:
    if setting == "agents":
        return f"{_slug(value)}ag"
    if setting == _LAST:
        return f"seed{_slug(value)}"
    return _slug(value) if setting in _BARE else f"{_slug(setting)}={_slug(value)}"


def _slug(value: object) -> str:
    """A value as part of a folder's name."""
    text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text.lower() if isinstance(value, bool) else text)

"""Reading a run folder: finished, still being written, or damaged."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from filelock import FileLock, Timeout
from jaxtyping import Int

from gradlab.checks import UsageError, unknown_name
from gradlab.database import status_of
from gradlab.records import LAST_UPDATE, Described, Records, check_schema
from gradlab.run_writer import (
    LARGEST_INFO,
    LOCK_FILE,
    RUN_FILE,
    check_no_links,
    is_run,
    read_at_most,
)

_EMBEDDING = "embedding_"


def _notebook() -> Any:  # noqa: ANN401 -- a module
    """What draws, imported when something is to be drawn: the core never needs plotly."""
    return import_module("dashboards.notebook")


def open_run(path: str | Path) -> "Run":
    """Open a run folder for reading.

    Args:
        path: The run folder, e.g. "runs/demo-hypermarl".

    Returns:
        The run; what is damaged is listed in its `problems` and the rest can be read.

    Raises:
        UsageError: If there is no run, or it was written by a newer gradlab.
    """
    return Run(Path(path))


def runs_below(top: Path) -> Iterator[Path]:
    """Find run folders; what lies in one is not looked at.

    Args:
        top: A run folder, or a folder that holds some, at whatever depth; links are not followed.

    Yields:
        Run folders, in the order of their names.
    """
    pending = [top]
    while pending:
        folder = pending.pop()
        if is_run(folder):
            yield folder
            continue
        try:
            with os.scandir(folder) as entries:
                below = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
        except OSError:
            continue  # what may not be looked into shows nothing
        pending += [folder / name for name in reversed(below)]


def open_runs(*paths: str | Path) -> list["Run"]:
    """Open runs for reading.

    Args:
        *paths: Run folders, and folders that hold runs, such as a sweep's.

    Returns:
        The runs, each once, in the order of `paths` and of their names.

    Raises:
        UsageError: If a folder holds no run, or one can't be read.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        for run in list(runs_below(path)) or [path]:  # of none, `Run` says what there is instead
            found.setdefault(run.resolve(), run)
    return [Run(path) for path in found.values()]


def _cell(place: list[int], shape: list[int]) -> int:
    """The position of a number in an array in C order."""
    position = 0
    for at, length in zip(place, shape, strict=True):
        position = position * length + at
    return position


class Run:
    """A recorded training run.

    Nothing is executed or unpickled on reading. Records are read when asked for, so a run that is
    still being written shows its newest update on a new `Run`.

    Attributes:
        path: The run folder.
        name: The folder's name.
        info: What run.json says (empty if that file is lost).
        problems: A sentence for each thing that is missing or damaged; grows while reading.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise UsageError(f"{path} does not exist. `gradlab runs` lists the runs there are.")
        if not is_run(path):
            empty = path.is_dir() and not any(path.iterdir())
            what = "is an empty folder" if empty else f"holds no run (no {RUN_FILE})"
            raise UsageError(f"{path} {what}. `gradlab runs` lists the runs there are.")
        check_no_links(path)
        self.path = path
        self.name = path.resolve().name
        self.problems: list[str] = []
        self.info = self._read_info()
        self._records = Records(path, self.problems, self.info.get("updates"))
        self._updates: dict[str, list[int]] = {}

    def __repr__(self) -> str:
        return (
            f"<gradlab run {self.name!r}: {self.info.get('method', 'unknown method')} on "
            f"{self.info.get('environment', 'unknown environment')}, {self.state}>"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return str(_notebook().summary(self))

    @property
    def plot(self) -> Any:  # noqa: ANN401 -- what draws is not imported here
        """The dashboard's panels as plotly figures: `dashboards.notebook.Plots`.

        E.g. `run.plot.embeddings(update=100, method="pca")`, `run.plot.interference()`,
        `run.plot("pair-history", agent=0, other=2)`; `run.plot.panels` names them all.
        """
        return _notebook().Plots(self)

    @property
    def config(self) -> dict[str, Any]:
        """The full configuration that the run was started with."""
        config = self.info.get("config", {})
        return config if isinstance(config, dict) else {}

    @property
    def versions(self) -> dict[str, str]:
        """Versions of Python, gradlab, torch, numpy and the environment's packages, by name.

        Of an older run, or if run.json is lost, empty.
        """
        found = self.info.get("versions", {})
        return {str(name): str(v) for name, v in found.items()} if isinstance(found, dict) else {}

    @property
    def method(self) -> str:
        """The sharing scheme's registered name, "unknown" if run.json is lost.

        Where actor and critic have different ones: both, joined by a plus.
        """
        return str(self.info.get("method", "unknown"))

    def method_of(self, network: str) -> str:
        """The sharing scheme of one network, where they differ.

        Args:
            network: "actor" or "critic".

        Returns:
            Its registered name; the run's method if the run does not tell them apart.
        """
        methods = self.info.get("methods", {})
        return str(methods.get(network, self.method) if isinstance(methods, dict) else self.method)

    @property
    def environment(self) -> str:
        """The environment's registered name, "unknown" if run.json is lost."""
        return str(self.info.get("environment", "unknown"))

    @property
    def state(self) -> str:
        """One of "running", "done", "stopped", "died", "failed", "unknown".

        One that was stopped, or whose process died before it could say so, can be resumed.
        """
        state = str(self.info.get("state", "unknown"))
        if state == "running" and not self._is_locked():
            return "died"
        return state

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of the recorded quantities."""
        return tuple(self._records.quantities)

    def axes(self, name: str) -> dict[str, list[Any]]:
        """List a quantity's axes after `update` without reading a record of it.

        Args:
            name: One of `quantities`.

        Returns:
            Labels by axis, in order.

        Raises:
            UsageError: If no such quantity is recorded.
        """
        known = self._known(name)
        return {dim: list(known.coordinates[dim]) for dim in known.dims}

    def updates(self, name: str, *, since: int = 0, at: Sequence[int] | None = None) -> list[int]:
        """List the updates at which a quantity was recorded without reading its records.

        Args:
            name: One of `quantities`.
            since: The first update to list.
            at: Those to choose from, in place of all.

        Returns:
            Updates, ascending; of all those of when they were first asked for.

        Raises:
            UsageError: If no such quantity is recorded.
        """
        self._known(name)
        if since > 0 or at is not None:
            return [update for update, _ in self._records.rows(name, 0, 0, since, at=at)]
        if name not in self._updates:
            self._updates[name] = [update for update, _ in self._records.rows(name, 0, 0)]
        return list(self._updates[name])

    def marks(self, name: str, *, since: int = 0) -> Int[np.ndarray, " record"]:
        """List the updates of a quantity's records as the index has them, however long the run.

        Args:
            name: One of `quantities`.
            since: The first update to list.

        Returns:
            Updates, ascending; those of records that are not whole, which nothing else shows, too.

        Raises:
            UsageError: If no such quantity is recorded.
        """
        self._known(name)
        return self._records.marks(name, since=since)

    def newest(self, name: str) -> int | None:
        """Look up the last update at which a quantity was recorded, however long the run.

        Args:
            name: One of `quantities`.

        Returns:
            The update; None if none of its records is whole.

        Raises:
            UsageError: If no such quantity is recorded.
        """
        self._known(name)
        return max(
            (update for update, _ in self._records.rows(name, 0, 0, newest=True)), default=None
        )

    def quantity(
        self,
        name: str,
        *,
        since: int = 0,
        until: int = LAST_UPDATE,
        at: Sequence[int] | None = None,
        where: Mapping[str, object] | None = None,
    ) -> xr.DataArray:
        """Read one quantity, over all updates at which it was recorded or some.

        Args:
            name: One of `quantities`.
            since: The first update to read.
            until: The last update to read.
            at: The updates to read, in place of all from `since` to `until`; those at which it was
                not recorded are left out.
            where: A label for each axis to fix, e.g. {"layer": "all"}; of every record only the
                bytes from the first to the last number that is asked for are taken.

        Returns:
            An array whose first axis is `update`, without the fixed axes; attributes give unit and
            estimator.

        Raises:
            UsageError: If no such quantity is recorded, or it has no such axis or label.
        """
        known = self._known(name)
        fixed = {dim: self._place(name, dim, label) for dim, label in (where or {}).items()}
        item = known.dtype.itemsize
        kept = [dim for dim in known.dims if dim not in fixed]
        shape = [len(known.coordinates[dim]) for dim in kept]
        first, count = 0, 0
        if known.size:
            ends = zip(known.dims, known.shape, strict=True)
            last = [fixed.get(dim, length - 1) for dim, length in ends]
            begin = [fixed.get(dim, 0) for dim in known.dims]
            first, end = (_cell(place, known.shape) for place in (begin, last))
            count = end - first + 1
        rows = self._records.rows(name, first * item, count * item, since, until, at=at)
        values = np.frombuffer(b"".join(data for _, data in rows), dtype=known.dtype)
        values = values.reshape(len(rows), count)
        if rows and count != math.prod(shape):
            # Only now: a record of that size is there.
            cells = np.arange(known.size // item).reshape(known.shape)
            places = cells[tuple(fixed.get(dim, slice(None)) for dim in known.dims)]
            values = values[:, places.ravel() - first]
        return xr.DataArray(
            values.reshape(len(rows), *shape),
            dims=("update", *kept),
            coords={
                "update": [update for update, _ in rows],
                **{dim: known.coordinates[dim] for dim in kept},
            },
            name=name,
            attrs={"unit": known.unit, "estimator": known.estimator},
        )

    def version(self) -> tuple[object, ...]:
        """Tell whether the folder has changed since this run was opened, at next to no cost.

        Returns:
            What differs from an earlier call's answer once something was recorded or described,
            the files were replaced, or the writer came or went.
        """
        stands: list[object] = [self.info.get("state") == "running" and self._is_locked()]
        described = status_of(self.path / RUN_FILE)
        if described is not None:
            stands += [described.st_ino, described.st_mtime_ns, described.st_size]
        return (*stands, *self._records.version())

    def _known(self, name: str) -> Described:
        if name not in self._records.quantities:
            raise unknown_name(f"quantity in {self.path}", name, self._records.quantities)
        return self._records.quantities[name]

    def _place(self, name: str, dim: str, label: object) -> int:
        axes = self.axes(name)
        if dim not in axes:
            raise unknown_name(f"axis of {name}", dim, axes)
        if label not in axes[dim]:
            raise unknown_name(f"{dim} of {name}", label, map(str, axes[dim]))
        return axes[dim].index(label)

    @cached_property
    def metrics(self) -> xr.Dataset:
        """All quantities but the embeddings, on one `update` axis (NaN where not recorded)."""
        names = [name for name in self._records.quantities if not self._is_embedding(name)]
        return xr.merge(
            [self.quantity(name) for name in names], join="outer", compat="no_conflicts"
        )

    @cached_property
    def embeddings(self) -> dict[str, xr.DataArray]:
        """Agents' embeddings [update, agent, feature] by network ("actor", "critic")."""
        return {
            name.removeprefix(_EMBEDDING): self.quantity(name)
            for name in self._records.quantities
            if self._is_embedding(name)
        }

    def _is_embedding(self, name: str) -> bool:
        """Tell rows of features from what was measured of them, as `embedding_distance`."""
        return name.startswith(_EMBEDDING) and "feature" in self._records.quantities[name].dims

    def _read_info(self) -> dict[str, Any]:
        try:
            info = json.loads(read_at_most(self.path / RUN_FILE, LARGEST_INFO))
            if not isinstance(info, dict):
                raise ValueError("not a JSON object")
        except FileNotFoundError:
            self.problems.append(f"{RUN_FILE} is missing: method and settings are unknown")
            return {}
        except OSError as error:
            self.problems.append(
                f"{RUN_FILE} can't be read ({error.strerror}): method and settings are unknown"
            )
            return {}
        except (ValueError, RecursionError):
            self.problems.append(f"{RUN_FILE} is damaged: method and settings are unknown")
            return {}
        check_schema(self.path / RUN_FILE, info.get("schema"))
        return info

    def _is_locked(self) -> bool:
        if not (self.path / LOCK_FILE).exists():
            return False  # to look must not make the file
        lock = FileLock(self.path / LOCK_FILE)
        try:
            with lock.acquire(timeout=0):
                return False
        except Timeout:
            return True
        except OSError:
            return True  # a read-only copy: run.json is all there is to go by

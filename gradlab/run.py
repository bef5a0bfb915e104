"""Reading a run folder: finished, still being written, or damaged."""

import json
import math
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from filelock import FileLock, Timeout
from jaxtyping import Int

from gradlab.axes import misfit
from gradlab.checks import UsageError, unknown_name
from gradlab.run_writer import (
    LARGEST_INFO,
    LOCK_FILE,
    OURS,
    RECORDS_FILE,
    RUN_FILE,
    SCHEMA,
    check_no_links,
    is_run,
    read_at_most,
    written_as,
)

_EMBEDDING = "embedding_"
_LAST = 2**63 - 1  # the largest number that the store holds
_LARGEST_RECORD = 10**9  # bytes; SQLite holds no more
_MOST_AXES = 16
_MEANWHILE = 10**6  # bytes that are written between a look at the files and one at the records
_DTYPE = re.compile(r"[<|][biuf][0-9]{1,2}")


def _notebook() -> Any:  # noqa: ANN401 -- a module
    """What draws, imported when something is to be drawn: the core never needs plotly."""
    return import_module("dashboards.notebook")


class _Quantity(NamedTuple):
    dims: tuple[str, ...]
    coordinates: dict[str, list[Any]]
    dtype: np.dtype[Any]
    unit: str
    estimator: str

    @property
    def shape(self) -> list[int]:
        return [len(self.coordinates[dim]) for dim in self.dims]

    @property
    def size(self) -> int:
        """A whole record's bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def read(cls, row: tuple[Any, ...]) -> "_Quantity":
        """Take a row of the table `quantity` for what it is, whoever wrote it.

        Args:
            row: Its columns.

        Returns:
            The quantity.

        Raises:
            ValueError: If it is none that a `RunWriter` writes.
        """
        name, dims, coordinates, dtype, unit, estimator = row
        if not all(isinstance(text, str) for text in row):
            raise ValueError("a quantity whose description is no text")
        axes, labels = json.loads(dims), json.loads(coordinates)
        if not (
            isinstance(axes, list)
            and isinstance(labels, dict)
            and all(isinstance(axis, str) and axis in labels for axis in axes)
            and len({"update", *axes}) == len(axes) + 1 <= _MOST_AXES
            and all(_are_labels(labels[axis]) for axis in axes)
        ):
            raise ValueError(f"{name!r} has no axes with labels")
        if not _DTYPE.fullmatch(dtype):
            raise ValueError(f"{name!r} is of no numbers but of type {dtype!r}")
        found = cls(tuple(axes), labels, np.dtype(dtype), unit, estimator)
        if found.size > _LARGEST_RECORD:
            raise ValueError(f"{name!r} has {found.size:,} bytes a record, which no file holds")
        return found


def _are_labels(labels: object) -> bool:
    """Tell whether an axis can be labelled so: all names or all numbers, each once."""
    if not isinstance(labels, list):
        return False
    names = all(isinstance(label, str) for label in labels)
    numbers = all(isinstance(label, int | float) and abs(label) < _LAST for label in labels)
    return (names or numbers) and len(set(labels)) == len(labels)


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


def _check_count(count: int, most: int) -> None:
    if count > most:
        raise sqlite3.DatabaseError("its records are larger than the file")


def _status(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:
        return None


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
        self._database = self._connect()
        self._quantities = self._read_quantities()
        self._updates: dict[str, list[int]] = {}
        self._salvaged: dict[str, dict[int, bytes]] | None = None
        if self._database is not None and self._is_truncated():
            self._salvage("the file is cut off")

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
        return tuple(self._quantities)

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
            return [update for update, _ in self._rows(name, 0, 0, since, at=at)]
        if name not in self._updates:
            self._updates[name] = [update for update, _ in self._rows(name, 0, 0)]
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
        size = self._known(name).size
        if self._salvaged is None and self._database is not None:
            # One text: a tenth of the time that as many rows take.
            query = (
                'SELECT group_concat("update"), count(*) FROM (SELECT "update" FROM record WHERE '
                'quantity = :name AND "update" BETWEEN :since AND :until AND '
                'typeof("update") = \'integer\' ORDER BY "update" LIMIT :most)'
            )
            most = self._most(size)
            wanted = {"name": name, "since": since, "until": _LAST, "most": most + 1}
            try:
                text, count = self._database.execute(query, wanted).fetchone()
                _check_count(count, most)
                return np.array(text.split(",") if count else [], np.int64)
            except sqlite3.DatabaseError as error:
                self._salvage(str(error))
        whole = sorted((self._salvaged or {}).get(name, {}))
        return np.array([update for update in whole if update >= since], np.int64)

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
        return max((update for update, _ in self._rows(name, 0, 0, newest=True)), default=None)

    def quantity(
        self,
        name: str,
        *,
        since: int = 0,
        until: int = _LAST,
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
        rows = self._rows(name, first * item, count * item, since, until, at=at)
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
        described, records = _status(self.path / RUN_FILE), _status(self.path / RECORDS_FILE)
        if described is not None:
            stands += [described.st_ino, described.st_mtime_ns, described.st_size]
        # The records' time and size change when nothing is recorded, and don't when something is:
        # the log holds that.
        stands.append(None if records is None else records.st_ino)
        if self._database is not None:
            try:
                stands += self._database.execute("PRAGMA data_version").fetchone()
            except sqlite3.DatabaseError as error:
                stands.append(str(error))
        return tuple(stands)

    def _known(self, name: str) -> _Quantity:
        if name not in self._quantities:
            raise unknown_name(f"quantity in {self.path}", name, self._quantities)
        return self._quantities[name]

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
        names = [name for name in self._quantities if not self._is_embedding(name)]
        return xr.merge(
            [self.quantity(name) for name in names], join="outer", compat="no_conflicts"
        )

    @cached_property
    def embeddings(self) -> dict[str, xr.DataArray]:
        """Agents' embeddings [update, agent, feature] by network ("actor", "critic")."""
        return {
            name.removeprefix(_EMBEDDING): self.quantity(name)
            for name in self._quantities
            if self._is_embedding(name)
        }

    def _is_embedding(self, name: str) -> bool:
        """Tell rows of features from what was measured of them, as `embedding_distance`."""
        return name.startswith(_EMBEDDING) and "feature" in self._quantities[name].dims

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
        self._check_schema(info.get("schema"), RUN_FILE)
        return info

    def _check_schema(self, schema: object, file: str) -> None:
        if not isinstance(schema, int) or schema > SCHEMA or schema < 1:
            raise UsageError(
                f"{self.path / file} has schema version {schema!r}; this gradlab reads versions "
                f"1 to {SCHEMA}. Open it with the gradlab that wrote it, or upgrade."
            )

    def _connect(self) -> sqlite3.Connection | None:
        file = self.path / RECORDS_FILE
        if not file.is_file():
            self.problems.append(f"{RECORDS_FILE} is missing: there are no records")
            return None
        # On read-only media a log can't be opened for reading; then nobody writes there either.
        for mode in ("mode=ro", "immutable=1"):
            try:
                database = sqlite3.connect(
                    f"{file.resolve().as_uri()}?{mode}", uri=True, check_same_thread=False
                )
                # Without this SQLite refuses a cut-off file whole; the connection can't write.
                database.execute("PRAGMA writable_schema=ON")
                (version,) = database.execute("PRAGMA user_version").fetchone()
                database.execute("PRAGMA trusted_schema=OFF")
                database.execute("PRAGMA cell_size_check=ON")
                written = written_as(database)
            except sqlite3.OperationalError:
                continue
            except sqlite3.DatabaseError as error:
                self.problems.append(
                    f"{RECORDS_FILE} can't be read ({error}): there are no records"
                )
                return None
            if version:  # 0 while a new file's first transaction is under way
                self._check_schema(version, RECORDS_FILE)
            if written and written != OURS:
                self.problems.append(
                    f"{RECORDS_FILE} has other tables than gradlab writes: there are no records"
                )
                return None
            return database
        self.problems.append(f"{RECORDS_FILE} can't be opened: there are no records")
        return None

    def _read_quantities(self) -> dict[str, _Quantity]:
        found: dict[str, _Quantity] = {}
        if self._database is None:
            return found
        columns = "name, dims, coordinates, dtype, unit, estimator"
        length = "+".join(f"length(CAST({column} AS BLOB))" for column in columns.split(", "))
        try:
            described = 0
            for (text,) in self._database.execute(f"SELECT {length} FROM quantity"):
                described += text or 0
                if described > LARGEST_INFO:
                    raise ValueError("its quantities' descriptions are too large")
            for row in self._database.execute(f"SELECT {columns} FROM quantity ORDER BY rowid"):
                quantity = _Quantity.read(row)
                wrong = misfit(row[0], {dim: quantity.coordinates[dim] for dim in quantity.dims})
                if wrong is None:
                    found[row[0]] = quantity
                else:
                    self.problems.append(f"{row[0]} has {wrong}: it is passed over")
        except (
            *(sqlite3.DatabaseError, ValueError, TypeError, RecursionError, MemoryError),
        ) as error:
            self.problems.append(
                f"{RECORDS_FILE} is damaged ({error}): only what {len(found)} quantities recorded "
                "can be read"
            )
        return found

    def _is_truncated(self) -> bool:
        """A database file shorter than its header says, with no log that holds the rest."""
        file = self.path / RECORDS_FILE
        log = file.with_name(file.name + "-wal")
        if log.exists() and log.stat().st_size:
            return False
        with file.open("rb") as handle:
            header = handle.read(100)
        page_size = int.from_bytes(header[16:18], "big")
        page_size = 65536 if page_size == 1 else page_size
        return file.stat().st_size < page_size * int.from_bytes(header[28:32], "big")

    def _rows(
        self,
        name: str,
        start: int,
        count: int,
        since: int = 0,
        until: int = _LAST,
        *,
        at: Sequence[int] | None = None,
        newest: bool = False,
    ) -> list[tuple[int, bytes]]:
        """Of each update, or the newest, whose record is whole: its number, `count` bytes of it."""
        size = self._quantities[name].size
        if self._salvaged is None and self._database is not None:
            # `substr` reads a record up to what it takes; type and length are told without.
            part = "substr(array, :start + 1, :count)" if count else "x''"
            among = "" if at is None else 'AND "update" IN (SELECT value FROM json_each(:at)) '
            query = (
                f'SELECT "update", {part} FROM record WHERE quantity = :name '
                'AND "update" BETWEEN :since AND :until AND typeof("update") = \'integer\' '
                f"AND typeof(array) = 'blob' AND length(array) = :size {among}"
                f'ORDER BY "update" {"DESC" if newest else ""} LIMIT :most'
            )
            most = self._most(size)
            wanted = {"name": name, "start": start, "count": count, "since": since, "until": until}
            wanted |= {"size": size, "most": 1 if newest else most + 1}
            wanted |= {} if at is None else {"at": json.dumps(list(at))}
            try:
                rows = self._database.execute(query, wanted).fetchall()
                _check_count(len(rows), most)
                return rows
            except sqlite3.DatabaseError as error:
                self._salvage(str(error))
        whole = (self._salvaged or {}).get(name, {})
        chosen = None if at is None else set(at)
        return [
            (update, data[start : start + count])
            for update, data in sorted(whole.items())
            if since <= update <= until
            and len(data) == size
            and (chosen is None or update in chosen)
        ]

    def _stored(self) -> int:
        """Bytes of the files that hold the records, and of what may be written meanwhile."""
        files = (_status(self.path / f"{RECORDS_FILE}{end}") for end in ("", "-wal"))
        return _MEANWHILE + sum(status.st_size for status in files if status is not None)

    def _most(self, size: int) -> int:
        """Tell how many records of a size there can be; pages could be used again and again."""
        return self._stored() // (size + 1) + 1

    def _salvage(self, cause: str) -> None:
        """Read the records in the order they were written, up to the first that is damaged."""
        whole: dict[str, dict[int, bytes]] = {}
        last = -1
        query = 'SELECT quantity, "update", array FROM record NOT INDEXED ORDER BY rowid'
        try:
            assert self._database is not None
            left = self._stored()
            for name, update, data in self._database.execute(query):
                if not (isinstance(update, int) and isinstance(data, bytes)):
                    raise sqlite3.DatabaseError("a record without content")
                left -= len(data)
                _check_count(0, left)
                whole.setdefault(name, {})[update] = data
                last = max(last, update)
        except sqlite3.DatabaseError:
            # The update that was being read when the damage was met may lack quantities.
            for records in whole.values():
                records.pop(last, None)
            last -= 1
        self._salvaged = whole
        until = f"records are whole up to update {last}" if last >= 0 else "no record is whole"
        planned = self.info.get("updates")
        self.problems.append(
            f"{RECORDS_FILE} is damaged ({cause}): {until}"
            + (f" of {planned} planned; later ones are missing" if planned else "")
        )

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

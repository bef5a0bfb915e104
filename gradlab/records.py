"""The records of a run, read from its database: whole, still being written, or damaged."""

import json
import math
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from gradlab.axes import misfit
from gradlab.checks import UsageError
from gradlab.database import bounded, is_ours, most_stored, status_of
from gradlab.run_writer import LARGEST_INFO, RECORDS_FILE, SCHEMA

LAST_UPDATE = 2**63 - 1
"""The largest number that the store holds."""

_LARGEST_RECORD = 10**9  # bytes; SQLite holds no more
_MOST_AXES = 16
_DTYPE = re.compile(r"[<|][biuf][0-9]{1,2}")


class Described(NamedTuple):
    """How a quantity is recorded.

    Attributes:
        dims: Its axes after `update`.
        coordinates: Their labels.
        dtype: Type of its numbers.
        unit: Their unit.
        estimator: What they are, in words.
    """

    dims: tuple[str, ...]
    coordinates: dict[str, list[Any]]
    dtype: np.dtype[Any]
    unit: str
    estimator: str

    @property
    def shape(self) -> list[int]:
        """A record's shape."""
        return [len(self.coordinates[dim]) for dim in self.dims]

    @property
    def size(self) -> int:
        """A whole record's bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def read(cls, row: tuple[Any, ...]) -> "Described":
        """Take a row of the table `quantity` for what it is, whoever wrote it.

        Args:
            row: Its columns.

        Returns:
            The quantity.

        Raises:
            ValueError: If it is none that a `RunWriter` writes.
        """
        name, dims, labelled, dtype, unit, estimator = row
        if not all(isinstance(text, str) for text in row):
            raise ValueError("a quantity whose description is no text")
        axes, labels = json.loads(dims), json.loads(labelled)
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
        coordinates = {axis: labels[axis] for axis in axes}
        found = cls(tuple(axes), coordinates, np.dtype(dtype), unit, estimator)
        if found.size > _LARGEST_RECORD:
            raise ValueError(f"{name!r} has {found.size:,} bytes a record, which no file holds")
        return found


def _are_labels(labels: object) -> bool:
    """Tell whether an axis can be labelled so: all names or all numbers, each once."""
    if not isinstance(labels, list):
        return False
    names = all(isinstance(label, str) for label in labels)
    numbers = all(isinstance(label, int | float) and abs(label) < LAST_UPDATE for label in labels)
    return (names or numbers) and len(set(labels)) == len(labels)


def _check_fits(found: int, most: int) -> None:
    if found > most:
        raise sqlite3.DatabaseError("its records are larger than the file")


def check_schema(file: Path, schema: object) -> None:
    """Refuse what another gradlab wrote in a way of its own.

    Args:
        file: Where it stands.
        schema: The version that stands there.

    Raises:
        UsageError: If this gradlab reads no such version.
    """
    if not isinstance(schema, int) or schema > SCHEMA or schema < 1:
        raise UsageError(
            f"{file} has schema version {schema!r}; this gradlab reads versions "
            f"1 to {SCHEMA}. Open it with the gradlab that wrote it, or upgrade."
        )


class Records:
    """What a run folder's database holds.

    Attributes:
        quantities: How each quantity is recorded, by name.
    """

    def __init__(self, folder: Path, problems: list[str], planned: object) -> None:
        """Open the database, if it is there, and read what describes the quantities.

        Args:
            folder: The run folder.
            problems: Where a sentence is put for each thing that is missing or damaged.
            planned: Number of updates that there are to be, if it is known.

        Raises:
            UsageError: If it was written by a newer gradlab.
        """
        self._file = folder / RECORDS_FILE
        self._problems = problems
        self._planned = planned
        self._database = self._connect()
        self.quantities = self._read_quantities()
        self._salvaged: dict[str, dict[int, bytes]] | None = None
        if self._database is not None and self._is_truncated():
            self._salvage("the file is cut off")

    def version(self) -> list[object]:
        """Tell whether anything was recorded, at next to no cost.

        Returns:
            What differs from an earlier call's answer if something was.
        """
        # The records' time and size change when nothing is recorded, and don't when something is:
        # the log holds that.
        file = status_of(self._file)
        stands: list[object] = [None if file is None else file.st_ino]
        if self._database is not None:
            try:
                stands += self._database.execute("PRAGMA data_version").fetchone()
            except sqlite3.DatabaseError as error:
                stands.append(str(error))
        return stands

    def marks(self, name: str, *, since: int = 0) -> Int[np.ndarray, " record"]:
        """See `Run.marks`; of a quantity that is recorded."""
        size = self.quantities[name].size
        if self._salvaged is None and self._database is not None:
            # One text: a tenth of the time that as many rows take.
            query = (
                'SELECT group_concat("update"), count(*) FROM (SELECT "update" FROM record WHERE '
                'quantity = :name AND "update" BETWEEN :since AND :until AND '
                'typeof("update") = \'integer\' ORDER BY "update" LIMIT :most)'
            )
            most = self._most(size)
            wanted = {"name": name, "since": since, "until": LAST_UPDATE, "most": most + 1}
            try:
                with bounded(self._database, self._file):
                    text, count = self._database.execute(query, wanted).fetchone()
                _check_fits(count, most)
                return np.array(text.split(",") if count else [], np.int64)
            except sqlite3.DatabaseError as error:
                self._salvage(str(error))
        whole = sorted((self._salvaged or {}).get(name, {}))
        return np.array([update for update in whole if update >= since], np.int64)

    def rows(
        self,
        name: str,
        start: int,
        count: int,
        since: int = 0,
        until: int = LAST_UPDATE,
        *,
        at: Sequence[int] | None = None,
        newest: bool = False,
    ) -> list[tuple[int, bytes]]:
        """Read records, or parts of them.

        Args:
            name: One of `quantities`.
            start: The first byte of a record to read.
            count: How many bytes of it; 0 to read none.
            since: The first update.
            until: The last update.
            at: Updates to choose from.
            newest: Whether only the last of these is wanted.

        Returns:
            Of each update whose record is whole its number and the bytes, ascending.

        Raises:
            KeyError: If no such quantity is recorded.
        """
        size = self.quantities[name].size
        if self._salvaged is None and self._database is not None:
            # `substr` reads a record up to what it takes; type and length are told without.
            part = "substr(array, :start + 1, :count)" if count else "x''"
            among = "" if at is None else 'AND "update" IN (SELECT value FROM json_each(:at)) '
            # The + has SQLite look chosen records up, rather than go through all between.
            between = '"update"' if at is None else '+"update"'
            query = (
                f'SELECT "update", {part} FROM record WHERE quantity = :name '
                f"AND {between} BETWEEN :since AND :until AND typeof(\"update\") = 'integer' "
                f"AND typeof(array) = 'blob' AND length(array) = :size {among}"
                f'ORDER BY "update" {"DESC" if newest else ""} LIMIT :most'
            )
            most = self._most(size)
            wanted = {"name": name, "start": start, "count": count, "since": since, "until": until}
            wanted |= {"size": size, "most": 1 if newest else most + 1}
            wanted |= {} if at is None else {"at": json.dumps(list(at))}
            try:
                with bounded(self._database, self._file):
                    rows = self._database.execute(query, wanted).fetchall()
                _check_fits(len(rows), most)
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

    def _connect(self) -> sqlite3.Connection | None:
        file = self._file
        if not file.is_file():
            self._problems.append(f"{RECORDS_FILE} is missing: there are no records")
            return None
        # On read-only media a log can't be opened for reading; then nobody writes there either.
        for mode in ("mode=ro", "immutable=1"):
            try:
                database = sqlite3.connect(
                    f"{file.resolve().as_uri()}?{mode}", uri=True, check_same_thread=False
                )
                with bounded(database, file):
                    # Without this SQLite refuses a cut-off file whole; the connection can't write.
                    database.execute("PRAGMA writable_schema=ON")
                    (version,) = database.execute("PRAGMA user_version").fetchone()
                    database.execute("PRAGMA trusted_schema=OFF")
                    database.execute("PRAGMA cell_size_check=ON")
                    ours = is_ours(database)
            except sqlite3.OperationalError:
                continue
            except sqlite3.DatabaseError as error:
                self._problems.append(
                    f"{RECORDS_FILE} can't be read ({error}): there are no records"
                )
                return None
            if version:  # 0 while a new file's first transaction is under way
                check_schema(self._file, version)
            if not ours:
                self._problems.append(
                    f"{RECORDS_FILE} has other tables than gradlab writes: there are no records"
                )
                return None
            return database
        self._problems.append(f"{RECORDS_FILE} can't be opened: there are no records")
        return None

    def _read_quantities(self) -> dict[str, Described]:
        found: dict[str, Described] = {}
        if self._database is None:
            return found
        try:
            with bounded(self._database, self._file):
                self._describe(self._database, found)
        except (
            *(sqlite3.DatabaseError, ValueError, TypeError, RecursionError, MemoryError),
        ) as error:
            self._problems.append(
                f"{RECORDS_FILE} is damaged ({error}): only what {len(found)} quantities recorded "
                "can be read"
            )
        return found

    def _describe(self, database: sqlite3.Connection, found: dict[str, Described]) -> None:
        """Read what describes the quantities, as far as it is whole."""
        columns = "name, dims, coordinates, dtype, unit, estimator"
        length = "+".join(f"length(CAST({column} AS BLOB))" for column in columns.split(", "))
        described = 0
        for (text,) in database.execute(f"SELECT {length} FROM quantity"):
            described += text or 0
            if described > LARGEST_INFO:
                raise ValueError("its quantities' descriptions are too large")
        for row in database.execute(f"SELECT {columns} FROM quantity ORDER BY rowid"):
            quantity = Described.read(row)
            wrong = misfit(row[0], quantity.coordinates)
            if wrong is None:
                found[row[0]] = quantity
            else:
                self._problems.append(f"{row[0]} has {wrong}: it is passed over")

    def _is_truncated(self) -> bool:
        """A database file shorter than its header says, with no log that holds the rest."""
        file = self._file
        log = file.with_name(file.name + "-wal")
        if log.exists() and log.stat().st_size:
            return False
        with file.open("rb") as handle:
            header = handle.read(100)
        page_size = int.from_bytes(header[16:18], "big")
        page_size = 65536 if page_size == 1 else page_size
        return file.stat().st_size < page_size * int.from_bytes(header[28:32], "big")

    def _most(self, size: int) -> int:
        """Tell how many records of a size there can be; pages could be used again and again."""
        return most_stored(self._file) // (size + 1) + 1

    def _salvage(self, cause: str) -> None:
        """Read the records in the order they were written, up to the first that is damaged."""
        whole: dict[str, dict[int, bytes]] = {}
        last = -1
        query = 'SELECT quantity, "update", array FROM record NOT INDEXED ORDER BY rowid'
        try:
            assert self._database is not None
            read, stored = 0, most_stored(self._file)
            with bounded(self._database, self._file):
                for name, update, data in self._database.execute(query):
                    if not (isinstance(update, int) and isinstance(data, bytes)):
                        raise sqlite3.DatabaseError("a record without content")
                    read += len(data) + 1
                    _check_fits(read, stored)
                    whole.setdefault(name, {})[update] = data
                    last = max(last, update)
        except sqlite3.DatabaseError:
            # The update that was being read when the damage was met may lack quantities.
            for records in whole.values():
                records.pop(last, None)
            last -= 1
        self._salvaged = whole
        until = f"records are whole up to update {last}" if last >= 0 else "no record is whole"
        self._problems.append(
            f"{RECORDS_FILE} is damaged ({cause}): {until}"
            + (f" of {self._planned} planned; later ones are missing" if self._planned else "")
        )

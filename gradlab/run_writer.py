"""Writing a run folder so that a kill at any moment loses at most the update in flight."""

import json
import os
import secrets
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xarray as xr
from filelock import FileLock, Timeout

from gradlab.axes import misfit
from gradlab.checks import Failed, UsageError
from gradlab.database import TABLES, bounded, check_journal, is_ours
from gradlab.quantity import Quantity
from gradlab.sinks.record import Record
from gradlab.sinks.sink import About, Forwarding, Sink
from gradlab.versions import changed, versions

SCHEMA = 1
RUN_FILE = "run.json"
RECORDS_FILE = "records.sqlite"
LOCK_FILE = "lock"
LARGEST_INFO = 4_000_000
"""Bytes of run.json, and of all that describes quantities; a training's have some thousands."""


def _known(file: Path) -> dict[str, Any]:
    """What run.json says, nothing if it is damaged."""
    try:
        info = json.loads(read_at_most(file, LARGEST_INFO))
    except (ValueError, RecursionError):
        return {}
    return info if isinstance(info, dict) else {}


_REFUSALS = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
}


def _is_refusal(error: BaseException) -> bool:
    """Whether it is the disk's, and not what a file holds."""
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, OSError) or (code is not None and code & 0xFF in _REFUSALS)


class NotWritten(Failed):
    """What the disk refuses to take; the message says which file, and why."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make one line of what a disk answers that is full, read-only or broken.

    Args:
        path: What is written to.

    Yields:
        Nothing.

    Raises:
        NotWritten: In place of the system's and the database's errors.
    """
    try:
        yield
    except Timeout:  # of a lock that another process holds, which is an OSError by its type alone
        raise
    except (OSError, sqlite3.Error) as error:
        if isinstance(error, OSError):
            cause = error.strerror
        else:  # which may be called an "I/O error" where the disk is full
            cause = f"{error} ({shutil.disk_usage(path.parent).free:,} bytes are free)"
        raise NotWritten(f"{path} can't be written: {cause}") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file so that a reader or a crash sees the old one or the new one, never a part.

    Args:
        path: The file; its folder must exist.
        data: The whole new content.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:  # follows no link that somebody put there
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_at_most(path: Path, most: int) -> bytes:
    """Read a file that somebody may have sent, as far as there is one.

    Args:
        path: The file.
        most: The most bytes that it may have.

    Returns:
        Its content.

    Raises:
        OSError: If it can't be read, as a link, which is not followed.
        ValueError: If it is no file, or larger. What has a size without taking it up on the disk,
            which any size can be written of in no time, is larger than anything.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("no file")
        # File systems that compress, or keep small files elsewhere, take less than the size, too.
        if status.st_size > most or 512 * 100 * status.st_blocks + 10**8 < status.st_size:
            raise ValueError("too large")
        return file.read(status.st_size)


def is_run(path: Path) -> bool:
    """Tell whether a folder holds a run, whole or damaged.

    Args:
        path: Any path.

    Returns:
        Whether one of a run's files stands in it.
    """
    # Not by `Path.is_file`, which raises where a path is too long or may not be looked into.
    return any(os.path.isfile(path / name) for name in (RUN_FILE, RECORDS_FILE))


def make_folder(folder: Path) -> None:
    """Make a folder for what is to be written, unless it is there.

    Args:
        folder: The folder.

    Raises:
        UsageError: If it can't be made, as below a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder} can't be made: {error.strerror}. Choose another --out."
        ) from None


def check_no_links(folder: Path) -> None:
    """Refuse a folder in which a name leads elsewhere, so that a run stays within its own.

    Args:
        folder: A run folder.

    Raises:
        UsageError: If anything in it is a link, a pipe, or whatever else is no file or folder.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UsageError(f"{folder} can't be looked into: {error.strerror}.") from None
    for name in names:
        try:
            mode = (folder / name).lstat().st_mode
        except FileNotFoundError:  # a trainer replaces its files
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            what = "link to elsewhere" if stat.S_ISLNK(mode) else "special file"
            raise UsageError(
                f"{folder / name} is a {what}, which is not followed. Remove it, or put the file "
                "itself there."
            )


def _check_free(path: Path) -> None:
    """Raise if a run is there."""
    if is_run(path):
        raise UsageError(
            f"{path} already holds a run; nothing was overwritten. Choose another --out, or "
            "add --resume to go on with it."
        )


def _not_gone_on_with(file: Path, error: Exception) -> UsageError:
    return UsageError(f"{file} can't be gone on with ({error}). Choose another --out.")


def sync(path: Path) -> None:
    """Make what was done to a file, or to the names in a folder, survive a power cut.

    Args:
        path: The file or folder.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RunWriter:
    """The one writer of a run folder.

    Holds an exclusive lock while it lives, so that a second writer is refused and a reader can
    tell a running run from one that was killed. Use as a context manager: leaving it with an
    exception marks the run as failed if this writer has described it, otherwise the state last set
    stands.

    Attributes:
        path: The run folder.
        notes: Sentences about this writer that its user should be told.
    """

    def __init__(self, path: Path, *, resume: bool = False, packages: Sequence[str] = ()) -> None:
        """Lock a run folder to write into it.

        Args:
            path: The folder.
            resume: Go on with what is there.
            packages: Distributions whose versions are recorded as well, as an environment's.

        Raises:
            UsageError: If a run is there (but for `resume`), another writes it, or it can't be
                gone on with.
        """
        if not resume:
            _check_free(path)
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file; a run needs a folder. Choose another --out.")
        make_folder(path)
        check_no_links(path)
        self.path = path
        self.notes: list[str] = []
        self._lock = FileLock(path / LOCK_FILE)
        try:
            # A reader that looks whether somebody writes holds the lock for an instant.
            with writing(path / LOCK_FILE):
                self._lock.acquire(timeout=0.5, poll_interval=0.02)
        except Timeout:
            raise UsageError(
                f"{path} is being written by another process. Wait for it, or choose another --out."
            ) from None
        self._described = False
        self._forwarding: Forwarding | None = None
        self._info: dict[str, Any] = {"schema": SCHEMA, "id": secrets.token_hex(8)}
        try:
            if (path / RUN_FILE).is_file():
                self._info |= _known(path / RUN_FILE)
            own = versions(*packages)
            if differing := changed(self._info.get("versions"), own):
                self.notes.append(
                    f"{path} was begun with {', '.join(differing)}: what follows may differ from "
                    "what that would have done."
                )
            self._info["versions"] = own
            if not resume:
                _check_free(path)  # another may have come and gone meanwhile
            self._open()
        except UsageError:
            self._lock.release()
            raise
        except (OSError, sqlite3.DatabaseError, ValueError, TypeError, RecursionError) as error:
            self._lock.release()
            with writing(path / RECORDS_FILE):
                if _is_refusal(error):
                    raise
            raise _not_gone_on_with(path / RECORDS_FILE, error) from None

    def _open(self) -> None:
        file = self.path / RECORDS_FILE
        check_journal(file)
        # Autocommit mode: transactions are opened and closed by hand, one for each update.
        self._database = sqlite3.connect(file, isolation_level=None)
        with bounded(self._database, file):
            (mode,) = self._database.execute("PRAGMA journal_mode=WAL").fetchone()
            if mode != "wal":
                self.notes.append(
                    f"{self.path} is on a file system without write-ahead logging (journal mode "
                    f"{mode!r}): a live reader may have to wait for the writer."
                )
            self._database.execute("PRAGMA synchronous=NORMAL")
            if not is_ours(self._database):  # before anything of it is evaluated
                raise ValueError("it has other tables than gradlab writes")
            self._database.executescript(TABLES)
            self._database.execute(f"PRAGMA user_version={SCHEMA}")
            self._shapes = {
                name: (tuple(json.loads(dims)), np.dtype(dtype), json.loads(coordinates))
                for name, dims, dtype, coordinates in self._database.execute(
                    "SELECT name, dims, dtype, coordinates FROM quantity"
                )
            }

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is not None and self._described:
                with suppress(NotWritten):  # what it failed with says more
                    self.describe(state="failed", error=f"{type(error).__name__}: {error}")
        finally:
            self._database.close()
            self._lock.release()
            if self._forwarding is not None:
                state = str(self._info.get("state"))
                self._forwarding.close("stopped" if state == "running" else state)

    def describe(self, **info: Any) -> None:  # noqa: ANN401 -- whatever JSON can hold
        """Add to, or replace in, what run.json says.

        Args:
            **info: Entries that JSON can hold, e.g. `state="done"`. A state comes with its own
                `error`, or none: that of an earlier state goes.

        Raises:
            NotWritten: If the disk refuses; what run.json said before is then still there.
        """
        if "state" in info:
            self._info.pop("error", None)
        self._info |= info
        self._described = True
        text = json.dumps(self._info, indent=2, sort_keys=True) + "\n"
        with writing(self.path / RUN_FILE):
            write_atomically(self.path / RUN_FILE, text.encode())

    def forward(
        self, sinks: Sequence[Sink], first: int, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        """Hand what is recorded from now on to sinks as well, until this writer ends.

        Args:
            sinks: The sinks; they are opened with what run.json says now.
            first: The update that is recorded next.
            tell: Given a sentence for each sink that fails.
        """
        if sinks:
            about = About(folder=self.path, info=dict(self._info), first=first)
            self._forwarding = Forwarding(sinks, about, tell)

    def write(self, update: int, values: Mapping[str, Quantity | xr.DataArray]) -> None:
        """Record the quantities of one update in one transaction.

        Args:
            update: Number of the update, from 0; each quantity may be recorded once per update.
            values: Quantities by name, or labelled arrays whose attributes `unit` and `estimator`
                are kept. A quantity's axes, labels and type are those of its first record.

        Raises:
            UsageError: If a quantity's axes or labels differ from those of its first record, or
                from those that gradlab itself records under its name.
            NotWritten: If the disk refuses; then nothing of this update is recorded.
        """
        quantities = {
            name: Quantity.of(value) if isinstance(value, xr.DataArray) else value
            for name, value in values.items()
        }
        with writing(self.path / RECORDS_FILE):
            self._insert(update, quantities)
        if self._forwarding is not None:
            self._forwarding.write(Record(update=update, quantities=quantities))

    def discard_after(self, update: int) -> None:
        """Drop the records of all updates after one, to be made again.

        Args:
            update: The last update to keep; -1 drops all.

        Raises:
            NotWritten: If the disk refuses.
        """
        file = self.path / RECORDS_FILE
        with writing(file), bounded(self._database, file):
            self._database.execute('DELETE FROM record WHERE "update" > ?', (update,))

    def sync(self) -> None:
        """Wait until the disk has all that was recorded, for what is to rely on it.

        Otherwise only a power cut, or a machine that breaks down, loses the last records.

        Raises:
            NotWritten: If the disk refuses.
        """
        # Only the log: closing another handle of the database itself would let go of its locks.
        # What is not in the log SQLite has synced.
        log = self.path / f"{RECORDS_FILE}-wal"
        if log.exists():
            with writing(log):
                sync(log)

    def newest_update(self) -> int:
        """Look up how far the records go.

        Returns:
            The last update of which anything is recorded; -1 if nothing is.

        Raises:
            UsageError: If that can't be told.
        """
        file = self.path / RECORDS_FILE
        try:
            with bounded(self._database, file):
                query = 'SELECT max("update") FROM record'
                (last,) = self._database.execute(query).fetchone()
        except sqlite3.DatabaseError as error:
            raise _not_gone_on_with(file, error) from None
        return -1 if last is None else int(last)

    def _insert(self, update: int, quantities: Mapping[str, Quantity]) -> None:
        self._database.execute("BEGIN")
        known = set(self._shapes)
        try:
            for name, quantity in quantities.items():
                self._define(name, quantity)
                dtype = self._shapes[name][1]
                data = np.ascontiguousarray(quantity.values, dtype=dtype).tobytes()
                self._database.execute("INSERT INTO record VALUES (?, ?, ?)", (name, update, data))
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:  # a full disk has undone it already
                self._database.execute("ROLLBACK")
            self._shapes = {name: self._shapes[name] for name in known}
            raise

    def _define(self, name: str, quantity: Quantity) -> None:
        dims = quantity.dims
        coordinates = {dim: list(quantity.coords[dim]) for dim in dims}
        if name in self._shapes:
            known_dims, _, known_coordinates = self._shapes[name]
            if (dims, coordinates) != (known_dims, known_coordinates):
                raise UsageError(
                    f"`{name}` must keep its axes {known_dims} and their labels. Got {dims} with "
                    f"{coordinates}, first recorded with {known_coordinates}."
                )
            return
        wrong = misfit(name, coordinates)
        if wrong is not None:
            raise UsageError(f"`{name}` has {wrong}. Record it under another name.")
        dtype = quantity.values.dtype.newbyteorder("<")
        row = (
            name,
            json.dumps(dims),
            json.dumps(coordinates),
            dtype.str,
            quantity.unit,
            quantity.estimator,
        )
        self._database.execute("INSERT INTO quantity VALUES (?, ?, ?, ?, ?, ?)", row)
        self._shapes[name] = (dims, dtype, coordinates)

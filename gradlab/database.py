"""The database of a run's records: what it is made by, and how one from anybody is opened."""

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from gradlab.checks import UsageError

# A reader takes records from tables that were made so, and from no others.
TABLES = """
CREATE TABLE IF NOT EXISTS quantity (
    name TEXT PRIMARY KEY,
    dims TEXT NOT NULL,         -- JSON list of axis names
    coordinates TEXT NOT NULL,  -- JSON object: axis name -> list of labels
    dtype TEXT NOT NULL,        -- NumPy's name, little-endian
    unit TEXT NOT NULL,
    estimator TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS record (
    quantity TEXT NOT NULL REFERENCES quantity (name),
    "update" INTEGER NOT NULL,
    array BLOB NOT NULL         -- C order
);
CREATE UNIQUE INDEX IF NOT EXISTS record_by_quantity ON record (quantity, "update");
"""

_MEANWHILE = 10**6  # bytes that are written between a look at the files and one at the records
_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
_STEP = 10_000  # of SQLite's virtual machine, between two looks at how far it may go
_STEPS_PER_BYTE = 20  # A record takes tens of bytes on the disk, and a query tens of steps for it.


def _written_as(database: sqlite3.Connection) -> set[tuple[str | None, ...]]:
    """Of all that a database has: type, name, table, and statement without comments and breaks."""
    rows = database.execute("SELECT type, name, tbl_name, sql FROM sqlite_master")
    return {
        (*names, sql and " ".join(re.sub("--.*", "", str(sql)).split())) for *names, sql in rows
    }


def _ours() -> set[tuple[str | None, ...]]:
    with closing(sqlite3.connect(":memory:")) as database:
        database.executescript(TABLES)
        return _written_as(database)


_OURS = _ours()


def is_ours(database: sqlite3.Connection) -> bool:
    """Tell whether a database has nothing that gradlab does not make, as far as it is made yet.

    By whatever name, of which SQLite takes one in upper case for the same: a view or a computed
    column in a table's place could hold whoever reads it up for ever or fill the memory, and a
    trigger change what is written.

    Args:
        database: An open database.

    Returns:
        Whether all tables, indexes, views and triggers are gradlab's.
    """
    return _written_as(database) <= _OURS


def check_journal(file: Path) -> None:
    """Refuse a database beside which a journal names another file, before it is written to.

    Whoever opens such a database to write, SQLite has roll it back and then delete the file that
    the journal's end names, wherever it is: that is how it ends what was done to several databases
    at once, which gradlab never does.

    Args:
        file: The database, which need not be there.

    Raises:
        UsageError: If there is such a journal.
    """
    journal = file.with_name(f"{file.name}-journal")
    try:
        with journal.open("rb") as opened:
            opened.seek(-len(_JOURNAL_MAGIC), 2)
            names_another = opened.read() == _JOURNAL_MAGIC
    except (OSError, ValueError):
        return  # none, or too short to name anything
    if names_another:
        raise UsageError(
            f"{journal} names a file for SQLite to delete, which gradlab never writes. Remove it, "
            "or choose another --out."
        )


def status_of(file: Path) -> os.stat_result | None:
    """Look a file up.

    Args:
        file: Its path.

    Returns:
        Its size, times and so on; None if it can't be looked up.
    """
    try:
        return file.stat()
    except OSError:
        return None


def most_stored(file: Path) -> int:
    """Tell how many bytes of records a database can hold.

    Args:
        file: The database.

    Returns:
        Bytes of it and of its log, as far as they can be looked up, and of what may be written
        meanwhile.
    """
    names = (file.name, f"{file.name}-wal")
    statuses = (status_of(file.with_name(name)) for name in names)
    return _MEANWHILE + sum(status.st_size for status in statuses if status is not None)


@contextmanager
def bounded(database: sqlite3.Connection, file: Path) -> Iterator[None]:
    """End what is asked of a database meanwhile once it takes longer than its file can need.

    Pages that refer to each other make more rows of a few kilobytes than could ever be counted.

    Args:
        database: The database.
        file: Where it is.

    Yields:
        Nothing.

    Raises:
        DatabaseError: Of sqlite3, if a statement goes further than that.
    """
    left = most_stored(file) * _STEPS_PER_BYTE // _STEP

    def go_no_further() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    database.set_progress_handler(go_no_further, _STEP)
    try:
        yield
    except sqlite3.OperationalError:
        if left < 0:
            raise sqlite3.DatabaseError("it has more rows than its bytes can hold") from None
        raise
    finally:
        database.set_progress_handler(None, 0)

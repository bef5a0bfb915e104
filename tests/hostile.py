"""Run folders as somebody could send them: a real one, damaged in ways that are drawn."""

import json
import os
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

from hypothesis import strategies as st

NUMBERS = st.sampled_from([0, -1, 1, 2, 10**9, 2**63 - 1, 2**63, -(2**63), 10**400, 1e308, -0.5])
NAMES = st.sampled_from([
    *("", "all", "actor", "cosine", "update", "agent", "../../outside/secret", "/etc/passwd"),
    *(
        "\x00",
        "\ud800",
        "<script>alert(1)</script>",
        "nan",
        "__class__",
        "os:system",
        "a" * 100_000,
    ),
    *("vmas/navigation", "hypermarl", "nops", "fups-id", "matd3", "gru", "off", "<f8", "|O", "V0"),
])
PLAIN = st.one_of(
    NUMBERS, NAMES, st.none(), st.booleans(), st.sampled_from([float("nan"), float("inf")])
)
NESTED = st.sampled_from(["[" * 50_000, "[" * 500 + "]" * 500, '{"a":' * 500 + "1" + "}" * 500])
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=2)),
    max_leaves=5,
)
SQL = st.sampled_from([
    "DELETE FROM quantity",
    "DELETE FROM record",
    "DROP TABLE quantity",
    "DROP TABLE record",
    "DROP INDEX record_by_quantity; INSERT INTO record SELECT * FROM record",
    "DROP TABLE record; CREATE VIEW record AS WITH RECURSIVE r(a) AS (SELECT 1 UNION ALL "
    "SELECT a + 1 FROM r) SELECT 'cosine' quantity, a \"update\", zeroblob(1000000) array FROM r",
    "DROP TABLE quantity; CREATE TABLE quantity (name, dims, coordinates, dtype, unit, estimator "
    "AS (hex(zeroblob(400000000))))",
    "CREATE TRIGGER t BEFORE DELETE ON record BEGIN UPDATE quantity SET dims = '[]'; END",
    "CREATE TRIGGER t AFTER INSERT ON RECORD BEGIN UPDATE record SET array = zeroblob(8); END",
    # Not an endless one, which a further damage would read to the end itself.
    "DROP TABLE record; DROP TABLE quantity; CREATE VIEW QUANTITY AS SELECT 'cosine' name, "
    "'[]' dims, '{}' coordinates, '<f8' dtype, hex(zeroblob(1000000)) unit, '' estimator",
    "ALTER TABLE record ADD COLUMN more",
    "PRAGMA user_version = 99",
    'UPDATE record SET "update" = "update" + 0.5',
    'UPDATE record SET "update" = "update" + 9223372036854775000',
    'UPDATE record SET "update" = \'a\' || "update"',
    "UPDATE record SET array = substr(array, 2)",
    "UPDATE record SET array = 'text'",
    "UPDATE record SET array = randomblob(length(array))",
    "UPDATE record SET array = zeroblob(length(array))",
    "UPDATE quantity SET dims = '[]', coordinates = '{}'",
    "UPDATE quantity SET name = name || ' '",
])
PAGE = 4096


def looped(file, name):
    """Put pages that refer to each other in the place of a table's or an index' only one.

    Args:
        file: A database without a log whose table or index has a single page.
        name: The table or index, which then has 300 ** 12 times the rows.
    """
    with closing(sqlite3.connect(file)) as database:
        query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        (root,) = database.execute(query, (name,)).fetchone()
    content = bytearray(file.read_bytes())
    leaf = bytes(content[(root - 1) * PAGE : root * PAGE])
    is_table = leaf[0] == 13
    assert is_table or leaf[0] == 10
    key = b"\x01" if is_table else leaf[struct.unpack(">H", leaf[8:10])[0] :]

    def interior(child):
        cell = struct.pack(">I", child) + key
        at, page = PAGE - len(cell), bytearray(PAGE)
        page[at:] = cell
        page[:12] = struct.pack(">BHHHBI", 5 if is_table else 2, 0, 300, at, 0, child)
        page[12:612] = struct.pack(">H", at) * 300
        return page

    content += leaf
    for _ in range(11):
        content += interior(len(content) // PAGE)
    content[(root - 1) * PAGE : root * PAGE] = interior(len(content) // PAGE)
    content[28:32] = struct.pack(">I", len(content) // PAGE)
    file.write_bytes(content)


def journal_naming(path, pages):
    """A journal that changes nothing, and names a file for SQLite to delete in the end.

    Args:
        path: The file.
        pages: Of the database.

    Returns:
        Its content.
    """
    magic, name = bytes.fromhex("d9d505f920a163d7"), str(path).encode()
    head = (magic + struct.pack(">IIIII", 0, 0, pages, 512, PAGE)).ljust(512, b"\0")
    end = struct.pack(">II", len(name), sum(name)) + magic
    return head + struct.pack(">I", 2**30 // PAGE + 1) + name + end


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
)
"""Thirteen lines of YAML that stand for billions of values."""
COLUMNS = ("name", "dims", "coordinates", "dtype", "unit", "estimator")


def content(folder):
    """What a folder holds: bytes by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def put(files, folder):
    """Write what `damaged` drew."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, str):
            path.symlink_to(data)
        else:
            path.write_bytes(data)


@st.composite
def damaged(draw, files, scratch, ways):
    """The files of a run with one to three things wrong; a link is a string, where it leads.

    Args:
        files: What `content` found.
        scratch: A file to make databases in.
        ways: Which things, names in `WAYS`.
    """
    files = dict(files)
    for _ in range(draw(st.integers(1, 3))):
        draw(WAYS[draw(st.sampled_from(ways))](files, scratch))
    return files


def _some(draw, files, suffix=""):
    names = [n for n, data in files.items() if n.endswith(suffix) and isinstance(data, bytes)]
    return draw(st.sampled_from(names)) if names else None


@st.composite
def _bits(draw, files, _):
    name = _some(draw, files)
    if name is None or not files[name]:
        return
    data = bytearray(files[name])
    # the beginnings hold what says how the rest is to be read
    for _ in range(draw(st.integers(1, 8))):
        end = draw(st.sampled_from([100, 4096, len(data)]))
        data[draw(st.integers(0, min(end, len(data)) - 1))] = draw(st.integers(0, 255))
    files[name] = bytes(data)


@st.composite
def _cut(draw, files, _):
    name = _some(draw, files)
    if name is not None:
        files[name] = files[name][: draw(st.integers(0, len(files[name])))]


@st.composite
def _lost(draw, files, _):
    name = draw(st.sampled_from(sorted(files))) if files else None
    files.pop(name, None)


@st.composite
def _swapped(draw, files, _):
    one, other = _some(draw, files), _some(draw, files)
    if one is not None:
        files[one], files[other] = files[other], files[one]


@st.composite
def _linked(draw, files, _):
    name = draw(st.sampled_from([*sorted(files), "lock", "records.sqlite-wal", ".run.json.1.tmp"]))
    files[name] = draw(st.sampled_from(["../outside/secret", "/dev/zero", ".", "nothing"]))


@st.composite
def _field(draw, files, _):
    name = _some(draw, files, ".json")
    if name is None:
        return
    try:
        document = json.loads(files[name])
    except (ValueError, RecursionError):
        return
    if draw(st.integers(0, 9)) == 0:
        files[name] = draw(NESTED).encode()
        return
    parent, key, at = None, None, document
    while isinstance(at, dict | list) and at and (parent is None or draw(st.integers(0, 3))):
        key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        parent, at = at, at[key]
    if parent is not None:
        parent[key] = draw(VALUES)
    files[name] = json.dumps(document).encode()


@st.composite
def _row(draw, files, scratch):
    """A database whose rows or tables are others, whole as a database."""
    name = "records.sqlite"
    if not isinstance(files.get(name), bytes):
        return
    scratch.write_bytes(files[name])
    with closing(sqlite3.connect(scratch, isolation_level=None)) as database:
        try:
            database.execute("PRAGMA journal_mode=MEMORY")
            if draw(st.booleans()):
                database.executescript(draw(SQL))
            else:
                known = [row[0] for row in database.execute("SELECT name FROM quantity")]
                column = draw(st.sampled_from(COLUMNS))
                value = draw(VALUES)
                if column in {"dims", "coordinates"} or not isinstance(value, str | float | None):
                    value = _near(draw, database, column, value)
                database.execute(
                    f"UPDATE quantity SET {column} = ? WHERE name = ?",
                    (value, draw(st.sampled_from(known)) if known else ""),
                )
        except (sqlite3.Error, UnicodeError):
            pass
    files[name] = scratch.read_bytes()


def _near(draw, database, column, value):
    """Something that is nearly what a column holds."""
    rows = [row[0] for row in database.execute(f"SELECT {column} FROM quantity")]
    text = draw(st.sampled_from(rows)) if rows else ""
    way = draw(st.integers(0, 2))
    if way == 0:
        return text  # that of another
    if way == 1:
        return json.dumps(value)
    try:
        document = json.loads(text)
    except (ValueError, TypeError):
        return text
    if isinstance(document, dict) and document:
        axis = draw(st.sampled_from(sorted(document)))
        document[axis] = draw(
            st.sampled_from([value, [value], list(range(3000)), document[axis] * 2, []])
        )
    elif isinstance(document, list) and document:
        document[draw(st.integers(0, len(document) - 1))] = value
    return json.dumps(document)


@st.composite
def _header(draw, files, _):
    """Tensors of other names, types, sizes or places; a header of another length."""
    name = _some(draw, files, ".safetensors")
    if name is None or len(files[name]) < 8:
        return
    (length,) = struct.unpack("<Q", files[name][:8])
    head, data = files[name][8 : 8 + length], files[name][8 + length :]
    try:
        document = json.loads(head)
        tensor = document[draw(st.sampled_from(sorted(document)))]
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        tensor[key] = draw(
            st.sampled_from([[2**62], [10**12, 10**12], [0, 2**40], [], [1, 0], "F64", "I8"])
        )
        head = json.dumps(document).encode()
    except (ValueError, TypeError, AttributeError):
        return
    length = draw(st.sampled_from([len(head), len(head), 0, 2**40, 2**64 - 1]))
    files[name] = struct.pack("<Q", length) + head + data


WAYS = {
    "bits": _bits,
    "cut": _cut,
    "lost": _lost,
    "swapped": _swapped,
    "linked": _linked,
    "field": _field,
    "row": _row,
    "header": _header,
}


def unchanged(folder):
    """What would differ had somebody written there."""
    return {
        path: (os.lstat(path).st_mtime_ns, os.lstat(path).st_size) for path in folder.rglob("*")
    }

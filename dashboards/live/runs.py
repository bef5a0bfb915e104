"""The runs that a server may show: those in the folders that it was given, and no others."""

import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from analyses.listing import last_number
from dashboards.text import clean
from gradlab.checks import UsageError
from gradlab.run import Run, open_run, runs_below
from gradlab.run_writer import RECORDS_FILE, RUN_FILE

Row = dict[str, Any]
"""One run in the list, as JSON: see `RunIndex.rows`."""

_FRESH = 0.5  # seconds for which a look at the folders serves all who ask
_FILES = (RUN_FILE, RECORDS_FILE, f"{RECORDS_FILE}-wal")


class RunIndex:
    """Runs by name, found again while they come and go.

    A name that a browser sends is looked up among those that were found; it never becomes a path.
    Links below the folders are not followed, so that a run folder from somebody else shows nothing
    but itself.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        """Look for runs.

        Args:
            folders: Run folders, or folders that hold runs at any depth.

        Raises:
            UsageError: If a folder does not exist or holds no run.
        """
        for folder in folders:
            if not folder.exists():
                raise UsageError(
                    f"{folder} does not exist. `gradlab runs` lists the runs there are."
                )
            if next(runs_below(folder), None) is None:
                raise UsageError(
                    f"{folder} holds no run. Name a run's folder, or a folder with runs in it."
                )
        self._folders = list(folders)
        self._lock = Lock()
        self._found: dict[str, Path] = {}
        self._looked = -math.inf
        self._rows: dict[Path, tuple[object, Row]] = {}

    def paths(self) -> dict[str, Path]:
        """Find the runs that there are now.

        Returns:
            Folders by name: below the folder that was given, or its own name if it is a run.
        """
        with self._lock:
            if time.monotonic() - self._looked > _FRESH:
                self._found = _named([
                    (top, run) for top in self._folders for run in runs_below(top)
                ])
                self._looked = time.monotonic()
            return self._found

    def open(self, name: str) -> Run:
        """Open a run.

        Args:
            name: Its name, from anybody.

        Returns:
            The run.

        Raises:
            UsageError: If there is no such run here, or it can't be read.
        """
        path = self.paths().get(name)
        if path is None:
            raise UsageError(f"There is no run {clean(name)[:200]!r} here.")
        return open_run(path)

    def rows(self) -> list[Row]:
        """List the runs; one that has not changed is not read again.

        Returns:
            For each run its `name`, `method`, `environment`, `agents`, `seed`, `frames`, `return`
            (of the episodes that ended last), `evaluation` (return of the last one), `state`, the
            time of the last change `changed` (seconds since 1970), and `problem`, a sentence if
            anything is missing or damaged. What is not known is None.
        """
        found = self.paths()
        with self._lock:
            kept = {}
            for path in found.values():
                stamp = _stamp(path)
                known = self._rows.get(path)
                # Whether a writer still lives is not written in any file.
                stands = known and known[0] == stamp and known[1]["state"] != "running"
                kept[path] = known if known and stands else (stamp, _row(path))
            self._rows = kept
            return [{"name": name, **kept[path][1]} for name, path in found.items()]


def _named(found: Sequence[tuple[Path, Path]]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for top, run in found:
        own = clean(top.resolve().name)
        below = clean(run.relative_to(top).as_posix())
        longer = own if below == "." else f"{own}/{below}"
        name = next(name for name in (own if below == "." else below, longer) if name)
        if name in named:
            name = longer
        number = 2
        while name in named:
            name, number = f"{longer} #{number}", number + 1
        named[name] = run
    return named


def _stamp(path: Path) -> list[object]:
    """What differs once a file has changed; a reader makes an empty log, which is no change."""
    stats = [_status(path / file) for file in _FILES]
    return [(s.st_ino, s.st_mtime_ns, s.st_size) if s and s.st_size else None for s in stats]


def _status(file: Path) -> os.stat_result | None:
    try:
        return file.lstat()
    except OSError:
        return None


def _row(path: Path) -> Row:
    row: Row = dict.fromkeys((
        "method",
        "environment",
        "agents",
        "seed",
        "frames",
        "return",
        "evaluation",
        "changed",
    ))
    try:
        run = open_run(path)
        return row | {
            "method": clean(run.method),
            "environment": clean(run.environment),
            "agents": _count(run.info.get("agents")),
            "seed": _count(run.info.get("seed")),
            "frames": _finite(last_number(run, "frames")),
            "return": _finite(last_number(run, "episode_return")),
            "evaluation": _finite(last_number(run, "evaluation_return")),
            "changed": _changed(path),
            "state": clean(run.state),
            "problem": "; ".join(dict.fromkeys(map(clean, [*run.problems, *_failure(run)]))),
        }
    except UsageError as error:
        return row | {"state": "unreadable", "problem": clean(error)}
    except Exception as error:
        # Whatever stands in a folder that somebody sent, the other runs are listed.
        logging.getLogger(__name__).exception("%s could not be read", path)
        return row | {"state": "unreadable", "problem": clean(f"{type(error).__name__}: {error}")}


def _failure(run: Run) -> list[str]:
    error = run.info.get("error")
    return [f"training failed: {error}"] if run.state == "failed" and error else []


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and abs(value) < 2**53 else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _changed(path: Path) -> float:
    stats = [_status(path / file) for file in _FILES]
    return max((s.st_mtime for s in stats if s and s.st_size), default=0.0)

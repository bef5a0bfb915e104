"""A view of some runs that keeps up with whoever writes them."""

import json
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from threading import RLock
from typing import Any

from dashboards.choices import Choices
from dashboards.live.heap import give_back
from dashboards.live.runs import RunIndex
from dashboards.page import page_body, page_data
from dashboards.panel import Figure, Part
from dashboards.style import nothing
from dashboards.tables import Limits
from dashboards.view import View
from gradlab.checks import UsageError
from gradlab.run import Run
from gradlab.run_writer import RECORDS_FILE

_FRESH = 0.9  # of the time until it asks again, a look at the run folders is new to who asks
_ABOVE = '<nav class="nav"><a href="/">All runs</a></nav>'
_KEPT = 32_000_000  # characters of figures' parts
LIVE = Limits(updates=2000, read=2000)
"""However long a run grows, as much of it is read, kept and drawn again with each update."""


class Watched:
    """Some runs, looked at by any number of browsers.

    What is read and drawn is kept until a run changes, and then only what is new is read.
    """

    def __init__(self, index: RunIndex, names: Sequence[str]) -> None:
        """Open the runs.

        Args:
            index: Finds them.
            names: Their names, from anybody.

        Raises:
            UsageError: If there is no such run, or it can't be read.
        """
        self._index = index
        self._names = list(names)
        self._lock = RLock()
        self._runs = [index.open(name) for name in names]
        self._files = [_identity(run) for run in self._runs]
        self._versions = [run.version() for run in self._runs]
        self._view = View(self._runs, LIVE)
        self._looked = time.monotonic()
        self._drawn: OrderedDict[object, str] = OrderedDict()
        self._size = 0
        self._page = ""
        self.generation = 0

    def refresh(self, pause: float) -> int:
        """Look whether anything was written, at next to no cost if nothing was.

        Args:
            pause: Seconds until whoever asks will ask again. Where many do, each seldom, all of
                them are shown the same updates, so that these are read and drawn once.

        Returns:
            How often anything was.
        """
        # Whoever asks while a figure is being drawn is told at the next time of asking.
        if not self._lock.acquire(timeout=0.1):
            return self.generation
        try:
            if time.monotonic() - self._looked > _FRESH * pause:
                self._look()
                self._looked = time.monotonic()
            return self.generation
        finally:
            self._lock.release()

    def page(self) -> str:
        """Say what the page shows beside its figures.

        Returns:
            JSON with `html` and `page`, what the script has to know.
        """
        with self._lock:
            if not self._page:
                html = page_body(self._view, _ABOVE)
                self._page = _json({"html": html, "page": page_data(self._view)})
            return self._page

    def figures(self, query: str, parts: Sequence[Any]) -> list[str]:
        """Draw parts of panels.

        Args:
            query: What is chosen, as in an address; from anybody.
            parts: Panels' names and numbers of their parts; from anybody.

        Returns:
            For each part JSON with `figure` and `update`, the update that is drawn if it is one of
            several; "null" for what there is not.
        """
        with self._lock:
            choices = self._view.choices(query)
            panels = self._view.panels
            texts = []
            for name, number in parts:
                panel = panels.get(name)
                if panel is None or not 0 <= number < len(panel.parts):
                    texts.append("null")
                    continue
                part = panel.parts[number]
                at = part.at(choices)
                key = (name, number, *(getattr(at, depends) for depends in part.depends))
                if key not in self._drawn:
                    dated = "update" in part.depends and part.updates and part.updates(choices)
                    text = _json({
                        "figure": _drawn(part, at, whole=number == 0),
                        "update": at.update if dated else None,
                    })
                    self._drawn[key] = text
                    self._size += len(text)
                self._drawn.move_to_end(key)
                texts.append(self._drawn[key])
            while self._size > _KEPT:
                self._size -= len(self._drawn.popitem(last=False)[1])
            return texts

    def _look(self) -> None:
        before: View | None = self._view
        changed = False
        for number, name in enumerate(self._names):
            if self._runs[number].version() == self._versions[number]:
                continue
            try:
                run = self._index.open(name)
            except UsageError:
                continue  # gone, or being replaced: what was read of it stays in sight
            file = _identity(run)
            if file != self._files[number]:
                before = None  # another training's records
            self._runs[number], self._files[number] = run, file
            self._versions[number] = run.version()
            changed = True
        if changed:
            self._view = View(self._runs, LIVE, before)
            self._drawn.clear()
            self._size = 0
            self._page = ""
            self.generation += 1
            give_back()


def _drawn(part: Part, choices: Choices, *, whole: bool) -> Figure:
    try:
        return part.draw(choices)
    except Exception:
        # Whatever stands in a run folder that somebody sent, the other panels are still of use.
        logging.getLogger(__name__).exception("a panel could not be drawn")
        return nothing("this could not be drawn: see what the server printed") if whole else {}


def _json(value: object) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _identity(run: Run) -> int | None:
    try:
        return (run.path / RECORDS_FILE).stat().st_ino
    except OSError:
        return None

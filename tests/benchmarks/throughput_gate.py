"""How a measured process is told to do one rollout and one update at a time, and says what it took.

Only the standard library, so that what a process measures has loaded nothing else.
"""

import json
import sys
import time

MARK = "measured:"
"""Begins the lines that are answers: libraries print as well."""


class Gate:
    """Waits for a line on standard input before each measured stretch; answers with its cost."""

    def __init__(self):
        self._began = self._collected = None

    def collected(self):
        self._collected = self._now()

    def updated(self):
        """End the stretch, answer, and wait; returns only when another one is asked for."""
        now = self._now()
        if self._began is not None:
            self._answer({
                kind: {"collection": middle - first, "training": last - middle}
                for kind, first, middle, last in zip(
                    ("cpu", "wall"), self._began, self._collected or now, now, strict=True
                )
            })
        else:
            self._answer("ready")
        if not sys.stdin.readline():
            sys.exit(0)
        self._began = self._now()

    def _now(self):
        return time.process_time(), time.perf_counter()

    def _answer(self, what):
        print(MARK, json.dumps(what), flush=True)

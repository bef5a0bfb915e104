"""A run's records as panels read them: by label, thinned for drawing, each read once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import xarray as xr

from analyses.curves import evenly_spaced
from analyses.groups import agent_returns, goals, kinds
from analyses.similarity import clusters
from dashboards.colours import Mark, agent_marks
from dashboards.panel import earlier
from dashboards.text import agent_names
from dashboards.thinned import Thinned, read_thinned
from gradlab.run import Run

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of a long run is drawn; its records are never touched.

    Attributes:
        updates: The most updates that the slider stops at.
        read: The most updates at which a quantity is read: see `dashboards.thinned`.
        cells: The most cells of a run's matrices, over all of its stops; at least 8 stops stay.
        points: The most points of a line.
        history: The most numbers of all pairs' histories.
        held: The most bytes of a quantity that are kept; a larger one is read when it is looked at.
    """

    updates: int = 1_000_000
    read: int = 10**12
    cells: int = 10**12
    points: int = 1000
    history: int = 10**12
    held: int = 16_000_000


ALL = Limits()
"""For a notebook, which asks for one figure at a time."""

_CLOCK = "frames"  # places all else in time
_TOLD = 20_000  # of its records that were looked up one by one
MOST_AGENTS = 1000  # all pairs of which can be chosen from
DATED = ("cosine", "embedding_actor", "embedding_critic", "snd")
"""Quantities whose updates the slider stops at."""


class RunTables:
    """One run's records.

    Attributes:
        run: The run.
        mark: The run's name and colour.
        limits: How much is drawn.
    """

    def __init__(
        self, run: Run, mark: Mark, limits: Limits = ALL, before: "RunTables | None" = None
    ) -> None:
        """Read nothing yet.

        Args:
            run: The run.
            mark: The run's name and colour.
            limits: How much to draw.
            before: The same run when it was shorter; what was read of it is not read again.
        """
        self.run = run
        self.mark = mark
        self.limits = limits
        self._read: dict[str, Thinned] = {}
        # Given away by a table that is not read any more, and by this one as it is read again:
        # else all that is held would be held twice.
        self._before = before._read if before is not None else {}
        self._told: dict[int, float] = before._told if before is not None else {}
        self._places: dict[str, dict[str, dict[Any, int]]] = {}
        self._kept: dict[object, Any] = {}

    def array(self, quantity: str) -> xr.DataArray | None:
        """Read a quantity at the updates that are looked at.

        Args:
            quantity: Its name.

        Returns:
            The quantity, whose axes are those of `gradlab.axes` if its name is there; None if it is
            missing or empty. One that is large is read when, and as far as, it is looked at.
        """
        if quantity not in self.run.quantities:
            return None
        agents = len(self.run.axes(quantity).get("agent", ()))
        if agents > MOST_AGENTS:
            problem = f"{quantity} is of {agents:,} agents: at most {MOST_AGENTS:,} can be shown"
            if problem not in self.run.problems:
                self.run.problems.append(problem)
            return None
        array = self._known(quantity).array
        return array if array.size else None

    def values(self, quantity: str, **where: object) -> np.ndarray | None:
        """Look numbers up by label.

        Args:
            quantity: Its name.
            **where: A label for each axis to fix, `update` among them or not.

        Returns:
            An array over the remaining axes in order; None if the quantity, an axis or a label is
            missing.
        """
        array = self.array(quantity)
        if array is None:
            return None
        if quantity not in self._places:
            self._places[quantity] = {
                str(dim): {label: n for n, label in enumerate(array[dim].to_numpy().tolist())}
                for dim in array.dims[1:]
            }
        places = self._places[quantity]
        if not where.keys() <= {"update", *places}:
            return None
        at = {dim: places[dim].get(label, -1) for dim, label in where.items() if dim != "update"}
        if "update" in where:
            at["update"] = _place(array["update"].to_numpy(), where["update"])
        if -1 in at.values():
            return None
        if not self._read[quantity].held:
            return np.asarray(array.isel(at).to_numpy())
        # A tenth of what xarray takes for the same, and a page asks for thousands.
        return np.asarray(
            array.to_numpy()[tuple(at.get(dim, slice(None)) for dim in ("update", *places))]
        )

    def count(self, quantity: str) -> int:
        """Count a quantity's records.

        Args:
            quantity: Its name.

        Returns:
            At how many updates it was recorded, read or not; 0 if there is no such quantity.
        """
        return self._known(quantity).count if quantity in self.run.quantities else 0

    def _known(self, quantity: str) -> Thinned:
        if quantity not in self._read:
            self._read[quantity] = read_thinned(
                self.run,
                quantity,
                most=self.limits.read,
                held=self.limits.held,
                before=self._before.pop(quantity, None),
            )
        return self._read[quantity]

    def once(self, key: object, make: Callable[[], T]) -> T:
        """Compute something once.

        Args:
            key: What it is.
            make: Computes it.

        Returns:
            What was computed.
        """
        if key not in self._kept:
            self._kept[key] = make()
        kept: T = self._kept[key]
        return kept

    @cached_property
    def agents(self) -> list[Mark]:
        """The agents' names and colours."""
        counted = self.run.info.get("agents")
        count = counted if isinstance(counted, int) and 0 < counted <= MOST_AGENTS else 0
        for name in ("cosine", *(f"embedding_{n}" for n in ("actor", "critic"))):
            array = self.array(name)
            if array is not None and "agent" in array.dims:
                count = array.sizes["agent"]
        return agent_marks(agent_names(self.run, count))

    @cached_property
    def groups(self) -> dict[str, Callable[[int], Any]]:
        """What the agents can be coloured by: for an update each agent's group, or number."""
        names = [mark.label for mark in self.agents]
        found: dict[str, Callable[[int], Any]] = {"agent": partial(_always, names)}
        for kind, labels in (("kind", kinds(names)), ("goal", goals(self.run, len(names)))):
            if labels:
                found[kind] = partial(_always, labels)
        if self.updates("behavioural_distance") and len(names) > 2:
            found["behaviour cluster"] = self._behaviour_clusters
        returns = agent_returns(self.run)
        if returns is not None and len(returns) == len(names):
            found["return"] = partial(_always, returns)
        return found

    def _behaviour_clusters(self, update: int) -> list[str]:
        at = earlier(self.updates("behavioural_distance"), update)
        distance = self.values("behavioural_distance", update=at)
        assert distance is not None
        return self.once(
            ("clusters", at), lambda: [f"cluster {number}" for number in clusters(distance)]
        )

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """All pairs of agents."""
        count = len(self.agents)
        return [(i, k) for i in range(count) for k in range(i + 1, count)]

    def labels(self, axis: str) -> list[str]:
        """List an axis' labels.

        Args:
            axis: "network" or "layer".

        Returns:
            The labels of what the run recorded of gradients, in order.
        """
        array = self.array("cosine")
        return [] if array is None else [str(label) for label in array[axis].to_numpy()]

    @cached_property
    def recorded(self) -> list[int]:
        """The updates at which something was diagnosed."""
        arrays = [self.array(name) for name in DATED]
        return sorted({
            int(update) for a in arrays if a is not None for update in a["update"].to_numpy()
        })

    @cached_property
    def stops(self) -> list[int]:
        """Those of them that the slider stops at."""
        array = self.array("cosine")
        cells = 1 if array is None else int(np.prod(array.shape[1:])) * 2  # two estimates
        limit = int(np.clip(self.limits.cells // cells, 8, self.limits.updates))
        return evenly_spaced(self.recorded, limit)

    def updates(self, quantity: str) -> list[int]:
        """Find the updates at which there is something to draw of a quantity.

        Args:
            quantity: Its name.

        Returns:
            At each stop the newest update up to it that was recorded.
        """

        def find() -> list[int]:
            array = self.array(quantity)
            known = [] if array is None else array["update"].to_numpy().tolist()
            if not known:
                return []
            return sorted({earlier(known, stop) for stop in self.stops if stop >= known[0]})

        return self.once(("updates", quantity), find)

    @cached_property
    def frames(self) -> tuple[np.ndarray, np.ndarray]:
        """Updates that are looked at, and the cumulative environment frames at their ends."""
        array = self.array(_CLOCK)
        if array is None:
            return np.empty(0, np.int64), np.empty(0)
        frames = array.to_numpy().astype(float)
        known = np.isfinite(frames)
        return array["update"].to_numpy()[known], frames[known]

    def frames_at(self, updates: np.ndarray) -> np.ndarray:
        """Look frames up.

        Args:
            updates: Updates.

        Returns:
            Their frames, NaN where they are not known.
        """
        known, frames = self.frames
        found = np.full(len(updates), np.nan)
        if len(known):
            places = np.searchsorted(known, updates).clip(max=len(known) - 1)
            found = np.where(known[places] == updates, frames[places], np.nan)
        missing = np.isnan(found)
        if missing.any() and self.count(_CLOCK) > len(known):
            found[missing] = self._told_of(updates[missing].tolist())
        return found

    def _told_of(self, updates: list[int]) -> list[float]:
        """Frames at updates at which the clock itself is not among what is looked at."""
        if len(self._told) > _TOLD:
            self._told.clear()
        missing = sorted(set(updates) - self._told.keys())
        if missing:
            found = self.run.quantity(_CLOCK, at=missing)
            frames = found.to_numpy().astype(float).tolist()
            told = zip(found["update"].to_numpy().tolist(), frames, strict=True)
            self._told.update((update, frame) for update, frame in told if np.isfinite(frame))
        return [self._told.get(update, np.nan) for update in updates]


def _place(updates: np.ndarray, wanted: object) -> int:
    """Where an update stands among others; -1 if it does not."""
    place = int(np.searchsorted(updates, int(wanted)))  # type: ignore[call-overload]
    return place if place < len(updates) and updates[place] == wanted else -1


def _always(labels: T, update: int) -> T:  # noqa: ARG001 -- of no update in particular
    return labels


Runs = Mapping[str, RunTables]

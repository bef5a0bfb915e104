"""A run's records as panels read them: by label, thinned for drawing, each read once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import xarray as xr

from analyses.curves import evenly_spaced, frames_by_update
from analyses.groups import agent_returns, goals, kinds
from analyses.similarity import clusters
from dashboards.colours import Mark, agent_marks
from dashboards.on_demand import on_demand, size
from dashboards.panel import earlier
from dashboards.text import agent_names
from gradlab.run import Run

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of a long run is drawn; its records are never touched.

    Attributes:
        updates: The most updates that the slider stops at.
        cells: The most cells of a run's matrices, over all of its stops; at least 8 stops stay.
        points: The most points of a line.
        history: The most numbers of all pairs' histories.
        held: The most bytes of a quantity that are kept; a larger one is read when it is looked at.
    """

    updates: int = 1_000_000
    cells: int = 10**12
    points: int = 1000
    history: int = 10**12
    held: int = 16_000_000


ALL = Limits()
"""For a page that asks for one figure at a time."""

_DATED = ("cosine", "embedding_actor", "embedding_critic", "snd")


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
        self._arrays: dict[str, xr.DataArray | None] = {}
        self._on_demand: set[str] = set()
        self._before = before._arrays if before is not None else {}
        self._places: dict[str, dict[str, dict[Any, int]]] = {}
        self._kept: dict[object, Any] = {}

    def array(self, quantity: str, *dims: str) -> xr.DataArray | None:
        """Read a quantity if it was recorded as expected.

        Args:
            quantity: Its name.
            *dims: The axes after `update` that are asked for; none: any.

        Returns:
            The quantity, or None if it is missing, empty, or has other axes (which is noted in the
            run's problems). One that is large is read when, and as far as, it is looked at.
        """
        if quantity not in self._arrays:
            array = self._read(quantity) if quantity in self.run.quantities else None
            self._arrays[quantity] = array if array is not None and array.size else None
        array = self._arrays[quantity]
        if array is not None and dims and array.dims != ("update", *dims):
            problem = f"{quantity} has axes {array.dims}, expected {('update', *dims)}"
            if f"{problem}: it is not shown" not in self.run.problems:
                self.run.problems.append(f"{problem}: it is not shown")
            return None
        return array

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
                for dim in array.dims
            }
        places = self._places[quantity]
        if not where.keys() <= places.keys():
            return None
        at = {dim: places[dim].get(label, -1) for dim, label in where.items()}
        if -1 in at.values():
            return None
        if quantity in self._on_demand:
            return np.asarray(array.isel(at).to_numpy())
        # A tenth of what xarray takes for the same, and a page asks for thousands.
        return np.asarray(array.to_numpy()[tuple(at.get(dim, slice(None)) for dim in places)])

    def _read(self, quantity: str) -> xr.DataArray:
        if size(self.run, quantity) > self.limits.held:
            self._on_demand.add(quantity)
            return on_demand(self.run, quantity)
        before = self._before.get(quantity)
        if before is None or {dim: before[dim].to_numpy().tolist() for dim in before.dims[1:]} != (
            self.run.axes(quantity)
        ):
            return self.run.quantity(quantity)
        old = before["update"].to_numpy()
        new = self.run.quantity(quantity, since=int(old[-1]) + 1)
        return xr.concat([before, new], "update") if new.size else before

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
        count = counted if isinstance(counted, int) and 0 < counted < 100_000 else 0
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
        arrays = [self.array(name) for name in _DATED]
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
    def frames(self) -> dict[int, float]:
        """Cumulative environment frames at the end of each update, where they are known."""
        known = frames_by_update(self.run).dropna()
        return {int(update): float(frames) for update, frames in known.items()}  # type: ignore[call-overload]

    def frames_at(self, updates: np.ndarray) -> np.ndarray:
        """Look frames up.

        Args:
            updates: Updates.

        Returns:
            Their frames, NaN where they are not known.
        """
        return np.array([self.frames.get(int(u), np.nan) for u in updates], dtype=float)


def _always(labels: T, update: int) -> T:  # noqa: ARG001 -- of no update in particular
    return labels

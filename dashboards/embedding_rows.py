"""What tells agents apart, as rows of numbers at the updates that are drawn."""

from typing import Any

import numpy as np
import xarray as xr

from analyses.curves import evenly_spaced
from dashboards.choices import Choices
from dashboards.tables import Runs, RunTables

PARTS = ("run", "network", "update")
_MOST = 200  # updates that a projection is fitted to


def embedding(of: RunTables, network: str) -> xr.DataArray | None:
    """Read a network's rows at the updates that are drawn.

    Args:
        of: The run's.
        network: "actor" or "critic".

    Returns:
        Rows [update, agent, feature]; None if there are none.
    """
    name = f"embedding_{network}"

    def find() -> xr.DataArray | None:
        array = of.array(name)
        if array is None or array.sizes["agent"] != len(of.agents):
            return None
        return array.sel(update=evenly_spaced(of.updates(name), _MOST))

    return of.once(("embedding", network), find)


def updates_of(runs: Runs, most: int = _MOST) -> Any:  # noqa: ANN401 -- Callable[[Choices], list[int]]
    """List the updates at which embeddings are drawn, of whatever network.

    Args:
        runs: The runs by name.
        most: At most so many.

    Returns:
        A function from choices to updates.
    """

    def updates(choices: Choices) -> list[int]:
        of = runs[choices.run]

        def find() -> list[int]:
            networks = of.labels("network") or ("actor", "critic")
            found = [embedding(of, network) for network in networks]
            known = {u for rows in found if rows is not None for u in rows["update"].to_numpy()}
            return evenly_spaced(sorted(map(int, known)), most)

        return of.once(("updates of embeddings", most), find)

    return updates


def what(of: RunTables, network: str) -> str:
    """Say what the rows are.

    Args:
        of: The run's.
        network: "actor" or "critic".

    Returns:
        The recorded estimator.
    """
    points = embedding(of, network)
    return "" if points is None else str(points.attrs.get("estimator", ""))


def distances_of(of: RunTables, network: str) -> np.ndarray | None:
    """Measure Euclidean distances of the rows at the drawn updates.

    Args:
        of: The run's.
        network: "actor" or "critic".

    Returns:
        Distances [update, agent, agent_other]; None if there are no rows.
    """
    points = embedding(of, network)
    if points is None:
        return None

    def find() -> np.ndarray:
        rows = points.to_numpy().astype(float)
        apart = [np.linalg.norm(now[:, None] - now[None], axis=-1) for now in rows]
        return np.array(apart)

    return of.once(("distances", network), find)


def place_of(of: RunTables, choices: Choices) -> int | None:
    """Find the chosen update among those of the rows.

    Args:
        of: The run's.
        choices: What is chosen.

    Returns:
        Its place; None if there are no rows, or not at that update.
    """
    points = embedding(of, choices.network)
    if points is None:
        return None
    known = points["update"].to_numpy().tolist()
    return known.index(choices.update) if choices.update in known else None


def meta_of(of: RunTables, choices: Choices, note: str, position: np.ndarray) -> dict[str, Any]:
    """Say what a panel of points shows.

    Args:
        of: The run's.
        choices: What is chosen.
        note: What to say beside what the rows are.
        position: Where the agents are [agent, 2 or 3].

    Returns:
        A layout's `meta`: what a click chooses, the note, the alternative text.
    """
    drawn = int(np.isfinite(position).all(1).sum())
    said = what(of, choices.network)
    return {
        "click": {"customdata": "agent"},
        "note": " · ".join(part for part in (said, note) if part),
        "alt": f"{drawn} agents as points; {said}; {note}",
    }

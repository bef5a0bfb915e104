"""What agents can be grouped by: their kind, their goal, how they behave, what they earn."""

import json
import re
from collections.abc import Callable

import numpy as np

from gradlab.run import Run
from gradlab.run_writer import LARGEST_INFO, read_at_most


def kinds(names: list[str]) -> list[str]:
    """Group agents by their names without the number at the end.

    Args:
        names: The agents' names.

    Returns:
        Each agent's kind, e.g. "adversary" of "adversary_0"; empty if all are of one kind.
    """
    found = [re.sub(r"[\s_-]*[0-9]+$", "", name) for name in names]
    return found if 1 < len(set(found)) < len(found) else []


def goals(run: Run, agents: int) -> list[str]:
    """Group agents by whose goal they share, where the environment's settings say so.

    Args:
        run: A run.
        agents: How many agents there are.

    Returns:
        Each agent's goal; empty if it is not known, or each has its own.
    """
    find = _GOALS.get(run.environment)
    settings = run.config.get("env_args", {})
    if find is None or not isinstance(settings, dict):
        return []
    return [f"goal {goal}" for goal in find(settings, agents)]


def _navigation(settings: dict[str, object], agents: int) -> list[int]:
    """In VMAS's navigation the first agents share a goal, and on demand the others another."""
    together = settings.get("agents_with_same_goal", 1)
    if not isinstance(together, int) or together < 2:
        return []
    if settings.get("split_goals", False):
        return [n // together for n in range(agents)]
    return [0 if n < together else n - together + 1 for n in range(agents)]


_GOALS: dict[str, Callable[[dict[str, object], int], list[int]]] = {
    "vmas/navigation": _navigation,
}


def agent_returns(run: Run) -> np.ndarray | None:
    """Read each agent's mean return from the newest evaluation in the run's folder.

    Args:
        run: A run.

    Returns:
        Returns [agent]; None if `gradlab evaluate` was never asked, or its file can't be read.
    """
    files = sorted((run.path / "evaluations").glob("*.json"))
    if not files:
        return None
    try:
        found = json.loads(read_at_most(files[-1], LARGEST_INFO))
        values = np.array(found["returns"], dtype=float)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return np.asarray(np.nanmean(values, axis=1)) if values.ndim == 2 and values.size else None

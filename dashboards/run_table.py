"""What the page says about its runs in words: the table at the top and the list of problems."""

import math
from collections.abc import Sequence

import pandas as pd

from analyses.curves import frames_by_update
from analyses.listing import last_number
from dashboards.colours import Mark
from dashboards.text import clean, for_html
from gradlab.run import Run

COLUMNS = (
    *("run", "method", "environment", "agents", "frames", "last return", "evaluation return"),
    *("state", "seed"),
)
_NUMBERS = ("agents", "frames", "last return", "evaluation return", "seed")


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """Name the runs so that no two are called the same.

    Args:
        runs: Runs.

    Returns:
        The folder's name; where several share it, with the parent folder's or a number.
    """
    names = [clean(run.name) for run in runs]
    longer = [
        f"{clean(run.path.resolve().parent.name)}/{name}" if names.count(name) > 1 else name
        for run, name in zip(runs, names, strict=True)
    ]
    if len(set(longer)) == len(longer):
        return longer
    return [
        f"{name} #{names[:number].count(name) + 1}" if names.count(name) > 1 else name
        for number, name in enumerate(names)
    ]


def agent_names(run: Run, agents: int) -> list[str]:
    """Name the agents.

    Args:
        run: A run.
        agents: How many there are.

    Returns:
        The recorded names, or "agent 0" and so on where they are lost.
    """
    recorded = run.info.get("agent_names")
    known = [clean(name) for name in recorded] if isinstance(recorded, list) else []
    return [known[number] if number < len(known) else f"agent {number}" for number in range(agents)]


def table_rows(runs: Sequence[Run], marks: Sequence[Mark], curves: Sequence[pd.DataFrame]) -> str:
    """Write the table's body.

    Args:
        runs: Runs.
        marks: Theirs.
        curves: Their learning curves.

    Returns:
        HTML rows.
    """
    rows = []
    for run, mark, curve in zip(runs, marks, curves, strict=True):
        frames = frames_by_update(run).dropna()
        last = curve["episode_return"].iloc[-1] if len(curve) else math.nan
        cells = {
            "run": mark.label,
            "method": run.method,
            "environment": run.environment,
            "agents": run.info.get("agents", "unknown"),
            "frames": f"{frames.iloc[-1]:,.0f}" if len(frames) else "none",
            "last return": _number(last),
            "evaluation return": _number(last_number(run, "evaluation_return")),
            "state": run.state,
            "seed": run.info.get("seed", "unknown"),
        }
        html = "".join(
            f"<td{_class(name)}>{_swatch(mark) if name == 'run' else ''}{for_html(value)}</td>"
            for name, value in cells.items()
        )
        rows.append(f"<tr>{html}</tr>")
    return "\n".join(rows)


def table_columns() -> str:
    """Write the table's head.

    Returns:
        HTML header cells.
    """
    return "".join(f'<th scope="col"{_class(name)}>{name}</th>' for name in COLUMNS)


def problem_list(runs: Sequence[Run], marks: Sequence[Mark]) -> str:
    """Write what is missing or damaged; to be called last, since reading finds problems.

    Args:
        runs: Runs.
        marks: Theirs.

    Returns:
        HTML, empty if all is well.
    """
    items = [
        f"<li><b>{for_html(mark.label)}</b>: {for_html(problem)}</li>"
        for run, mark in zip(runs, marks, strict=True)
        for problem in dict.fromkeys([*run.problems, *_failure(run)])
    ]
    if not items:
        return ""
    return f'<section class="problems"><strong>Problems</strong><ul>{"".join(items)}</ul></section>'


def _failure(run: Run) -> list[str]:
    error = run.info.get("error")
    return [f"training failed: {error}"] if run.state == "failed" and error else []


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "none"


def _class(name: str) -> str:
    return ' class="number"' if name in _NUMBERS else ""


def _swatch(mark: Mark) -> str:
    return f'<span class="swatch" style="background:{mark.colour}"></span>'

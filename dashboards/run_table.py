"""What the page says about its runs in words: the table at the top and the list of problems."""

import math
from collections.abc import Mapping, Sequence

from analyses.headline import headline
from analyses.listing import last_number
from dashboards.colours import Mark
from dashboards.tables import RunTables
from dashboards.text import clean, for_html
from gradlab.run import Run

COLUMNS = (
    *("run", "method", "environment", "agents", "frames", "last return", "evaluation return"),
    *("state", "seed", "in words"),
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


def table_rows(runs: Mapping[str, RunTables]) -> str:
    """Write the table's body.

    Args:
        runs: The runs by name.

    Returns:
        HTML rows.
    """
    rows = []
    for of in runs.values():
        run = of.run
        frames = last_number(run, "frames")
        cells = {
            "run": of.mark.label,
            "method": run.method,
            "environment": run.environment,
            "agents": run.info.get("agents", "unknown"),
            "frames": f"{frames:,.0f}" if math.isfinite(frames) else "none",
            "last return": _number(last_number(run, "episode_return")),
            "evaluation return": _number(last_number(run, "evaluation_return")),
            "state": run.state,
            "seed": run.info.get("seed", "unknown"),
            "in words": headline(run, read=of.array),
        }
        html = "".join(
            f"<td{_class(name)}>{_swatch(of.mark) if name == 'run' else ''}{for_html(value)}</td>"
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


def problem_list(runs: Mapping[str, RunTables]) -> str:
    """Write what is missing or damaged; to be called last, since reading finds problems.

    Args:
        runs: The runs by name.

    Returns:
        HTML, empty if all is well.
    """
    items = [
        f"<li><b>{for_html(of.mark.label)}</b>: {for_html(problem)}</li>"
        for of in runs.values()
        for problem in dict.fromkeys([*of.run.problems, *_failure(of.run)])
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
    if name == "in words":
        return ' class="headline"'
    return ' class="number"' if name in _NUMBERS else ""


def _swatch(mark: Mark) -> str:
    return f'<span class="swatch" style="background:{mark.colour}"></span>'

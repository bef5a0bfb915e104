"""Agents as points: their look, what they are coloured by, and which is chosen."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dashboards.choices import Choices
from dashboards.colours import OKABE_ITO, SEQUENTIAL, Mark
from dashboards.panel import Figure, Part
from dashboards.style import QUIET, message, rounded
from dashboards.tables import RunTables
from dashboards.text import for_plotly

NEAREST = 12
"""How many agents stand beside a chosen one."""

_COLLIDE = 0.02  # of the axis range: nearer agents share one number label


def agent_trace(
    position: np.ndarray, marks: Sequence[Mark], reach: float | None = None, **axes: str
) -> dict[str, Any]:
    """Draw all agents as points with their numbers.

    Args:
        position: Places [agent, 2], NaN where there is none.
        marks: The agents'.
        reach: Size of the drawn plane; agents nearer than a fiftieth share one label. None: none
            has a label.
        **axes: The trace's axes, if they are not the first.

    Returns:
        A trace.
    """
    labelled = reach is not None
    return {
        "type": "scatter",
        "mode": "markers+text" if labelled else "markers",
        "x": rounded(position[:, 0]),
        "y": rounded(position[:, 1]),
        "text": number_labels(position, reach) if reach is not None else "",
        "customdata": list(range(len(position))),
        "hovertext": hover_names(marks),
        "hovertemplate": "%{hovertext}<br>(%{x:.4g}, %{y:.4g})<extra></extra>",
        "textposition": "top right",
        "textfont": {"size": 11},
        "cliponaxis": False,
        "marker": marker(marks, size=11 if labelled else 9),
        "unselected": {"marker": {"opacity": 0.85}, "textfont": {"color": QUIET}},
        "selected": {"marker": {"size": 17, "opacity": 1}},
        "showlegend": False,
    } | axes


def nearest_figure(
    row: np.ndarray,
    chosen: int,
    marks: Sequence[Mark],
    distance: str,
    ends: tuple[np.ndarray, np.ndarray] | None = None,
) -> Figure:
    """Draw the agents nearest to a chosen one as bars, the nearest first.

    Args:
        row: Their distances from it [agent]; what is not finite is left out.
        chosen: Its number.
        marks: The agents'.
        distance: What the distances are, as the axis says it.
        ends: Lower and upper ends of the distances' intervals [agent], if they have any.

    Returns:
        The figure, in which a click chooses the other agent of the pair.
    """
    order = np.argsort(row, kind="stable").tolist()
    near = [n for n in order if n != chosen and np.isfinite(row[n])][:NEAREST]
    names = hover_names(marks)
    bars: dict[str, Any] = {
        "type": "bar",
        "orientation": "h",
        "x": rounded(row[near]),
        "y": [f"agent {n}" for n in near],
        "customdata": near,
        "hovertext": [names[n] for n in near],
        "hovertemplate": "%{hovertext}: %{x:.4g}<extra></extra>",
        "marker": {"color": [marks[n].colour for n in near]},
        "showlegend": False,
    }
    if ends is not None:
        low, high = ends
        bars["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": rounded((high - row)[near]),
            "arrayminus": rounded((row - low)[near]),
            "thickness": 1.5,
        }
    return {
        "data": [bars],
        "layout": {
            "xaxis": {"title": {"text": distance}, "rangemode": "tozero"},
            "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
            "annotations": [] if near else message("no other agent at a finite distance"),
            "meta": {
                "click": {"customdata": "other"},
                "note": f"of agent {chosen}",
                "alt": f"Nearest to agent {chosen}: {', '.join(map(str, near))}",
            },
        },
    }


def hover_names(marks: Sequence[Mark]) -> list[str]:
    """Name agents for hover texts.

    Args:
        marks: The agents'.

    Returns:
        "0: name" and so on, escaped.
    """
    return [f"{number}: {for_plotly(mark.label, 60)}" for number, mark in enumerate(marks)]


def marker(marks: Sequence[Mark], size: int = 11) -> dict[str, Any]:
    """Give each agent its own colour and shape.

    Args:
        marks: The agents'.
        size: In CSS pixels.

    Returns:
        Plotly's marker.
    """
    return {
        "size": size,
        "color": [mark.colour for mark in marks],
        "symbol": [mark.shape for mark in marks],
        "line": {"color": "#ffffff", "width": 1},
    }


def chosen_part(*, before: int = 0, traces: int = 1) -> Part:
    """Make the chosen agent's point larger.

    Args:
        before: How many traces there are before the points.
        traces: How many traces of points there are.

    Returns:
        A part for a panel of points.
    """

    def draw(choices: Choices) -> Figure:
        points = {"selectedpoints": [choices.agent]}
        return {"data": [{}] * before + [points] * traces}

    return Part(depends=("agent",), draw=draw)


def colour_part(runs: Mapping[str, RunTables], *, before: int = 0, solid: bool = False) -> Part:
    """Colour points by what was chosen.

    Args:
        runs: The runs by name.
        before: How many traces there are before the points.
        solid: Whether the trace is in three dimensions, which knows fewer shapes.

    Returns:
        A part for a panel of points of one run.
    """

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        marks = of.agents
        found: dict[str, Any] = marker(marks, size=6 if solid else 11)
        note = ""
        if choices.colour == "return":
            values = of.groups["return"](choices.update)
            found |= {
                "color": rounded(values),
                "colorscale": [list(stop) for stop in SEQUENTIAL],
                "colorbar": {"title": {"text": "return"}, "thickness": 10, "outlinewidth": 0},
            }
        elif choices.colour in of.groups and choices.colour != "agent":
            labels = [str(label) for label in of.groups[choices.colour](choices.update)]
            known = list(dict.fromkeys(labels))
            found["color"] = [OKABE_ITO[known.index(label) % len(OKABE_ITO)] for label in labels]
            note = f"{len(known)} {choices.colour}{'s' * (len(known) != 1)}"
        if solid:
            found["symbol"] = "circle"
        changes: Figure = {"data": [*({} for _ in range(before)), {"marker": found}]}
        return changes | ({"layout": {"meta": {"colours": note}}} if note else {})

    return Part(depends=("run", "colour", "update"), draw=draw, updates=lambda c: runs[c.run].stops)


def number_labels(position: np.ndarray, reach: float) -> list[str]:
    """Number each agent; agents on top of each other get one label at the first of them.

    Args:
        position: Places [agent, 2].
        reach: Size of the drawn plane.

    Returns:
        Each agent's label, or nothing.
    """
    labels = [""] * len(position)
    free = [agent for agent in range(len(position)) if np.isfinite(position[agent]).all()]
    while free:
        first = free[0]
        near = [a for a in free if np.abs(position[a] - position[first]).max() <= _COLLIDE * reach]
        numbers = ", ".join(str(agent) for agent in near[:6])
        labels[first] = numbers + (f" +{len(near) - 6}" if len(near) > 6 else "")
        free = [agent for agent in free if agent not in near]
    return labels


def square(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """Widen the shorter of two ranges, so that both directions have the same scale in a square.

    Args:
        x: One range.
        y: The other.

    Returns:
        Both, equally long.
    """
    longest = max(x[1] - x[0], y[1] - y[0])
    wide = ([(a + b - longest) / 2, (a + b + longest) / 2] for a, b in (x, y))
    return next(wide), next(wide)

"""Panels that place agents where their embeddings lie: principal components, classical scaling."""

from typing import Any

import numpy as np
import xarray as xr

from analyses.embeddings import (
    aligned,
    mds_path,
    pca,
)
from dashboards.choices import Choices
from dashboards.colours import OKABE_ITO
from dashboards.embedding_rows import (
    PARTS,
    distances_of,
    embedding,
    meta_of,
    place_of,
    updates_of,
    what,
)
from dashboards.lines import NOT_RECORDED
from dashboards.panel import Figure, Panel, Part
from dashboards.points import (
    agent_trace,
    chosen_part,
    colour_part,
    hover_names,
    marker,
    square,
)
from dashboards.style import QUIET, decimals, message, nothing, padded_range, rounded
from dashboards.tables import Runs, RunTables
from dashboards.text import for_plotly

TAIL = 12  # past positions in a trail


def _projection(of: RunTables, network: str, components: int = 3) -> xr.Dataset | None:
    points = embedding(of, network)
    if points is None:
        return None
    return of.once(("pca", network), lambda: pca(points, components))


def pca_panel(runs: Runs) -> Panel:
    """Draw the first two principal components.

    Args:
        runs: The runs by name.

    Returns:
        The panel.
    """

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        projection = _projection(of, choices.network)
        if projection is None:
            return nothing(NOT_RECORDED)
        places = projection["update"].to_numpy().tolist()
        if choices.update not in places:
            return nothing("not recorded for this network")
        index = places.index(choices.update)
        position = projection["position"].to_numpy()[..., :2]
        ratio = projection["explained_variance_ratio"].to_numpy()
        x, y = square(*(padded_range(position[..., axis]) for axis in (0, 1)))
        still = bool(np.isnan(ratio).all() and np.isfinite(position).any())
        gone = not np.isfinite(position[index]).any()
        says = (
            message("no finite embedding")
            if gone
            else message("all agents are identical at every update", y=0.85)
            if still
            else []
        )
        shares = f"2 components: {np.nansum(ratio[:2]):.0%} of the variance"
        return {
            "data": [
                _trails(position[max(0, index + 1 - TAIL) : index + 1]),
                agent_trace(position[index], of.agents, x[1] - x[0]),
            ],
            "layout": _plane((x, y), (_component(1, ratio[0]), _component(2, ratio[1])))
            | {
                "annotations": says,
                "meta": meta_of(of, choices, "" if still else shares, position[index]),
            },
        }

    return Panel(
        name="pca",
        title="Principal components",
        reading="Points close together: similar agents. Lines: where they were before.",
        definition="One principal component analysis of all drawn updates together, so that a "
        "point "
        "moves only when its agent's row does. Rows with a number that is not finite are left out.",
        parts=[
            Part(depends=PARTS, draw=draw, updates=updates_of(runs)),
            colour_part(runs, before=1),
            chosen_part(before=1),
        ],
        height=460,
    )


def _trails(tail: np.ndarray) -> dict[str, Any]:
    """Where agents were before [update, agent, 2], in one trace: thirty take ten times as long."""
    gaps = np.full((1, *tail.shape[1:]), np.nan)
    x, y = np.concatenate([tail, gaps]).transpose(2, 1, 0).reshape(2, -1)
    return {
        "type": "scatter",
        "mode": "lines",
        "x": rounded(x),
        "y": rounded(y),
        "line": {"color": QUIET, "width": 1.2},
        "opacity": 0.6,
        "connectgaps": False,
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _component(number: int, ratio: float) -> str:
    share = "no variance" if np.isnan(ratio) else f"{ratio:.1%} of variance"
    return f"component {number} ({share})"


def solid_panel(runs: Runs) -> Panel:
    """Draw the first three principal components.

    Args:
        runs: The runs by name.

    Returns:
        The panel.
    """

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        projection = _projection(of, choices.network)
        if projection is None:
            return nothing(NOT_RECORDED)
        if choices.update not in projection["update"].to_numpy():
            return nothing("not recorded for this network")
        everywhere = projection["position"].to_numpy()
        position = projection["position"].sel(update=choices.update).to_numpy()
        ratio = projection["explained_variance_ratio"].to_numpy()
        axes = {
            f"{letter}axis": {
                "title": {"text": f"component {number + 1}", "font": {"size": 11}},
                "tickfont": {"size": 9},
                "nticks": 5,
                "range": padded_range(everywhere[..., number]),
            }
            for number, letter in enumerate("xyz")
        }
        return {
            "data": [
                {
                    "type": "scatter3d",
                    "mode": "markers+text",
                    **{axis: rounded(position[:, n]) for n, axis in enumerate("xyz")},
                    "text": [str(n) for n in range(len(position))],
                    "textfont": {"size": 10, "color": QUIET},
                    "customdata": list(range(len(position))),
                    "hovertext": hover_names(of.agents),
                    "hovertemplate": "%{hovertext}<extra></extra>",
                    "marker": marker(of.agents, size=6) | {"symbol": "circle"},
                    "showlegend": False,
                }
            ],
            "layout": {
                "scene": axes
                | {"aspectmode": "cube", "camera": {"eye": {"x": 1.5, "y": 1.5, "z": 0.9}}},
                "margin": {"l": 0, "r": 0, "t": 0, "b": 0},
                "meta": meta_of(
                    of, choices, f"3 components: {np.nansum(ratio):.0%} of the variance", position
                ),
            },
        }

    return Panel(
        name="pca-3d",
        title="Three principal components",
        reading="Drag to turn. As beside, with one direction more.",
        definition="The same analysis as for two components.",
        parts=[
            Part(depends=PARTS, draw=draw, updates=updates_of(runs)),
            colour_part(runs, solid=True),
        ],
        height=460,
    )


def mds_panel(runs: Runs) -> Panel:
    """Draw classical scaling of the distances.

    Args:
        runs: The runs by name.

    Returns:
        The panel.
    """

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        distances, place = distances_of(of, choices.network), place_of(of, choices)
        if distances is None or place is None:
            return nothing(NOT_RECORDED)
        position, share = of.once(("mds", choices.network), lambda: mds_path(distances))
        if not np.isfinite(position[place]).all():
            return nothing("an embedding is not finite")
        layout, reach = unit_axes(position, "embedding distance")
        note = f"{np.nansum(share[place]):.0%} of squared distances"
        return {
            "data": [agent_trace(position[place], of.agents, reach)],
            "layout": layout | {"meta": meta_of(of, choices, note, position[place])},
        }

    return Panel(
        name="mds",
        title="Classical scaling",
        reading="Distances in the plane come as near as they can to the embeddings' distances now.",
        definition="Classical multidimensional scaling (Torgerson, 1952) of the Euclidean "
        "distances "
        "at each update, turned by orthogonal Procrustes onto the update before so that points do "
        "not jump.",
        parts=[
            Part(depends=PARTS, draw=draw, updates=updates_of(runs)),
            colour_part(runs),
            chosen_part(),
        ],
        height=460,
    )


def unit_axes(position: np.ndarray, unit: str) -> tuple[dict[str, Any], float]:
    """Make the axes of a plane whose directions mean nothing but whose distances do.

    Args:
        position: All that will ever be drawn [..., agent, 2].
        unit: What the distances are.

    Returns:
        Both axes, equally long; and their length.
    """
    x, y = square(*(padded_range(position[..., axis]) for axis in (0, 1)))
    return _plane((x, y), (unit, unit)), x[1] - x[0]


def _plane(ranges: tuple[list[float], list[float]], titles: tuple[str, str]) -> dict[str, Any]:
    """Make axes of one scale."""
    # Margins that follow the labels would change the scale, and so the labels: plotly draws anew.
    x, y = (
        {"title": {"text": title}, "range": of, "automargin": False}
        for of, title in zip(ranges, titles, strict=True)
    )
    return {
        "xaxis": x,
        "yaxis": y | {"scaleanchor": "x"},
        "margin": {"l": 72, "r": 16, "t": 12, "b": 56},
    }


def trajectories_panel(runs: Runs) -> Panel:
    """Draw the agents' ways through training.

    Args:
        runs: The runs by name.

    Returns:
        The panel.
    """

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        points = embedding(of, choices.network)
        if points is None:
            return nothing(NOT_RECORDED)
        turned, residual = of.once(("aligned", choices.network), lambda: aligned(points))
        if not turned.size:
            return nothing("no update has finite embeddings of all agents")
        found = of.once(("aligned pca", choices.network), lambda: pca(turned))
        position = found["position"].to_numpy()
        ratio = found["explained_variance_ratio"].to_numpy()
        x, y = square(*(padded_range(position[..., axis]) for axis in (0, 1)))
        ends = [
            agent_trace(position[0], of.agents)
            | {"marker": marker(of.agents, 8) | {"symbol": "circle-open"}},
            agent_trace(position[-1], of.agents, x[1] - x[0]),
        ]
        ways = [
            _trails(position[:, [agent]]) | {"line": {"color": mark.colour, "width": 1.5}}
            for agent, mark in enumerate(of.agents)
        ]
        known = residual[np.isfinite(residual)]
        mean = known.mean() if known.size else 0.0
        return {
            "data": [*ways, *ends],
            "layout": _plane((x, y), (_component(1, ratio[0]), _component(2, ratio[1])))
            | {
                "meta": meta_of(of, choices, f"mean residual of a turn {mean:.2g}", position[-1]),
            },
        }

    return Panel(
        name="trajectories",
        title="Ways through training",
        reading="From the open circle to the filled mark. What is left here is change of the "
        "arrangement: common turns and shifts are taken out.",
        definition="Each drawn update's rows turned and shifted (orthogonal Procrustes) onto the "
        "one "
        "before, then one principal component analysis of all. Residual: the squared change that "
        "no turn explains, over the squared extent.",
        parts=[Part(depends=("run", "network"), draw=draw)],
        height=460,
    )


def scree_panel(runs: Runs) -> Panel:
    """Draw the variance that each principal component explains.

    Args:
        runs: The runs by name.

    Returns:
        The panel.
    """

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        points = embedding(of, choices.network)
        if points is None:
            return nothing(NOT_RECORDED)
        most = min(10, points.sizes["feature"], points.sizes["agent"] * points.sizes["update"])
        found = of.once(("scree", choices.network), lambda: pca(points, most))
        ratio = found["explained_variance_ratio"].to_numpy()
        if np.isnan(ratio).all():
            return nothing("all agents are identical at every update: there is no variance")
        numbers = list(range(1, most + 1))
        return {
            "data": [
                {
                    "type": "bar",
                    "x": numbers,
                    "y": decimals(ratio, 4),
                    "name": "one component",
                    "marker": {"color": OKABE_ITO[0]},
                    "hovertemplate": "component %{x}: %{y:.1%}<extra></extra>",
                },
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "x": numbers,
                    "y": decimals(np.cumsum(ratio), 4),
                    "name": "up to here",
                    "line": {"color": OKABE_ITO[1]},
                    "hovertemplate": "up to %{x}: %{y:.1%}<extra></extra>",
                },
            ],
            "layout": {
                "xaxis": {"title": {"text": "principal component"}, "dtick": 1, "showgrid": False},
                "yaxis": {
                    "title": {"text": "share of variance"},
                    "range": [0, 1.03],
                    "tickformat": ".0%",
                },
                "meta": {
                    "note": what(of, choices.network),
                    "alt": f"Explained variance: {', '.join(f'{r:.1%}' for r in ratio)}",
                },
            },
        }

    return Panel(
        name="scree",
        title="Explained variance",
        reading="If the line is low at 2, the plane shows little of how agents differ.",
        definition="Shares of the variance over agents and drawn updates, by principal component.",
        parts=[Part(depends=("run", "network"), draw=draw)],
    )


def everyone_panel(runs: Runs) -> Panel:
    """Draw every run's agents at its last update.

    Args:
        runs: The runs by name.

    Returns:
        The panel.
    """
    columns = min(4, len(runs))
    shown = list(runs.values())[:12]
    rows = -(-len(shown) // columns)

    def draw(choices: Choices) -> Figure:
        data, layout, titles = [], {}, []
        for number, of in enumerate(shown):
            axis = "" if number == 0 else str(number + 1)
            row, column = divmod(number, columns)
            left, right = column / columns + 0.01, (column + 1) / columns - 0.01
            top, bottom = 1 - row / rows, 1 - (row + 1) / rows
            hidden = {"showticklabels": False, "ticks": "", "showgrid": False, "mirror": True}
            projection = _projection(of, choices.network)
            position = (
                np.full((len(of.agents), 2), np.nan)
                if projection is None
                else projection["position"].to_numpy()[-1, :, :2]
            )
            x, y = square(*(padded_range(position[:, n]) for n in (0, 1)))
            layout[f"xaxis{axis}"] = hidden | {
                "domain": [left, right],
                "anchor": f"y{axis}",
                "range": x,
            }
            layout[f"yaxis{axis}"] = hidden | {
                "domain": [bottom + 0.01, top - 0.16 / rows],
                "anchor": f"x{axis}",
                "range": y,
            }
            data.append(
                agent_trace(position, of.agents, x[1] - x[0], xaxis=f"x{axis}", yaxis=f"y{axis}")
            )
            rows_are = for_plotly(what(of, choices.network) or "not recorded", 44)
            titles.append({
                "text": f"{for_plotly(of.mark.label, 30)}<br><i>{rows_are}</i>",
                "x": (left + right) / 2,
                "y": top - 0.15 / rows,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "center",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 11},
            })
        return {
            "data": data,
            "layout": layout
            | {
                "annotations": titles,
                "margin": {"l": 12, "r": 12, "t": 8, "b": 12},
                "meta": {
                    "click": {"customdata": "agent"},
                    "note": f"{len(shown)} of {len(runs)} runs" if len(shown) < len(runs) else "",
                    "alt": "Agents of every run by their first two principal components.",
                },
            },
        }

    return Panel(
        name="embeddings-runs",
        title="Every run's agents at its last update",
        reading="Compare how the agents are arranged, not the scale: methods tell agents apart by "
        "different things.",
        definition="The first two principal components of each run's own analysis.",
        parts=[Part(depends=("network",), draw=draw), chosen_part(traces=len(shown))],
        height=60 + 240 * rows,
        wide=True,
    )

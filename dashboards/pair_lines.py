"""Panels of pairs: the chosen one over training, and the intervals of all."""

from typing import Any

import numpy as np

from dashboards.choices import Choices
from dashboards.colours import OKABE_ITO, Mark
from dashboards.lines import NOT_RECORDED, Line, cursor_of, curve, line, lines_figure
from dashboards.pair_matrices import (
    NO_LAYER,
)
from dashboards.panel import Figure, Panel, Part
from dashboards.style import QUIET, decimals, horizontal, message, nothing
from dashboards.tables import Runs, RunTables
from gradlab.verdicts import ALIGNED, CONFLICT, UNDECIDED

_G, _Z, _COUPLED = OKABE_ITO[0], OKABE_ITO[1], OKABE_ITO[2]
_FOREST = 14  # pairs whose intervals have room
_SPACES = {"psi": "g", "theta": "Z"}
NO_INTERVALS = (
    "no intervals: they need --diagnostics full, at least 8 environment copies and two agents"
)


def history_panel(runs: Runs) -> Panel:
    """Draw the chosen pair's cosines and coupling over training.

    Args:
        runs: The runs by name.

    Returns:
        The panel.
    """

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        if of.array("cosine") is None:
            return nothing(NOT_RECORDED)
        if choices.other >= len(of.agents) or choices.agent == choices.other:
            return nothing("choose two different agents")
        networks, layers = len(of.labels("network")), len(of.labels("layer"))
        numbers = max(1, len(of.pairs) * networks * layers * 7)
        most = int(np.clip(of.limits.history // numbers, 20, of.limits.points))
        lines = []
        pair = {"agent": choices.agent, "agent_other": choices.other}
        place = {"network": choices.network, "layer": choices.layer} | pair
        for space, colour in (("psi", _G), ("theta", _Z)):
            where = place | {"space": space}
            lines += _cosine_lines(of, where, f"cosine of {_SPACES[space]}", colour, most)
        found = line(
            of, "coupling", Mark("coupling", _COUPLED, ""), where=place, dash="dot", most=most
        )
        lines += [found] if found else []
        return lines_figure(
            lines,
            {"title": {"text": "cosine, coupling"}, "range": [-1.05, 1.05]},
            reference=0.0,
            empty="undefined for this pair here",
            note=f"agents {choices.agent} and {choices.other}",
        )

    return Panel(
        name="pair-history",
        title="The chosen pair over training",
        reading="Where a band lies below 0, the two agents are in conflict. g near Z: sharing "
        "passes on what they want; g near 0: it keeps them apart.",
        definition="Debiased cosines of the two agents' g and Z with 95 % intervals, plug-in "
        "cosines "
        "where they are all there is, and the coupling. Fewer points are drawn where there are "
        "many pairs: the run folder holds them all.",
        parts=[
            Part(depends=("run", "network", "layer", "agent", "other"), draw=draw, symmetric=True),
            cursor_of(runs),
        ],
    )


def _cosine_lines(
    of: RunTables, where: dict[str, Any], label: str, colour: str, most: int
) -> list[Line]:
    ends = {"low": of.values("cosine_low", **where), "high": of.values("cosine_high", **where)}
    quantity = "cosine_debiased" if ends["low"] is not None else "cosine"
    values, array = of.values(quantity, **where), of.array(quantity)
    if values is None or array is None:
        return []
    mark = Mark(label, colour, "")
    return [curve(of, array["update"].to_numpy(), values, mark, most=most, **ends)]


def passing_panel(runs: Runs) -> Panel:
    """Draw how much of what the chosen pair wants the coupling lets through.

    Args:
        runs: The runs by name.

    Returns:
        The panel.
    """

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        debiased = choices.estimate == "debiased" and of.array("cosine_debiased") is not None
        quantity = "cosine_debiased" if debiased else "cosine"
        where = {"update": choices.update, "network": choices.network, "layer": choices.layer}
        z, g = (of.values(quantity, **where, space=space) for space in ("theta", "psi"))
        if z is None or g is None or not of.pairs:
            return nothing(NOT_RECORDED if of.array("cosine") is None else "no two agents")
        rows, columns = np.array(of.pairs).T
        x, y = z[rows, columns], g[rows, columns]
        verdict = of.values("verdict", **where, space="psi")
        decided = np.ones(len(x), bool) if verdict is None else verdict[rows, columns] != UNDECIDED
        found = np.isfinite(x) & np.isfinite(y)
        line_ = {"color": QUIET, "width": 1, "dash": "dot"}
        shapes = [
            {"type": "line", "x0": -1, "x1": 1, "y0": slope * -1, "y1": slope, "line": line_}
            for slope in (0, 1)
        ]
        many = len(x) > 60
        return {
            "data": [
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": decimals(x, 2 if many else 3),
                    "y": decimals(y, 2 if many else 3),
                    "customdata": [list(pair) for pair in of.pairs],
                    "hovertemplate": "agents %{customdata[0]} and %{customdata[1]}<br>cosine of Z "
                    "%{x:.3f}, of g %{y:.3f}<extra></extra>",
                    "marker": {
                        "size": 6 if many else 10,
                        "color": [_G if d else "rgba(127,127,127,0.45)" for d in decided.tolist()],
                    },
                    "showlegend": False,
                }
            ],
            "layout": {
                "xaxis": {
                    "title": {"text": "cosine of Z (what they want)"},
                    "range": [-1.05, 1.05],
                },
                "yaxis": {"title": {"text": "cosine of g (what is felt)"}, "range": [-1.05, 1.05]},
                "shapes": shapes,
                "annotations": [] if found.any() else message(NO_LAYER),
                "meta": {
                    "click": {"customdata": ["agent", "other"]},
                    "alt": f"Cosine of g over cosine of Z of {int(found.sum())} pairs.",
                },
            },
        }

    return Panel(
        name="passing",
        title="What sharing lets through",
        reading="A pair on the diagonal feels all of what its agents want; one on the horizontal "
        "line is kept apart.",
        definition="One point for each pair of agents: the cosine after sharing (g) over the "
        "cosine before (Z). Grey: undecided in g.",
        parts=[
            Part(
                depends=("run", "network", "layer", "estimate", "update"),
                draw=draw,
                updates=lambda choices: runs[choices.run].updates("cosine"),
            )
        ],
    )


def forest_panel(runs: Runs) -> Panel:
    """Draw every pair's interval.

    Args:
        runs: The runs by name.

    Returns:
        The panel.
    """

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        where = {
            "update": choices.update,
            "network": choices.network,
            "layer": choices.layer,
            "space": choices.space,
        }
        names = ("cosine_debiased", "cosine_low", "cosine_high", "verdict")
        found = [of.values(name, **where) for name in names]
        if any(matrix is None for matrix in found) or not of.pairs:
            return nothing(NO_INTERVALS)
        rows, columns = np.array(of.pairs).T
        value, low, high, verdict = (m[rows, columns] for m in found if m is not None)
        known = np.flatnonzero(np.isfinite(low) & np.isfinite(high))
        if not known.size:
            return nothing(NO_LAYER)
        # Conflict first, by how sure it is.
        kept = known[np.argsort(high[known], kind="stable")][:_FOREST]
        middle = np.where(np.isfinite(value), value, (low + high) / 2)[kept]
        colours = {CONFLICT: OKABE_ITO[3], ALIGNED: OKABE_ITO[0]}
        labels = [f"{rows[n]}, {columns[n]}" for n in kept]
        return {
            "data": [
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": decimals(middle),
                    "y": labels,
                    "error_x": {
                        "type": "data",
                        "symmetric": False,
                        "array": decimals(high[kept] - middle),
                        "arrayminus": decimals(middle - low[kept]),
                        "color": QUIET,
                        "thickness": 1.5,
                        "width": 4,
                    },
                    "customdata": [[int(rows[n]), int(columns[n])] for n in kept],
                    "hovertemplate": "agents %{y}: cosine %{x:.3f}<extra></extra>",
                    "marker": {
                        "size": 10,
                        "color": [colours.get(float(verdict[n]), QUIET) for n in kept],
                        "symbol": [
                            "circle" if np.isfinite(value[n]) else "line-ns-open" for n in kept
                        ],
                    },
                    "showlegend": False,
                }
            ],
            "layout": {
                "xaxis": {
                    "title": {"text": f"cosine of {_SPACES[choices.space]}"},
                    "range": [-1.05, 1.05],
                },
                "yaxis": {
                    "type": "category",
                    "title": {"text": "pair of agents"},
                    "autorange": "reversed",
                    "showgrid": False,
                },
                "shapes": [_vertical_zero()],
                "meta": {
                    "click": {"customdata": ["agent", "other"]},
                    "alt": f"The {len(kept)} pairs nearest to conflict, of {len(of.pairs)}: "
                    + ", ".join(labels),
                    "note": f"{len(kept)} of {len(of.pairs)} pairs",
                },
            },
        }

    return Panel(
        name="pairs",
        title="The pairs nearest to conflict",
        reading="Red-brown: in conflict; blue: aligned; grey: noise leaves it undecided.",
        definition="Debiased cosine with 95 % interval, sorted by the interval's upper end; a dash "
        "stands in the middle of an interval whose cosine is not known. Verdicts are at 5 % false "
        "discoveries over all pairs, so an interval that just misses 0 may still be undecided.",
        parts=[
            Part(
                depends=("run", "network", "layer", "space", "update"),
                draw=draw,
                updates=lambda choices: runs[choices.run].updates("verdict"),
            )
        ],
    )


def _vertical_zero() -> dict[str, Any]:
    along = horizontal(0.0)
    return {
        "type": "line",
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "x0": 0,
        "x1": 0,
        "line": along["line"],
    }

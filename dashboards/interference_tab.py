"""The tab of interference: which agents' gradients point against each other."""

import numpy as np

from dashboards.choices import Choices
from dashboards.colours import DIVERGING, OKABE_ITO, SEQUENTIAL, Mark
from dashboards.lines import NOT_RECORDED, cursor_of, line, lines_figure
from dashboards.pair_lines import NO_INTERVALS, forest_panel, history_panel, passing_panel
from dashboards.pair_matrices import (
    COSINES,
    NO_LAYER,
    cosine_panel,
    coupling_panel,
    transference_panel,
)
from dashboards.panel import Figure, Panel, Part, Tab
from dashboards.similar_agents import tree_panel
from dashboards.style import decimals, message, nothing, whole
from dashboards.tables import Runs
from dashboards.text import for_plotly


def interference_tab(runs: Runs) -> Tab:
    """Lay out the tab.

    Args:
        runs: The runs by name.

    Returns:
        The tab.
    """
    panels = [
        *(cosine_panel(runs, space) for space in COSINES),
        coupling_panel(runs),
        transference_panel(runs),
        history_panel(runs),
        passing_panel(runs),
        forest_panel(runs),
        _layers_panel(runs),
        _verdicts_panel(runs),
        _cancelled_panel(runs),
        _aggregation_panel(runs),
        tree_panel(runs),
    ]
    return Tab(
        name="interference",
        title="Interference",
        lead="Which agents' gradients point against each other, how much of it is real, and what "
        "sharing lets through. A pair that is clicked is shown in all panels.",
        panels=panels,
    )


def _layers_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        judged = of.array("conflict_rate") is not None
        quantity = "conflict_rate" if judged else "mean_cosine"
        values = of.values(quantity, network=choices.network, space=choices.space)
        array = of.array(quantity)
        if values is None or array is None:
            return nothing(NOT_RECORDED)
        layers = [str(layer) for layer in array["layer"].to_numpy()]
        updates = array["update"].to_numpy()
        kept = np.isin(updates, of.updates(quantity))
        drawn = np.isfinite(values).any(0)
        if not drawn.any():
            return nothing(NO_LAYER)
        return {
            "data": [
                {
                    "type": "heatmap",
                    "z": decimals(values[kept][:, drawn].T),
                    "x": whole(of.frames_at(updates[kept])),
                    "y": [for_plotly(name) for name, on in zip(layers, drawn, strict=True) if on],
                    "customdata": [whole(updates[kept])] * int(drawn.sum()),
                    "zmin": 0 if judged else -1,
                    "zmax": 1,
                    "colorscale": [list(s) for s in (SEQUENTIAL if judged else DIVERGING)],
                    "colorbar": {
                        "title": {
                            "text": "share in conflict" if judged else "mean cosine",
                            "side": "right",
                        },
                        "thickness": 12,
                        "outlinewidth": 0,
                    },
                    "hovertemplate": "%{y} at %{x:,} frames (update %{customdata}): %{z:.3f}"
                    "<extra></extra>",
                    "hoverongaps": False,
                }
            ],
            "layout": {
                "xaxis": {
                    "title": {"text": "environment frames"},
                    "exponentformat": "SI",
                    "showgrid": False,
                },
                "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
                "margin": {"l": 90},
                "meta": {
                    "click": {"y": "layer", "customdata": "update"},
                    "alt": f"{quantity.replace('_', ' ')} by layer over training.",
                },
            },
        }

    return Panel(
        name="conflict-layers",
        title="Conflict by layer over training",
        reading="Yellow: many pairs of agents in conflict there and then. Click a cell to go "
        "there.",
        definition="Share of agent pairs with the verdict conflict, of the chosen space; the mean "
        "plug-in cosine where there are no verdicts.",
        parts=[Part(depends=("run", "network", "space"), draw=draw), cursor_of(runs)],
    )


def _verdicts_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        where = {"network": choices.network, "space": choices.space, "layer": choices.layer}
        conflict, aligned = (of.values(f"{name}_rate", **where) for name in ("conflict", "aligned"))
        array = of.array("conflict_rate")
        if conflict is None or aligned is None or array is None:
            return nothing(NO_INTERVALS)
        updates = array["update"].to_numpy()
        kept = (
            np
            .linspace(0, len(updates) - 1, min(len(updates), of.limits.points))
            .round()
            .astype(int)
        )
        x = whole(of.frames_at(updates[kept]))
        shares = {
            "conflict": (conflict, OKABE_ITO[3]),
            "undecided": (1 - conflict - aligned, "#a9b0b8"),
            "aligned": (aligned, OKABE_ITO[0]),
        }
        traces = [
            {
                "type": "scatter",
                "x": x,
                "y": decimals(values[kept]),
                "customdata": whole(updates[kept]),
                "name": name,
                "mode": "lines" if len(x) > 1 else "markers",
                "line": {"width": 0.5, "color": colour},
                "fillcolor": colour,
                "stackgroup": "verdict",
                "hovertemplate": "%{y:.0%} at %{x:,} frames (update %{customdata})<extra>"
                f"{name}</extra>",
            }
            for name, (values, colour) in shares.items()
        ]
        found = np.isfinite(conflict).any()
        return {
            "data": traces,
            "layout": {
                "xaxis": {
                    "title": {"text": "environment frames"},
                    "exponentformat": "SI",
                    "rangemode": "tozero",
                },
                "yaxis": {"title": {"text": "share of pairs"}, "range": [0, 1]},
                "annotations": [] if found else message(NO_LAYER),
                "meta": {
                    "click": {"customdata": "update"},
                    "alt": f"Shares of pairs in conflict, undecided and aligned; conflict last "
                    f"{conflict[-1]:.0%}.",
                },
            },
        }

    return Panel(
        name="verdicts",
        title="Verdicts over training",
        reading="How many pairs are in conflict, how many aligned, and of how many nothing can be "
        "said.",
        definition="Shares of all pairs of agents in the chosen space, at 5 % false discoveries.",
        parts=[
            Part(depends=("run", "network", "space", "layer"), draw=draw),
            cursor_of(runs),
        ],
    )


def _cancelled_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        lines = [
            line(
                of,
                "cancelled_norm",
                Mark(f"{letter}, summed over agents", colour, ""),
                where={"network": choices.network, "space": space, "layer": choices.layer},
            )
            for space, letter, colour in (("psi", "g", OKABE_ITO[0]), ("theta", "Z", OKABE_ITO[1]))
        ]
        return lines_figure(
            [found for found in lines if found],
            {"title": {"text": "share of length cancelled"}, "range": [-0.02, 1.02]},
        )

    return Panel(
        name="cancelled",
        title="Length lost in the sum",
        reading="0: all agents pull one way; 1: their pulls cancel altogether.",
        definition="1 - |Σ gᵢ| / Σ |gᵢ|, plug-in. Orthogonal gradients of n agents give 1 - 1/√n.",
        parts=[Part(depends=("run", "network", "layer"), draw=draw), cursor_of(runs)],
    )


def _aggregation_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        where = {"network": choices.network}
        plain, applied = ({**where, "direction": d} for d in ("plain", "applied"))
        lines = [
            line(of, name, Mark(label, colour, ""), where=place)
            for name, label, colour, place in (
                ("aggregated_cosine", "cosine of the applied to the sum", OKABE_ITO[0], where),
                ("aggregated_length", "length of the applied over the sum's", OKABE_ITO[2], where),
                ("opposed_agents", "agents opposed by the sum", OKABE_ITO[3], plain),
                ("opposed_agents", "agents opposed by the applied", OKABE_ITO[1], applied),
            )
        ]
        return lines_figure(
            [found for found in lines if found],
            {"title": {"text": "cosine, ratio, share"}},
            empty="no aggregator: the agents' gradients are summed (gradlab train --aggregate)",
        )

    return Panel(
        name="aggregation",
        title="What the aggregator did",
        reading="Cosine and ratio of 1: nothing. How many agents the step goes against, before and "
        "after.",
        definition="Of a run with --aggregate: the gradient that was applied beside the sum of the "
        "agents' gradients, means over the minibatches of an update. An agent is opposed whose own "
        "gradient has a cosine below -0.001 with it.",
        parts=[Part(depends=("run", "network"), draw=draw), cursor_of(runs)],
    )

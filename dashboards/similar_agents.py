"""Which agents want similar changes: their order, and a tree."""

import numpy as np
from scipy.cluster.hierarchy import dendrogram

from analyses.similarity import similarity_order, similarity_tree
from dashboards.choices import Choices
from dashboards.colours import Mark
from dashboards.lines import NOT_RECORDED
from dashboards.panel import Figure, Panel, Part
from dashboards.style import QUIET, nothing, rounded
from dashboards.tables import Runs, RunTables
from dashboards.text import for_plotly


def agent_order(of: RunTables, order: str) -> list[int]:
    """Order a run's agents.

    Args:
        of: The run's.
        order: "number", or "similarity" of what they want, by the mean cosine of Z over training.

    Returns:
        Their numbers.
    """
    if order == "similarity":
        distance = wishes(of)
        if distance is not None:
            return of.once("order", lambda: similarity_order(distance))
    return list(range(len(of.agents)))


def wishes(of: RunTables) -> np.ndarray | None:
    """1 less the mean over training of the cosine of Z."""

    def find() -> np.ndarray | None:
        networks = of.labels("network")
        if not networks or not of.pairs:
            return None
        cosine = of.values("cosine", network=networks[0], space="theta", layer="all")
        if cosine is None:
            return None
        known = np.isfinite(cosine).sum(0)
        return np.asarray(1 - np.nansum(cosine, 0) / np.maximum(known, 1))

    return of.once("wishes", find)


def tree_panel(runs: Runs) -> Panel:
    """Draw which agents want similar changes, as a tree.

    Args:
        runs: The runs by name.

    Returns:
        The panel.
    """

    def draw(choices: Choices) -> Figure:
        of = runs[choices.run]
        distance = wishes(of)
        if distance is None or len(distance) < 3:
            return nothing(NOT_RECORDED if of.array("cosine") is None else "needs three agents")
        return tree_figure(distance, of.agents, "1 - mean cosine of Z")

    return Panel(
        name="agents-tree",
        title="Agents that want the same",
        reading="Agents that join low down want similar changes over the whole training.",
        definition="Average linkage of 1 less the cosine of Z (plug-in, whole network, the mean "
        "over training). `Order: by similarity` sorts the matrices like this.",
        parts=[Part(depends=("run",), draw=draw)],
    )


def tree_figure(distance: np.ndarray, marks: list[Mark], unit: str) -> Figure:
    """Draw a tree of agents.

    Args:
        distance: Distances [agent, agent_other].
        marks: The agents'.
        unit: What the distances are.

    Returns:
        The figure; its last trace is the leaves.
    """
    shape = dendrogram(similarity_tree(distance), no_plot=True)
    leaves = [int(leaf) for leaf in shape["ivl"]]
    x, y = ([n for row in shape[name] for n in (*row, None)] for name in ("icoord", "dcoord"))
    places = [5 + 10 * n for n in range(len(leaves))]
    return {
        "data": [
            {
                "type": "scatter",
                "mode": "lines",
                "x": x,
                "y": [None if n is None else rounded([n])[0] for n in y],
                "line": {"color": QUIET, "width": 1.5},
                "hoverinfo": "skip",
                "showlegend": False,
            },
            {
                "type": "scatter",
                "mode": "markers",
                "x": places,
                "y": [0] * len(leaves),
                "customdata": leaves,
                "hovertext": [for_plotly(marks[leaf].label, 60) for leaf in leaves],
                "hovertemplate": "%{customdata}: %{hovertext}<extra></extra>",
                "marker": {
                    "size": 9,
                    "color": [marks[leaf].colour for leaf in leaves],
                    "symbol": [marks[leaf].shape for leaf in leaves],
                },
                "cliponaxis": False,
                "showlegend": False,
            },
        ],
        "layout": {
            "xaxis": {
                "tickvals": places,
                "ticktext": [str(leaf) for leaf in leaves],
                "title": {"text": "agent"},
                "showgrid": False,
            },
            "yaxis": {"title": {"text": unit}, "rangemode": "tozero"},
            "meta": {
                "click": {"customdata": "agent"},
                "alt": "Agents in order of similarity: " + ", ".join(map(str, leaves)),
            },
        },
    }

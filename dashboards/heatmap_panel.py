"""Cosines between agents' gradients at one update, as a matrix."""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from dashboards.colours import DIVERGING, UNDEFINED
from dashboards.panel import Frame, Panel, Part, Patch, empty_figure, message
from dashboards.text import elide, for_plotly

MOST_LABELLED = 10  # agents whose matrix has room for numbers
STRUCTURAL_ZERO = "0*"


def heatmap_panel(
    cosine: xr.DataArray,
    names: list[str],
    *,
    title: str,
    reading: str,
    definition: str,
    structural_zeros: bool = False,
) -> Panel:
    """Draw the cosines of one space.

    Args:
        cosine: Cosines [update, network, layer, agent, agent_other] in -1..1.
        names: The agents' names in order.
        title: The panel's.
        reading: How to read it.
        definition: What is drawn.
        structural_zeros: Whether the sharing scheme makes all pairs of different agents zero;
            they are then written "0*".

    Returns:
        The panel; its one trace is the matrix.
    """
    agents = cosine.sizes["agent"]
    labelled = agents <= MOST_LABELLED
    escaped = [for_plotly(elide(name, 40)) for name in names]
    ticks = {
        "tickvals": list(range(agents)),
        "ticktext": [f"agent {n}" if agents <= 4 else str(n) for n in range(agents)],
        "tickfont": {"size": 12 if agents <= 16 else 9},
        "tickangle": 0,
        "showgrid": False,
        "ticks": "",
        "showline": False,
        "range": [-0.5, agents - 0.5],
        "constrain": "domain",
    }
    trace = go.Heatmap(
        z=[[None] * agents] * agents,
        x=list(range(agents)),
        y=list(range(agents)),
        hovertext=[[f"{row} and {column}" for column in escaped] for row in escaped],
        hovertemplate="%{hovertext}<br>cosine %{z:.3f}<extra></extra>",
        hoverongaps=False,
        zmin=-1,
        zmax=1,
        colorscale=[list(stop) for stop in DIVERGING],
        xgap=1,
        ygap=1,
        colorbar={
            "title": {"text": "cosine", "side": "top", "font": {"size": 12}},
            "tickvals": [-1, -0.5, 0, 0.5, 1],
            "tickfont": {"size": 12},
            "thickness": 10,
            "orientation": "h",
            "len": 0.5,
            "y": -0.12,
            "yanchor": "top",
            "outlinewidth": 0,
        },
        texttemplate="%{text}" if labelled and structural_zeros else "%{z:.2f}" if labelled else "",
        textfont={"size": 13 if agents <= 6 else 10},
    )
    figure = empty_figure(
        [trace],
        plot_bgcolor=UNDEFINED,
        xaxis=ticks,
        yaxis=ticks | {"range": [agents - 0.5, -0.5], "scaleanchor": "x"},
        margin={"l": 32, "r": 32, "t": 8, "b": 76},
    )
    blank: Patch = {"z": [[None] * agents] * agents}
    networks = [str(network) for network in cosine["network"].to_numpy()]
    layers = [str(layer) for layer in cosine["layer"].to_numpy()]
    updates = [int(update) for update in cosine["update"].to_numpy()]
    values = np.round(cosine.to_numpy().astype(float), 3) + 0.0  # no "-0"
    frames = {
        f"{network}|{layer}|{update}": _frame(values[u, n, k], structural_zeros=structural_zeros)
        for n, network in enumerate(networks)
        for k, layer in enumerate(layers)
        for u, update in enumerate(updates)
        if np.isfinite(values[u, n, k]).any()
    }
    return Panel(
        title=title,
        reading=reading,
        definition=definition + (_zeros_note() if structural_zeros else ""),
        figure=figure,
        parts=[
            Part(
                depends=("network", "layer", "update"),
                frames=frames,
                absent=Frame(
                    [blank],
                    message(
                        "undefined: this space of this network has no such layer, "
                        "or all of its gradients are zero"
                    ),
                ),
                updates=updates,
            )
        ],
        height=440,
    )


def _frame(matrix: np.ndarray, *, structural_zeros: bool) -> Frame:
    cells = [[None if np.isnan(cell) else cell for cell in row] for row in matrix.tolist()]
    patch: Patch = {"z": cells}
    agents = len(cells)
    if structural_zeros and agents <= MOST_LABELLED:
        patch["text"] = [
            [
                "" if cell is None else STRUCTURAL_ZERO if i != j and cell == 0 else f"{cell:.2f}"
                for j, cell in enumerate(row)
            ]
            for i, row in enumerate(cells)
        ]
    annotations: list[object] = []
    if agents <= MOST_LABELLED:
        annotations = [
            {
                "text": "undefined" if agents <= 5 else "n/a",
                "x": j,
                "y": i,
                "showarrow": False,
                "font": {"size": 11, "color": "#4a545e"},
            }
            for i, row in enumerate(cells)
            for j, cell in enumerate(row)
            if cell is None
        ]
    return Frame([patch], {"annotations": annotations})


def _zeros_note() -> str:
    return (
        f" {STRUCTURAL_ZERO}: a structural zero; agents without shared parameters cannot interfere,"
        " so these zeros are no measurement."
    )

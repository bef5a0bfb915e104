"""What holds between agents at one update, as matrices with an order that can be chosen."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dashboards.choices import Choices
from dashboards.colours import DIVERGING, FADED, SEQUENTIAL, UNDEFINED, Mark
from dashboards.panel import Figure, Part
from dashboards.style import decimals, message, rounded
from dashboards.text import elide, for_plotly

MOST_LABELLED = 10  # agents whose matrix has room for numbers
MOST_NAMED = 16  # agents whose matrix has room for the name of each


def matrix_figure(
    values: np.ndarray,
    marks: Sequence[Mark],
    *,
    unit: str,
    limits: tuple[float, float],
    diverging: bool,
    faded: np.ndarray | None = None,
    structural_zeros: bool = False,
    form: str = ".2f",
    empty: str = "",
    rows: str = "agent",
    columns: str = "other agent",
) -> Figure:
    """Draw a matrix over pairs of agents.

    Args:
        values: Numbers [agent, agent_other], NaN where undefined.
        marks: The agents'.
        unit: What the numbers are, for the colour bar.
        limits: The numbers at the ends of the colour scale.
        diverging: Whether zero is the middle of the scale.
        faded: Which cells are undecided [agent, agent_other].
        structural_zeros: Whether zeros off the diagonal are none by measurement; they are then
            written "0*".
        form: How numbers are written, as d3 has it.
        empty: What to say if all is undefined.
        rows: What the rows are.
        columns: What the columns are.

    Returns:
        A figure of two traces: the matrix, and what fades its undecided cells.
    """
    agents = len(marks)
    numbers = [str(number) for number in range(agents)]
    names = [for_plotly(elide(mark.label, 40)) for mark in marks]
    large = limits[1] != 1
    # Where no numbers are written, colours do not show a third decimal.
    places = 3 if agents <= MOST_LABELLED else 2
    cells = [rounded(row) for row in values] if large else decimals(values, places)
    axis = {
        "type": "category",
        "showgrid": False,
        "ticks": "",
        "showline": False,
        "constrain": "domain",
        "tickangle": 0,
        "automargin": False,  # its labels are short: measuring them is what drawing costs most
        "tickfont": {"size": 12 if agents <= 16 else 10},
        "tickmode": "linear",
        "dtick": 1 + (agents - 1) // MOST_NAMED,
    }
    labelled = agents <= MOST_LABELLED
    gap = 1 if labelled else 0  # a matrix without gaps is drawn as a picture, much faster
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": cells,
        "x": numbers,
        "y": numbers,
        "hovertext": [[f"{row} and {column}" for column in names] for row in names],
        "hovertemplate": "%{y}, %{x}: %{hovertext}<br>" + unit + " %{z:.3g}<extra></extra>",
        "hoverongaps": False,
        "zmin": limits[0],
        "zmax": limits[1],
        "colorscale": [list(stop) for stop in (DIVERGING if diverging else SEQUENTIAL)],
        "xgap": gap,
        "ygap": gap,
        "colorbar": {
            "title": {"text": unit, "side": "top", "font": {"size": 12}},
            "tickfont": {"size": 11},
            "thickness": 10,
            "orientation": "h",
            "len": 0.6,
            "y": -0.16,
            "yanchor": "top",
            "outlinewidth": 0,
            "tickvals": [limits[0], sum(limits) / 2, limits[1]],
            "tickformat": ".3~g",
        },
        "texttemplate": ("%{text}" if structural_zeros else f"%{{z:{form}}}") if labelled else "",
        "textfont": {"size": 13 if agents <= 6 else 10},
    }
    if structural_zeros and labelled:
        trace["text"] = [
            [
                "" if cell is None else "0*" if i != j and cell == 0 else f"{cell:.2f}"
                for j, cell in enumerate(row)
            ]
            for i, row in enumerate(cells)
        ]
    mask: dict[str, Any] = {
        "type": "heatmap",
        "z": [[1 if cell else None for cell in row] for row in faded.tolist()]
        if faded is not None
        else [[None]],
        "x": numbers if faded is not None else ["0"],
        "y": numbers if faded is not None else ["0"],
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, FADED], [1, FADED]],
        "showscale": False,
        "hoverinfo": "skip",
        "xgap": gap,
        "ygap": gap,
    }
    if faded is not None and labelled:
        # What is under the mask is too pale to be read. Elsewhere two texts would blur each other.
        mask |= {
            "text": [
                [f"{x:.2f}" if pale and x is not None else "" for x, pale in zip(*row, strict=True)]
                for row in zip(cells, faded.tolist(), strict=True)
            ],
            "texttemplate": "%{text}",
            "textfont": {"size": 13 if agents <= 6 else 10, "color": "#4a545e"},
        }
    found = np.isfinite(values).any()
    return {
        "data": [trace, mask],
        "layout": {
            "plot_bgcolor": UNDEFINED,
            "xaxis": axis | {"title": {"text": columns}, "range": [-0.5, agents - 0.5]},
            "yaxis": axis
            | {"title": {"text": rows}, "range": [agents - 0.5, -0.5], "scaleanchor": "x"},
            "margin": {"l": 48, "r": 24, "t": 8, "b": 84},
            "annotations": [] if found else message(empty),
            "meta": {
                "click": {"y": "agent", "x": "other"},
                "alt": _words(values, unit, faded) if found else empty,
            },
        },
    }


def _words(values: np.ndarray, unit: str, faded: np.ndarray | None) -> str:
    off = values.copy()
    np.fill_diagonal(off, np.nan)
    if not np.isfinite(off).any():
        return f"{unit}: a single agent."
    (i, k), (m, n) = (
        np.unravel_index(find(off), off.shape) for find in (np.nanargmin, np.nanargmax)
    )
    said = (
        f"{unit} between agents: from {off[i, k]:.2g} ({i} and {k}) to {off[m, n]:.2g} "
        f"({m} and {n}), mean {np.nanmean(off):.2g}"
    )
    undecided = "" if faded is None else f"; {int(np.triu(faded, 1).sum())} pairs undecided, faded"
    return f"{said}{undecided}."


def order_part(order: Any) -> Part:  # noqa: ANN401 -- Callable[[Choices], Sequence[int]]
    """Sort a matrix' agents.

    Args:
        order: The agents' order for some choices of run and order.

    Returns:
        A part for a panel of a matrix.
    """

    def draw(choices: Choices) -> Figure:
        axis = {
            "categoryorder": "array",
            "categoryarray": [str(agent) for agent in order(choices)],
        }
        return {"layout": {"xaxis": axis, "yaxis": axis}}

    return Part(depends=("run", "order"), draw=draw)


def pair_part(order: Any) -> Part:  # noqa: ANN401 -- Callable[[Choices], Sequence[int]]
    """Frame the chosen pair in a matrix.

    Args:
        order: The agents' order for some choices of run and order.

    Returns:
        A part for a panel of a matrix.
    """

    def draw(choices: Choices) -> Figure:
        place = {agent: position for position, agent in enumerate(order(choices))}
        if choices.agent not in place or choices.other not in place:
            return {"layout": {"shapes": []}}
        x, y = place[choices.other], place[choices.agent]
        return {
            "layout": {
                "shapes": [
                    {
                        "type": "rect",
                        "x0": x - 0.5,
                        "x1": x + 0.5,
                        "y0": y - 0.5,
                        "y1": y + 0.5,
                        "line": {"color": "#e69f00", "width": 3},
                    }
                ]
            }
        }

    return Part(depends=("run", "order", "agent", "other"), draw=draw)

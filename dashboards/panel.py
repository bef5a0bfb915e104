"""A panel: a figure, and what of it changes with the choices in the page's control bar."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, SupportsFloat

import numpy as np
import plotly.graph_objects as go

from dashboards.text import lines_for_plotly

Patch = dict[str, object]
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
GRID = "#e6e9ed"
_INK = "#28313b"


class Frame(NamedTuple):
    """What replaces parts of a figure.

    Attributes:
        data: One patch for each trace; its entries replace the trace's.
        layout: Entries that replace the layout's, or are merged into them if both are objects.
        note: A few words for the panel's badge, e.g. "perplexity 2.33".
    """

    data: Sequence[Patch] = ()
    layout: Mapping[str, object] = {}
    note: str = ""


NOTHING = Frame()


@dataclass(frozen=True, kw_only=True)
class Part:
    """Frames by the choices they depend on.

    Attributes:
        depends: Some of "network", "layer", "update".
        frames: By the values of `depends`, in that order, joined by "|".
        absent: Takes the place of a frame that there is none of.
        updates: The updates with frames, if `depends` has "update"; the nearest earlier one is
            shown.
    """

    depends: tuple[str, ...]
    frames: Mapping[str, Frame]
    absent: Frame = NOTHING
    updates: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One figure with its words.

    Attributes:
        title: Plain text.
        reading: How to read it, in one plain sentence.
        definition: What exactly is drawn.
        figure: What does not change.
        parts: What does; later ones are laid over earlier ones.
        height: In CSS pixels.
    """

    title: str
    reading: str
    definition: str
    figure: go.Figure
    parts: Sequence[Part] = field(default=())
    height: int = 380


def empty_figure(traces: Iterable[object] = (), **layout: object) -> go.Figure:
    """Start a figure in the page's style.

    Args:
        traces: Its traces.
        **layout: Entries of the layout that replace the style's.

    Returns:
        The figure.
    """
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": "#b8bfc7",
        "showline": True,
        "ticks": "outside",
        "tickcolor": "#b8bfc7",
        "ticklen": 4,
        "automargin": True,
        "title": {"font": {"size": 13}, "standoff": 10},
    }
    style: dict[str, object] = {
        "template": {"layout": {"xaxis": axis, "yaxis": axis}},
        "font": {"family": _FONT, "size": 13, "color": _INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "#ffffff",
        "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
        "hoverlabel": {"font": {"family": _FONT, "size": 12}, "namelength": -1},
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "font": {"size": 12},
        },
        "uirevision": "keep",
    }
    return go.Figure(data=list(traces), layout=style | layout)


def message(sentence: str) -> Patch:
    """Lay out a sentence in the middle of a plot instead of data.

    Args:
        sentence: Plain text, e.g. why there is nothing to draw; nothing if empty.

    Returns:
        A patch for the layout.
    """
    if not sentence:
        return {"annotations": []}
    return {
        "annotations": [
            {
                "text": lines_for_plotly(sentence),
                "xref": "paper",
                "yref": "paper",
                "x": 0.5,
                "y": 0.5,
                "xanchor": "center",
                "yanchor": "middle",
                "showarrow": False,
                "font": {"size": 13, "color": "#5b6672"},
                "bgcolor": "rgba(255,255,255,0.85)",
                "borderpad": 6,
            }
        ]
    }


def message_panel(title: str, reading: str, definition: str, sentence: str) -> Panel:
    """Make a panel that only says why there is nothing to draw.

    Args:
        title: Plain text.
        reading: How the panel would be read.
        definition: What it would show.
        sentence: Why it does not.

    Returns:
        The panel.
    """
    hidden = {"visible": False, "range": [0, 1]}
    figure = empty_figure(
        [go.Scatter(x=[], y=[], showlegend=False)], xaxis=hidden, yaxis=hidden, **message(sentence)
    )
    return Panel(title=title, reading=reading, definition=definition, figure=figure, height=220)


def rounded(values: Iterable[SupportsFloat]) -> list[float | None]:
    """Shorten numbers for the page.

    Args:
        values: Numbers.

    Returns:
        The numbers to four significant digits; what is not finite is None, which plotly leaves
        out and JSON can hold.

    >>> rounded([0.123456, 1234567.0, math.nan])
    [0.1235, 1235000.0, None]
    """
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in map(float, values)]


def whole(values: Iterable[SupportsFloat]) -> list[int | None]:
    """Make counts of numbers that hold counts.

    Args:
        values: Numbers such as cumulative frames.

    Returns:
        Integers, None where a number is not finite.
    """
    return [int(value) if math.isfinite(value) else None for value in map(float, values)]


def padded_range(values: np.ndarray) -> list[float]:
    """Find an axis range that stays the same while the slider moves.

    Args:
        values: All that will ever be drawn on the axis, NaN left out.

    Returns:
        Lower and upper end with a margin of a twelfth.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return [-1.0, 1.0]
    low, high = float(finite.min()), float(finite.max())
    margin = (high - low) / 12 or max(abs(high), 1.0) / 12
    return [float(f"{low - margin:.4g}"), float(f"{high + margin:.4g}")]


def shown(panel: Panel, **choices: object) -> go.Figure:
    """Make the figure that the page shows for some choices, as its script does.

    Args:
        panel: A panel.
        **choices: Values of "network", "layer" and "update".

    Returns:
        A new figure.
    """
    figure = panel.figure.to_plotly_json()
    for part in panel.parts:
        values = dict(choices)
        if "update" in part.depends and part.updates:
            wanted = int(str(choices["update"]))
            values["update"] = max(
                (u for u in part.updates if u <= wanted), default=part.updates[0]
            )
        key = "|".join(str(values[name]) for name in part.depends)
        frame = part.frames.get(key, part.absent)
        for trace, patch in zip(figure["data"], frame.data, strict=False):
            trace.update(patch)
        for name, value in frame.layout.items():
            old = figure["layout"].get(name)
            if isinstance(old, dict) and isinstance(value, Mapping):
                value = old | dict(value)
            figure["layout"][name] = value
    return go.Figure(figure)

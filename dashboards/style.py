"""How figures look: one template for light and one for dark, and how numbers are written."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, SupportsFloat

import numpy as np

from dashboards.text import lines_for_plotly

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
QUIET = "#7d8893"  # lines and words that stand back, on white as on black
FRAMES: Mapping[str, Any] = {
    "title": {"text": "environment frames"},
    "rangemode": "tozero",
    "exponentformat": "SI",
}
_INK = {
    "light": {"ink": "#28313b", "grid": "#e6e9ed", "axis": "#b8bfc7", "ground": "#ffffff"},
    "dark": {"ink": "#dbe2e9", "grid": "#2c3742", "axis": "#566370", "ground": "#161d25"},
}
THEMES = tuple(_INK)


def template(theme: str) -> dict[str, Any]:
    """Make what all figures share.

    Args:
        theme: "light" or "dark".

    Returns:
        A plotly template.
    """
    colours = _INK[theme]
    axis = {
        "gridcolor": colours["grid"],
        "zeroline": False,
        "linecolor": colours["axis"],
        "showline": True,
        "ticks": "outside",
        "tickcolor": colours["axis"],
        "ticklen": 4,
        "exponentformat": "power",
        "automargin": True,
        "title": {"font": {"size": 13}, "standoff": 10},
    }
    room = {
        "backgroundcolor": colours["ground"],
        "gridcolor": colours["grid"],
        "linecolor": colours["axis"],
        "zeroline": False,
    }
    layout: dict[str, Any] = {
        "xaxis": axis,
        "yaxis": axis,
        "scene": {f"{letter}axis": room for letter in "xyz"},
        "font": {"family": FONT, "size": 13, "color": colours["ink"]},
        "paper_bgcolor": colours["ground"],
        "plot_bgcolor": colours["ground"],
        "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
        "hoverlabel": {"font": {"family": FONT, "size": 12}, "namelength": -1},
        "hovermode": "closest",
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "font": {"size": 12},
        },
        "annotationdefaults": {"font": {"color": colours["ink"]}},
    }
    return {"layout": layout}


def message(sentence: str, *, y: float = 0.5) -> list[dict[str, Any]]:
    """Lay out a sentence in a plot that has little or nothing to draw.

    Args:
        sentence: Plain text, e.g. why there is nothing to draw; nothing if empty.
        y: Where, from 0 (bottom) to 1.

    Returns:
        Annotations.
    """
    if not sentence:
        return []
    return [
        {
            "text": lines_for_plotly(sentence),
            "xref": "paper",
            "yref": "paper",
            "x": 0.5,
            "y": y,
            "xanchor": "center",
            "yanchor": "middle",
            "showarrow": False,
            "font": {"size": 13, "color": QUIET},
        }
    ]


def nothing(sentence: str) -> dict[str, Any]:
    """Make a figure that only says why there is nothing to draw.

    Args:
        sentence: Plain text.

    Returns:
        The figure.
    """
    hidden = {"visible": False, "range": [0, 1]}
    return {
        "data": [],
        "layout": {
            "xaxis": hidden,
            "yaxis": hidden,
            "annotations": message(sentence),
            "meta": {"alt": sentence, "empty": True},
        },
    }


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


def decimals(values: np.ndarray, places: int = 3) -> list[Any]:
    """Shorten the numbers of a matrix whose size is about 1.

    Args:
        values: Numbers, of any shape.
        places: Decimal places.

    Returns:
        Nested lists, None where a number is not finite, and never -0.

    >>> decimals(np.array([[-0.00001, np.nan], [0.12345, 1.0]]))
    [[0.0, None], [0.123, 1.0]]
    """
    cells = (np.round(values.astype(float), places) + 0.0).astype(object)
    cells[~np.isfinite(values.astype(float))] = None
    nested: list[Any] = cells.tolist()
    return nested


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


def decades(values: Iterable[float | None]) -> list[float]:
    """Place ticks on a logarithmic axis: 1, 2, 5 within few decades, powers of ten beyond.

    Args:
        values: What is drawn; what is not above 0 is passed over.

    Returns:
        The ticks.
    """
    known = [value for value in values if value is not None and value > 0]
    if not known:
        return [1.0]
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    # Several decades apart if there are very many.
    stride = max(1, (high - low) // 8)
    return [float(f"{step}e{power}") for power in range(low, high + 1, stride) for step in steps]


def horizontal(y: float) -> dict[str, Any]:
    """Draw a reference line.

    Args:
        y: Where.

    Returns:
        A shape.
    """
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": y,
        "y1": y,
        "line": {"color": QUIET, "width": 1, "dash": "dot"},
    }


def vertical(x: float) -> dict[str, Any]:
    """Draw an upright reference line.

    Args:
        x: Where.

    Returns:
        A shape.
    """
    return {
        "type": "line",
        "yref": "paper",
        "x0": x,
        "x1": x,
        "y0": 0,
        "y1": 1,
        "line": {"color": QUIET, "width": 1, "dash": "dot"},
    }

"""Quantities over training: lines, bands, and where the slider stands."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analyses.curves import evenly_spaced
from dashboards.choices import Choices
from dashboards.colours import Mark
from dashboards.panel import Figure, Part
from dashboards.style import FRAMES, QUIET, decades, horizontal, message, rounded, whole
from dashboards.tables import Runs, RunTables
from dashboards.text import elide, for_plotly

NOT_RECORDED = (
    "not recorded: the run was made without these diagnostics, is not that far yet, "
    "or its records are damaged"
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line over training.

    Attributes:
        label: For the legend and the hover text, not escaped.
        colour: As "#rrggbb".
        updates: The updates [point].
        frames: Their environment frames [point].
        values: Heights [point], NaN where there is none.
        low: Lower end of a band, if there is one.
        high: Upper end.
        dash: Plotly's name of its dash pattern.
        group: Lines of one group are hidden together; the first has the entry in the legend.
        legend: Whether it has an entry in the legend.
        width: In CSS pixels.
    """

    label: str
    colour: str
    updates: np.ndarray
    frames: np.ndarray
    values: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    dash: str = "solid"
    group: str = ""
    legend: bool = True
    width: float = 2.0


def line(
    tables: RunTables,
    quantity: str,
    mark: Mark,
    *,
    most: int | None = None,
    **style: Any,  # noqa: ANN401
) -> Line | None:
    """Look up a quantity without further axes as a line.

    Args:
        tables: The run's.
        quantity: Its name; a band is drawn if there are `<quantity>_low` and `<quantity>_high`.
        mark: Name and colour.
        most: The most points; by default the run's limit.
        **style: `where`, a label for each further axis; all else is the line's.

    Returns:
        The line without what is NaN at both ends of the training; None if it is not recorded.
    """
    where = style.pop("where", {})
    values = tables.values(quantity, **where)
    if values is None or values.ndim != 1:
        return None
    updates = tables.array(quantity)["update"].to_numpy()  # type: ignore[index]
    ends = [tables.values(f"{quantity}_{end}", **where) for end in ("low", "high")]
    if any(end is None or end.shape != values.shape for end in ends):
        ends = [None, None]
    return curve(tables, updates, values, mark, low=ends[0], high=ends[1], most=most, **style)


def curve(
    tables: RunTables,
    updates: np.ndarray,
    values: np.ndarray,
    mark: Mark,
    *,
    low: np.ndarray | None = None,
    high: np.ndarray | None = None,
    most: int | None = None,
    **style: Any,  # noqa: ANN401 -- a line's attributes
) -> Line:
    """Make a line of numbers over updates, thinned to the run's limit.

    Args:
        tables: The run's.
        updates: Updates [point].
        values: Heights [point].
        mark: Name and colour.
        low: Lower end of a band.
        high: Upper end.
        most: The most points; by default the run's limit.
        **style: The line's.

    Returns:
        The line.
    """
    kept = evenly_spaced(list(range(len(updates))), most or tables.limits.points)
    return Line(
        **{"label": mark.label, "colour": mark.colour, "group": mark.label}
        | style
        | {
            "updates": updates[kept],
            "frames": tables.frames_at(updates[kept]),
            "values": values[kept].astype(float),
            "low": None if low is None else low[kept],
            "high": None if high is None else high[kept],
        },
    )


def lines_figure(
    lines: Sequence[Line],
    y: dict[str, Any],
    *,
    reference: float | None = None,
    empty: str = NOT_RECORDED,
    key: Sequence[tuple[str, str]] = (),
    unit: str = "",
    note: str = "",
    **layout: Any,  # noqa: ANN401 -- plotly's JSON
) -> Figure:
    """Draw lines over environment frames.

    Args:
        lines: The lines.
        y: The y axis, with its title.
        reference: Where to draw a horizontal line, if at all.
        empty: What to say if there is nothing to draw.
        key: Further entries of the legend: label and dash pattern.
        unit: Unit of the heights, for the hover text.
        note: For the panel's corner.
        **layout: Further entries of the layout.

    Returns:
        A figure: for each line its band's two ends, if it has a band, then the line; then the key.
    """
    log = y.get("type") == "log"
    traces: list[dict[str, Any]] = []
    heights: list[float | None] = []
    seen: set[str] = set()
    for one in lines:
        values = _positive(one.values) if log else one.values
        drawn = rounded(values)
        heights += drawn
        x = whole(one.frames)
        if one.low is not None and one.high is not None:
            ends = [_positive(end) if log else end for end in (one.low, one.high)]
            traces += band(x, *ends, colour=one.colour, group=for_plotly(one.group, 80))
        entry = one.legend and one.group not in seen
        seen.add(one.group)
        traces.append({
            "type": "scatter",
            "x": x,
            "y": drawn,
            "customdata": whole(one.updates),
            "name": for_plotly(one.label, 32),
            "legendgroup": for_plotly(one.group, 80),
            "showlegend": entry,
            "mode": "lines+markers" if len(x) == 1 else "lines",
            "connectgaps": False,
            "line": {"color": one.colour, "width": one.width, "dash": one.dash},
            "hovertemplate": f"%{{y:.4g}} {unit}".rstrip()
            + f" at %{{x:,}} frames (update %{{customdata}})<extra>{_in_template(one.label)}"
            "</extra>",
        })
    traces += [
        {
            "type": "scatter",
            "x": [None],
            "y": [None],
            "mode": "lines",
            "name": label,
            "line": {"color": QUIET, "width": 2, "dash": dash},
            "hoverinfo": "skip",
        }
        for label, dash in key
    ]
    found = any(height is not None for height in heights)
    axis = y | ({"tickvals": decades(heights), "exponentformat": "power"} if log else {})
    return {
        "data": traces,
        "layout": {
            "xaxis": dict(FRAMES),
            "yaxis": axis,
            "shapes": [] if reference is None else [horizontal(reference)],
            "annotations": [] if found else message(empty),
            "meta": {
                "click": {"customdata": "update"},
                "alt": _words(lines, y) if found else empty,
                "note": note,
            },
        }
        | layout,
    }


def band(
    x: Sequence[int | None] | Sequence[float | None],
    low: Iterable[float],
    high: Iterable[float],
    *,
    colour: str,
    group: str,
) -> list[dict[str, Any]]:
    """Draw a band behind a line.

    Args:
        x: Where.
        low: Its lower end.
        high: Its upper end.
        colour: The line's, as "#rrggbb".
        group: The line's in the legend, escaped.

    Returns:
        Two traces.
    """
    red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    return [
        {
            "type": "scatter",
            "x": x,
            "y": rounded(end),
            "mode": "lines",
            "line": {"width": 0, "color": colour},
            "legendgroup": group,
            "showlegend": False,
            "hoverinfo": "skip",
            "connectgaps": False,
        }
        | ({"fill": "tonexty", "fillcolor": f"rgba({red},{green},{blue},0.2)"} if number else {})
        for number, end in enumerate((low, high))
    ]


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, np.nan)


def _words(lines: Sequence[Line], y: dict[str, Any]) -> str:
    """What is seen, for those who do not see it."""
    said = []
    for one in lines[:8]:
        known = one.values[np.isfinite(one.values)]
        if known.size:
            said.append(f"{elide(one.label)} from {known[0]:.3g} to {known[-1]:.3g}")
    title = y.get("title", {}).get("text", "")
    more = f" and {len(lines) - 8} more lines" if len(lines) > 8 else ""
    return f"Over training, {title}: {'; '.join(said)}{more}."


def cursor(tables: Callable[[Choices], Sequence[RunTables]], *, of_run: bool = False) -> Part:
    """Mark where in training the slider stands.

    Args:
        tables: The runs that are drawn.
        of_run: Whether they depend on the chosen run.

    Returns:
        A part for a panel over environment frames.
    """

    def draw(choices: Choices) -> Figure:
        places = {float(of.frames_at(np.array([choices.update]))[0]) for of in tables(choices)}
        return {
            "layout": {
                "shapes": [
                    {
                        "type": "line",
                        "yref": "paper",
                        "x0": x,
                        "x1": x,
                        "y0": 0,
                        "y1": 1,
                        "line": {"color": QUIET, "width": 1},
                    }
                    for x in sorted(int(place) for place in places if np.isfinite(place))
                ]
            }
        }

    return Part(depends=("run", "update") if of_run else ("update",), draw=draw)


def cursor_of(runs: Runs) -> Part:
    """Mark the slider's update in a panel of one run.

    Args:
        runs: The runs by name.

    Returns:
        A part for a panel over environment frames.
    """
    return cursor(lambda choices: [runs[choices.run]], of_run=True)


def thinned(tables: Sequence[RunTables], quantity: str) -> str:
    """Say how many of a line's points are left out.

    Args:
        tables: The runs'.
        quantity: What is drawn.

    Returns:
        A sentence with a space in front, or nothing.
    """
    most = max((of.count(quantity) for of in tables), default=0)
    limit = min((of.limits.points for of in tables), default=most)
    return f" {limit} of up to {most} updates are drawn." if most > limit else ""


def _in_template(name: str) -> str:
    """A hover template also reads "%{...}"; a name must not be able to start one."""
    return for_plotly(elide(name, 60)).replace("%", "&#37;")

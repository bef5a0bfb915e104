"""Quantities over training, all runs in one figure."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.curves import evenly_spaced
from dashboards.colours import Mark
from dashboards.panel import Frame, Panel, Part, Patch, empty_figure, message, rounded, whole
from dashboards.text import elide, for_plotly

MOST_POINTS = 1000
_FRAMES = {"title": {"text": "environment frames"}, "rangemode": "tozero", "exponentformat": "SI"}


class Line(NamedTuple):
    """A kind of line that every run has one of.

    Attributes:
        where: Which rows of the table it draws, as column and value.
        label: For the legend and the hover text.
        dash: Plotly's name of its dash pattern.
    """

    where: tuple[str, str]
    label: str
    dash: str


SPACES = (
    Line(("space", "psi"), "g: trained parameters ψ", "solid"),
    Line(("space", "theta"), "Z: policy parameters θ", "dash"),
)
PARTS = (
    Line(("part", "within"), "within agents", "solid"),
    Line(("part", "between"), "between agents", "dash"),
)


def learning_panel(curves: Sequence[tuple[Mark, pd.DataFrame]], cursor: Part) -> Panel:
    """Draw the learning curves.

    Args:
        curves: For each run the table of `learning_curve`.
        cursor: Marks the slider's update.

    Returns:
        The panel.
    """
    traces = []
    for mark, table in curves:
        kept = _thinned(table)
        traces.append(
            go.Scatter(
                x=whole(kept["frames"]),
                y=rounded(kept["episode_return"]),
                customdata=whole(kept["update"]),
                name=for_plotly(mark.label, 24),
                mode="lines+markers" if len(kept) == 1 else "lines",
                line={"color": mark.colour, "width": 2},
                marker={"color": mark.colour, "symbol": mark.shape, "size": 7},
                hovertemplate="%{y:.4g} at %{x:,} frames (update %{customdata})"
                f"<extra>{_in_template(mark.label)}</extra>",
                showlegend=True,
            )
        )
    figure = empty_figure(
        traces,
        xaxis=_FRAMES,
        yaxis={"title": {"text": "mean episode return"}},
        hovermode="closest",
        **message("" if any(len(table) for _, table in curves) else "no episode has ended yet"),
    )
    most = max((len(table) for _, table in curves), default=0)
    thinned = f" {MOST_POINTS} of up to {most} points are drawn." if most > MOST_POINTS else ""
    return Panel(
        title="Learning curves",
        reading="Higher is better. The thin vertical line marks the slider's update.",
        definition="Mean undiscounted return of the episodes that ended in an update; updates in "
        f"which none ended are left out.{thinned}",
        figure=figure,
        parts=[cursor],
    )


def quantity_panel(
    tables: Sequence[tuple[Mark, pd.DataFrame]],
    lines: Sequence[Line],
    cursor: Part,
    *,
    title: str,
    reading: str,
    definition: str,
    axis: dict[str, object],
    reference: float | None = None,
) -> Panel:
    """Draw one quantity over training, by network and layer.

    Args:
        tables: For each run a table of `series` with columns network, layer and those in `lines`.
        lines: The kinds of line for each run.
        cursor: Marks the slider's update.
        title: The panel's.
        reading: How to read it.
        definition: What is drawn.
        axis: The y axis, with its title.
        reference: Where to draw a horizontal line, if at all.

    Returns:
        The panel, with lines "run, kind" in the order of the runs, then of `lines`.
    """
    traces: list[go.Scatter] = [
        go.Scatter(
            x=[],
            y=[],
            name=for_plotly(mark.label, 24),
            legendgroup=f"run-{number}",
            showlegend=line is lines[0],
            mode="lines",
            connectgaps=False,
            line={"color": mark.colour, "width": 2, "dash": line.dash},
            hovertemplate="%{y:.3g} at %{x:,} frames (update %{customdata})"
            f"<extra>{_in_template(mark.label)}<br>{line.label}</extra>",
        )
        for number, (mark, _) in enumerate(tables)
        for line in lines
    ]
    key = [
        go.Scatter(
            x=[None],
            y=[None],
            mode="lines",
            name=line.label,
            line={"color": "#6b7580", "width": 2, "dash": line.dash},
            hoverinfo="skip",
        )
        for line in lines
    ]
    shapes = [] if reference is None else [_horizontal(reference)]
    figure = empty_figure(
        [*traces, *key], xaxis=_FRAMES, yaxis=axis, hovermode="closest", shapes=shapes
    )
    nothing: list[Patch] = [{"x": [], "y": []} for _ in traces]
    part = Part(
        depends=("network", "layer"),
        frames=_frames(tables, lines, log=axis.get("type") == "log"),
        absent=Frame(nothing, message("not recorded for this network and layer")),
    )
    if shapes:
        cursor = Part(
            depends=cursor.depends,
            updates=cursor.updates,
            frames={
                k: Frame(layout={"shapes": [*shapes, *_shapes(frame)]})
                for k, frame in cursor.frames.items()
            },
            absent=Frame(layout={"shapes": shapes}),
        )
    return Panel(
        title=title,
        reading=reading,
        definition=definition + _thinning_note(tables),
        figure=figure,
        parts=[part, cursor],
    )


def cursor_part(frames: dict[int, set[int]]) -> Part:
    """Mark where in training the slider stands.

    Args:
        frames: For each of the slider's updates the environment frames, which may differ by run.

    Returns:
        A part of a panel whose x axis is frames.
    """
    return Part(
        depends=("update",),
        updates=sorted(frames),
        frames={
            str(update): Frame(
                layout={
                    "shapes": [
                        {
                            "type": "line",
                            "yref": "paper",
                            "x0": x,
                            "x1": x,
                            "y0": 0,
                            "y1": 1,
                            "line": {"color": "#9aa3ad", "width": 1},
                        }
                        for x in sorted(places)
                    ]
                }
            )
            for update, places in frames.items()
        },
    )


def _frames(
    tables: Sequence[tuple[Mark, pd.DataFrame]], lines: Sequence[Line], *, log: bool
) -> dict[str, Frame]:
    keys: dict[tuple[str, str], None] = {}
    groups: list[dict[tuple[str, ...], pd.DataFrame]] = []
    columns = ["network", "layer", lines[0].where[0]]
    for _, table in tables:
        kept = _thinned(table)
        found = {
            tuple(str(label) for label in labels): group
            for labels, group in kept.groupby(columns, sort=False, observed=True)
        }
        groups.append(found)
        keys |= {(network, layer): None for network, layer, _ in found}
    frames = {}
    for network, layer in keys:
        patches: list[Patch] = []
        drawn = False
        for found in groups:
            for line in lines:
                group = found.get((network, layer, line.where[1]))
                if group is None:
                    patches.append({"x": [], "y": [], "customdata": []})
                    continue
                values = group["value"].to_numpy()
                if log:
                    values = np.where(values > 0, values, np.nan)
                y = rounded(values)
                drawn = drawn or any(value is not None for value in y)
                patches.append({
                    "x": whole(group["frames"]),
                    "y": y,
                    "customdata": whole(group["update"]),
                })
        reason = "" if drawn else "undefined here: no such layer, no two agents, or no verdicts"
        layout = message(reason) | ({"yaxis": {"tickvals": _decades(patches)}} if log else {})
        frames[f"{network}|{layer}"] = Frame(patches, layout)
    return frames


def _decades(patches: Sequence[Patch]) -> list[float]:
    """Place ticks on a logarithmic axis: 1, 2, 5 within two decades, powers of ten beyond."""
    lists = [patch["y"] for patch in patches]
    values = [value for y in lists if isinstance(y, list) for value in y if value is not None]
    if not values:
        return [1.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    # Several decades apart if there are very many.
    stride = max(1, (high - low) // 8)
    return [float(f"{step}e{power}") for power in range(low, high + 1, stride) for step in steps]


def _thinned(table: pd.DataFrame) -> pd.DataFrame:
    updates = table["update"].unique()
    if len(updates) <= MOST_POINTS:
        return table
    return table[table["update"].isin(evenly_spaced(updates.tolist(), MOST_POINTS))]


def _thinning_note(tables: Sequence[tuple[Mark, pd.DataFrame]]) -> str:
    most = max((table["update"].nunique() for _, table in tables), default=0)
    return f" {MOST_POINTS} of up to {most} updates are drawn." if most > MOST_POINTS else ""


def _shapes(frame: Frame) -> list[object]:
    shapes = frame.layout.get("shapes", [])
    return list(shapes) if isinstance(shapes, list) else []


def _horizontal(y: float) -> dict[str, object]:
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": y,
        "y1": y,
        "line": {"color": "#9aa3ad", "width": 1, "dash": "dot"},
    }


def _in_template(name: str) -> str:
    """A hover template also reads "%{...}"; a name must not be able to start one."""
    return for_plotly(elide(name, 60)).replace("%", "&#37;")

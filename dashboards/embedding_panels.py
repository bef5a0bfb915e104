"""Agents' embeddings in the plane, at one update and on the way there."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from dashboards.colours import Mark
from dashboards.panel import Frame, Panel, Part, Patch, empty_figure, message, padded_range, rounded
from dashboards.text import for_plotly

TAIL = 12  # past positions in a trail
_COLLIDE = 0.02  # of the axis range: nearer agents share one number label


def pca_panel(
    projections: Mapping[str, xr.Dataset],
    updates: Mapping[str, list[int]],
    marks: list[Mark],
    *,
    definition: str,
) -> Panel:
    """Draw the principal components with trails.

    Args:
        projections: By network what `pca` returned.
        updates: By network the updates to draw.
        marks: The agents'.
        definition: What the rows are.

    Returns:
        The panel; its traces are each agent's trail, then all agents' points.
    """
    settings: dict[str, Frame] = {}
    frames: dict[str, Frame] = {}
    for network, projection in projections.items():
        kept = projection.sel(update=updates[network])
        position = kept["position"].to_numpy()
        ratios = projection["explained_variance_ratio"].to_numpy()
        x_range, y_range = (padded_range(position[..., component]) for component in (0, 1))
        settings[network] = Frame(
            layout={
                "xaxis": {"title": {"text": _axis_title(1, ratios[0])}, "range": x_range},
                "yaxis": {"title": {"text": _axis_title(2, ratios[1])}, "range": y_range},
                "uirevision": network,
            },
            note=""
            if np.isnan(ratios).any()
            else f"2 components: {ratios.sum():.0%} of the variance",
        )
        still = np.isnan(ratios).all() and np.isfinite(position).any()
        sizes = (x_range[1] - x_range[0], y_range[1] - y_range[0])
        for index, update in enumerate(updates[network]):
            tail = position[max(0, index + 1 - TAIL) : index + 1]
            trails: list[Patch] = [
                {"x": rounded(tail[:, agent, 0]), "y": rounded(tail[:, agent, 1])}
                for agent in range(len(marks))
            ]
            reason = "" if np.isfinite(position[index]).any() else "no finite embedding"
            layout = message(reason)
            if still:
                layout = _note_above("all agents are identical at every update")
            frames[f"{network}|{update}"] = Frame(
                [*trails, _points(position[index], sizes)], layout
            )
    trails_now = [
        go.Scatter(
            x=[],
            y=[],
            mode="lines",
            opacity=0.4,
            line={"color": mark.colour, "width": 1.5},
            hoverinfo="skip",
        )
        for mark in marks
    ]
    return Panel(
        title="Embeddings: principal components",
        reading="Points close together: agents with similar embeddings. The tail is where an agent "
        f"was at the {TAIL - 1} drawn updates before.",
        definition=f"{definition} One PCA over all recorded updates, so points move only when the "
        "embeddings do; axes stay fixed.",
        figure=_figure([*trails_now, _points_trace(marks)]),
        parts=[
            Part(depends=("network",), frames=settings, absent=Frame(layout={"title": {}})),
            _by_update(frames, updates, len(marks) + 1),
        ],
        height=440,
    )


def tsne_panel(
    projections: Mapping[str, xr.Dataset], marks: list[Mark], *, definition: str
) -> Panel:
    """Draw the t-SNE arrangement.

    Args:
        projections: By network what `tsne` returned for the updates to draw.
        marks: The agents'.
        definition: What the rows are.

    Returns:
        The panel; its one trace is all agents' points.
    """
    frames: dict[str, Frame] = {}
    for network, projection in projections.items():
        for index, update in enumerate(projection["update"].to_numpy()):
            now = projection.isel(update=index)
            reason = str(now["reason"].item())
            note = "" if reason else f"perplexity {float(now['perplexity']):.3g}"
            position = _unit_size(now["position"].to_numpy())
            frames[f"{network}|{update}"] = Frame(
                [_points(position, (4.4, 4.4))], message(reason), note
            )
    # Unit size means a root mean square of 1; with n points none is farther out than sqrt(n).
    drawn = [_unit_size(p) for d in projections.values() for p in d["position"].to_numpy()]
    extent = max([1.5, *(float(np.nanmax(np.abs(p), initial=0.0)) for p in drawn)]) * 1.15
    hidden = {
        "range": [-extent, extent],
        "showticklabels": False,
        "showgrid": False,
        "ticks": "",
        "title": {"text": "t-SNE (no units)"},
    }
    figure = _figure([_points_trace(marks)], xaxis=hidden, yaxis=hidden | {"title": {"text": ""}})
    return Panel(
        title="Embeddings: t-SNE",
        reading="Shows who is next to whom. Distances, sizes of groups and gaps mean little.",
        definition=f"{definition} A new fit at each drawn update, started from the one before and "
        "scaled to unit size; perplexity = (distinct agents - 1) / 3, within 1 to 30.",
        figure=figure,
        parts=[
            _by_update(
                frames,
                {n: [int(u) for u in d["update"].to_numpy()] for n, d in projections.items()},
                1,
            )
        ],
        height=440,
    )


def _by_update(frames: dict[str, Frame], updates: Mapping[str, list[int]], traces: int) -> Part:
    gone: list[Patch] = [{"x": [], "y": [], "text": []} for _ in range(traces)]
    return Part(
        depends=("network", "update"),
        frames=frames,
        absent=Frame(gone, message("not recorded for this network")),
        updates=sorted({update for kept in updates.values() for update in kept}),
    )


def _figure(traces: list[go.Scatter], **axes: dict[str, object]) -> go.Figure:
    x = axes.get("xaxis", {}) | {"constrain": "range"}
    y = axes.get("yaxis", {}) | {"scaleanchor": "x", "constrain": "range"}
    return empty_figure(traces, xaxis=x, yaxis=y, showlegend=False, hovermode="closest")


def _points_trace(marks: list[Mark]) -> go.Scatter:
    return go.Scatter(
        x=[],
        y=[],
        mode="markers+text",
        hovertext=[f"{number}: {for_plotly(mark.label, 60)}" for number, mark in enumerate(marks)],
        hovertemplate="%{hovertext}<br>(%{x:.4g}, %{y:.4g})<extra></extra>",
        textposition="top right",
        textfont={"size": 11},
        cliponaxis=False,
        marker={
            "size": 11,
            "color": [mark.colour for mark in marks],
            "symbol": [mark.shape for mark in marks],
            "line": {"color": "#ffffff", "width": 1},
        },
    )


def _points(position: np.ndarray, sizes: tuple[float, float]) -> Patch:
    return {
        "x": rounded(position[:, 0]),
        "y": rounded(position[:, 1]),
        "text": _number_labels(position, sizes),
    }


def _number_labels(position: np.ndarray, sizes: tuple[float, float]) -> list[str]:
    """Number each agent; agents on top of each other get one label at the first of them."""
    labels = [""] * len(position)
    free = [agent for agent in range(len(position)) if np.isfinite(position[agent]).all()]
    reach = _COLLIDE * max(sizes)
    while free:
        first = free[0]
        near = [a for a in free if np.abs(position[a] - position[first]).max() <= reach]
        numbers = ", ".join(str(agent) for agent in near[:6])
        labels[first] = numbers + (f" +{len(near) - 6}" if len(near) > 6 else "")
        free = [agent for agent in free if agent not in near]
    return labels


def _unit_size(position: np.ndarray) -> np.ndarray:
    if not np.isfinite(position).any():
        return position
    centred = position - np.nanmean(position, axis=0)
    size = float(np.sqrt(np.nanmean((centred**2).sum(axis=1))))
    return np.asarray(centred / size if size else centred)


def _axis_title(component: int, ratio: float) -> str:
    return (
        f"component {component} (no variance)"
        if np.isnan(ratio)
        else f"component {component} ({ratio:.1%} of variance)"
    )


def _note_above(sentence: str) -> Patch:
    layout = message(sentence)
    annotations = layout["annotations"]
    assert isinstance(annotations, list)
    annotations[0] |= {"y": 0.85}
    return layout

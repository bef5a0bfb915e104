"""The tab of all runs: what they learned, and how much conflict there was."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from analyses.aggregate import across_seeds, at_equal_frames, interquartile_mean
from dashboards.choices import Choices
from dashboards.colours import Mark, run_marks
from dashboards.lines import NOT_RECORDED, Line, cursor, curve, line, lines_figure, thinned
from dashboards.panel import Figure, Panel, Part, Tab
from dashboards.style import FRAMES, message, nothing, rounded, whole
from dashboards.tables import RunTables
from dashboards.text import elide, for_plotly

Runs = Mapping[str, RunTables]
BOTH = (("psi", "solid"), ("theta", "dash"))
KEY = (("g: trained parameters ψ", "solid"), ("Z: policy parameters θ", "dash"))
_UNDEFINED = "undefined here: no such layer, no two agents, or no verdicts"
_IQM = (
    "Interquartile mean over the runs of a method (seeds) at equal frames, with its 95 % "
    "percentile bootstrap interval over seeds (Agarwal et al., 2021); no band for a single run."
)


def overview_tab(runs: Runs) -> Tab:
    """Lay out the tab.

    Args:
        runs: The runs by name.

    Returns:
        The tab.
    """
    panels = [
        _returns_panel(runs),
        _methods_panel(runs),
        _multiples_panel(runs),
        _last_panel(runs),
        _over_runs(runs, "conflict_rate", _CONFLICT, {"range": [-0.02, 1.02]}, "share of pairs"),
        _over_runs(runs, "mean_cosine", _MEAN_COSINE, {}, "mean cosine", reference=0.0),
    ]
    return Tab(
        name="overview",
        title="Overview",
        lead="What the runs learned, and how far their agents' gradients pulled against each "
        "other.",
        panels=panels,
    )


_CONFLICT = (
    "conflict-rate",
    "Conflict rate",
    "Share of agent pairs whose gradients are told to point against each other. Pairs that noise "
    "leaves undecided do not count, so 0 may mean harmony or noise: see the verdicts.",
    "Share of all pairs of different agents with the verdict conflict: the debiased inner product "
    "is below 0 at a false discovery rate of 5 %, judged from environment copies. Solid: g; "
    "dashed: Z. Recorded with --diagnostics full and at least 8 copies.",
)
_MEAN_COSINE = (
    "mean-cosine",
    "Mean cosine",
    "Below 0: on average two agents' gradients point against each other; above 0: they agree. "
    "Noise pulls it towards 0.",
    "Mean over all pairs of different agents of the plug-in cosine of their gradients. "
    "Solid: g = JᵀZ, trained parameters; dashed: Z, policy parameters.",
)


def methods(runs: Runs) -> dict[str, list[RunTables]]:
    """Group runs that differ by seed alone, as far as a reader cares.

    Args:
        runs: The runs by name.

    Returns:
        Runs by method, and by environment where there are several.
    """
    environments = {of.run.environment for of in runs.values()}
    found: dict[str, list[RunTables]] = {}
    for of in runs.values():
        name = of.run.method
        if len(environments) > 1:
            name += f" · {of.run.environment}"
        found.setdefault(name, []).append(of)
    return found


def method_marks(runs: Runs) -> dict[str, Mark]:
    """Give each method its colour.

    Args:
        runs: The runs by name.

    Returns:
        Marks by method; the only run of a method has the method's colour.
    """
    names = list(methods(runs))
    return dict(zip(names, run_marks(names), strict=True))


def returns(of: RunTables) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read a run's returns, without updates in which no episode ended.

    Args:
        of: The run's.

    Returns:
        Updates, frames, and mean returns of the episodes that ended.
    """
    values, array = of.values("episode_return"), of.array("episode_return")
    if values is None or array is None:
        return np.empty(0, int), np.empty(0), np.empty(0)
    known = ~np.isnan(values)
    updates = array["update"].to_numpy()[known]
    return updates, of.frames_at(updates), values[known].astype(float)


def _returns_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:  # noqa: ARG001
        lines: list[Line] = []
        for of in runs.values():
            updates, _, values = returns(of)
            if len(updates):
                lines.append(_curve(of, updates, values))
            evaluated = line(of, "evaluation_return", of.mark, dash="dot", legend=False)
            if evaluated:
                known = np.isfinite(evaluated.values)
                lines.append(
                    replace(
                        evaluated,
                        label=f"{of.mark.label}, evaluated",
                        updates=evaluated.updates[known],
                        frames=evaluated.frames[known],
                        values=evaluated.values[known],
                    )
                )
        return lines_figure(
            lines,
            {"title": {"text": "mean episode return"}},
            empty="no episode has ended yet",
            unit="reward",
        )

    return Panel(
        name="returns",
        title="Learning curves",
        reading="Higher is better. The thin vertical line marks the slider's update.",
        definition="Mean undiscounted return of the episodes that ended in an update; updates in "
        "which none ended are left out. Dotted: evaluations with the policies held fixed."
        + thinned(list(runs.values()), "episode_return"),
        parts=[Part(depends=(), draw=draw), cursor(lambda _: list(runs.values()))],
    )


def _curve(of: RunTables, updates: np.ndarray, values: np.ndarray, **style: Any) -> Line:  # noqa: ANN401
    return curve(of, updates, values, of.mark, **style)


def _methods_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:  # noqa: ARG001
        lines = []
        marks = method_marks(runs)
        for name, group in methods(runs).items():
            grid, values = at_equal_frames([returns(of)[1:] for of in group])
            if not grid.size:
                continue
            mean, low, high = across_seeds(values)
            mark = marks[name]
            lines.append(
                Line(
                    label=f"{mark.label} ({len(group)})",
                    colour=mark.colour,
                    updates=updates_at(group[0], grid),
                    frames=grid,
                    values=mean,
                    low=low if len(group) > 1 else None,
                    high=high if len(group) > 1 else None,
                    group=name,
                )
            )
        return lines_figure(
            lines,
            {"title": {"text": "mean episode return"}},
            empty="no episode has ended yet",
            unit="reward",
        )

    return Panel(
        name="returns-methods",
        title="Returns across seeds",
        reading="Where two bands do not meet, the methods differ by more than their seeds do.",
        definition=f"{_IQM} In brackets: how many runs.",
        parts=[Part(depends=(), draw=draw), cursor(lambda _: list(runs.values()))],
    )


def updates_at(of: RunTables, frames: np.ndarray) -> np.ndarray:
    """Find the updates that ended at some numbers of frames.

    Args:
        of: The run's.
        frames: Environment frames.

    Returns:
        For each the first of those that are looked at that had at least so many frames, NaN if none
        is known.
    """
    updates, known = of.frames
    if not len(known):
        return np.full(len(frames), np.nan)
    places = np.minimum(np.searchsorted(known, frames), len(known) - 1)
    return np.asarray(updates[places], dtype=float)


def _multiples_panel(runs: Runs) -> Panel:
    groups = methods(runs)
    columns = min(4, max(1, len(groups)))
    rows = -(-len(groups) // columns)

    def draw(choices: Choices) -> Figure:  # noqa: ARG001
        marks = method_marks(runs)
        data, annotations = [], []
        layout: dict[str, Any] = {}
        everything = [returns(of)[2] for of in runs.values()]
        known = np.concatenate([v[np.isfinite(v)] for v in everything])
        if not known.size:
            return nothing("no episode has ended yet")
        low, high = float(known.min()), float(known.max())
        margin = (high - low) / 12 or 1.0
        for number, (name, group) in enumerate(groups.items()):
            row, column = divmod(number, columns)
            axis = "" if number == 0 else str(number + 1)
            gap, width = 0.05, 1 / columns
            left = column * width + (gap / 2 if column else 0)
            right = (column + 1) * width - (gap / 2 if column < columns - 1 else 0)
            top, bottom = 1 - row / rows, 1 - (row + 1) / rows + (0.14 if rows > 1 else 0)
            layout[f"xaxis{axis}"] = {
                **FRAMES,
                "domain": [left, right],
                "anchor": f"y{axis}",
                "title": {"text": "frames", "font": {"size": 11}},
                "nticks": 4,
            }
            layout[f"yaxis{axis}"] = {
                "domain": [bottom, top - 0.07],
                "anchor": f"x{axis}",
                "range": [low - margin, high + margin],
                "showticklabels": column == 0,
                "title": {"text": "return" if column == 0 else ""},
            }
            annotations.append({
                "text": f"{for_plotly(name, 40)} ({len(group)})",
                "x": (left + right) / 2,
                "y": top - 0.06,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "center",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 12},
            })
            for of in group:
                updates, _, values = returns(of)
                one = _curve(of, updates, values, most=200)
                data.append({
                    "type": "scatter",
                    "mode": "lines",
                    "x": whole(one.frames),
                    "y": rounded(one.values),
                    "customdata": whole(one.updates),
                    "xaxis": f"x{axis}",
                    "yaxis": f"y{axis}",
                    "line": {"color": marks[name].colour, "width": 1.3},
                    "opacity": 0.8,
                    "showlegend": False,
                    "hovertemplate": "%{y:.4g} at %{x:,} frames<extra>"
                    + for_plotly(elide(of.mark.label, 60)).replace("%", "&#37;")
                    + "</extra>",
                })
        return {
            "data": data,
            "layout": {
                **layout,
                "annotations": annotations,
                "meta": {
                    "click": {"customdata": "update"},
                    "alt": "Returns of every run, one plot for each method: " + ", ".join(groups),
                },
            },
        }

    return Panel(
        name="seeds",
        title="Every run, by method",
        reading="How far the runs of one method differ among each other.",
        definition="Mean episode return of each run; all plots have the same scale.",
        parts=[Part(depends=(), draw=draw)],
        height=120 + 200 * rows,
        wide=len(groups) > 2,
    )


def _last_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:  # noqa: ARG001
        found = {
            name: {of.mark.label: last_tenth(returns(of)[2]) for of in group}
            for name, group in methods(runs).items()
        }
        axis = {"title": {"text": "mean episode return"}}
        return ends_figure(found, method_marks(runs), axis, "no episode has ended yet")

    return Panel(
        name="returns-last",
        title="Return at the end",
        reading="Dots: runs; bar: interquartile mean with its 95 % interval across seeds.",
        definition="Mean over the last tenth of the updates in which an episode ended.",
        parts=[Part(depends=(), draw=draw)],
        height=ends_height(runs),
    )


def ends_height(runs: Runs) -> int:
    """Choose the height of a panel with a row for each method.

    Args:
        runs: The runs by name.

    Returns:
        CSS pixels.
    """
    return max(240, 90 + 46 * len(methods(runs)))


def ends_figure(
    found: Mapping[str, Mapping[str, float]],
    marks: Mapping[str, Mark],
    axis: Mapping[str, Any],
    empty: str,
) -> Figure:
    """Draw a number of each run, and each method's interquartile mean with its interval.

    Args:
        found: By method and run, NaN where there is none.
        marks: The methods' colours.
        axis: The x axis.
        empty: What to say if there is nothing to draw.

    Returns:
        The figure: for each method its runs, then its mean.
    """
    data: list[dict[str, Any]] = []
    said = []
    for name, last in found.items():
        values = np.array([value for value in last.values() if np.isfinite(value)])
        if not values.size:
            continue
        mean, low, high = interquartile_mean(values)
        label, colour = for_plotly(name, 40), marks[name].colour
        said.append(f"{name} {mean:.3g}")
        data += [
            {
                "type": "scatter",
                "mode": "markers",
                "x": rounded(last.values()),
                "y": [label] * len(last),
                "hovertext": [for_plotly(run, 60) for run in last],
                "hovertemplate": "%{hovertext}: %{x:.4g}<extra></extra>",
                "marker": {"size": 7, "color": colour, "opacity": 0.55},
                "showlegend": False,
            },
            interval_mark(name, (mean, low, high), colour, "interquartile mean %{x:.4g}"),
        ]
    return {
        "data": data,
        "layout": {
            "xaxis": dict(axis),
            "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
            "annotations": [] if data else message(empty),
            "meta": {"alt": "At the end: " + "; ".join(said) if said else empty},
        },
    }


def interval_mark(
    name: str, estimate: tuple[float, float, float], colour: str, words: str
) -> dict[str, Any]:
    """Draw a number with its interval in a row of its own.

    Args:
        name: The row's, not escaped.
        estimate: The number and the ends of its interval, NaN if it has none.
        colour: As "#rrggbb".
        words: On hovering, a template of plotly's.

    Returns:
        A trace.
    """
    value, low, high = estimate
    return {
        "type": "scatter",
        "mode": "markers",
        "x": rounded([value]),
        "y": [for_plotly(name, 40)],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": rounded([high - value]),
            "arrayminus": rounded([value - low]),
            "color": colour,
            "thickness": 2,
        },
        "hovertemplate": f"{words}<extra></extra>",
        "marker": {"size": 15, "symbol": "line-ns", "line": {"width": 3, "color": colour}},
        "showlegend": False,
    }


def last_tenth(values: np.ndarray) -> float:
    """Average the end of a curve.

    Args:
        values: Its heights.

    Returns:
        The mean of the last tenth, at least of the last; NaN if there is none.
    """
    return float(values[-max(1, len(values) // 10) :].mean()) if len(values) else float("nan")


def _over_runs(
    runs: Runs,
    quantity: str,
    words: tuple[str, str, str, str],
    axis: dict[str, Any],
    unit: str,
    reference: float | None = None,
) -> Panel:
    name, title, reading, definition = words

    def draw(choices: Choices) -> Figure:
        lines = []
        for of in runs.values():
            for space, dash in BOTH:
                where = {"network": choices.network, "layer": choices.layer, "space": space}
                found = line(
                    of,
                    quantity,
                    of.mark,
                    where=where,
                    dash=dash,
                    label=f"{of.mark.label}, {'g' if space == 'psi' else 'Z'}",
                    most=min(400, of.limits.points),
                )
                lines += [found] if found else []
        recorded = any(of.array(quantity) is not None for of in runs.values())
        return lines_figure(
            [replace(one, label=one.group) if one.dash == "solid" else one for one in lines],
            {"title": {"text": unit}} | axis,
            reference=reference,
            empty=_UNDEFINED if recorded else NOT_RECORDED,
            key=KEY,
        )

    return Panel(
        name=name,
        title=title,
        reading=reading,
        definition=definition + missing(runs, quantity),
        parts=[
            Part(depends=("network", "layer"), draw=draw),
            cursor(lambda _: list(runs.values())),
        ],
    )


def missing(runs: Runs, quantity: str) -> str:
    """Name the runs that did not record a quantity.

    Args:
        runs: The runs by name.
        quantity: Its name.

    Returns:
        A sentence with a space in front; nothing if all did, or none.
    """
    lacking = [name for name, of in runs.items() if quantity not in of.run.quantities]
    if not lacking or len(lacking) == len(runs):
        return ""
    return f" Not recorded by: {', '.join(lacking)}."

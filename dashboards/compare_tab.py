"""The tab of comparison: methods on one axis at equal frames, and their differences."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from analyses.aggregate import (
    across_seeds,
    at_equal_frames,
    difference_across_seeds,
)
from dashboards.choices import Choices
from dashboards.lines import NOT_RECORDED, Line, cursor, line, lines_figure
from dashboards.overview_tab import (
    ends_figure,
    ends_height,
    last_tenth,
    method_marks,
    methods,
    updates_at,
)
from dashboards.panel import Draw, Figure, Panel, Part, Tab
from dashboards.performance_panels import performance_panels
from dashboards.style import message, rounded
from dashboards.tables import RunTables
from dashboards.text import for_plotly

Runs = Mapping[str, RunTables]

_POINTS = 40  # of a method's mean
_DIFFERENCE_POINTS = 20
_RESAMPLES = 500  # a page holds every choice, so each is made quickly
_DEPENDS = ("quantity", "network", "layer", "space")


def compare_tab(runs: Runs) -> Tab:
    """Lay out the tab.

    Args:
        runs: The runs by name.

    Returns:
        The tab.
    """
    return Tab(
        name="compare",
        title="Compare",
        lead="Any recorded number, all runs on one axis at equal frames.",
        panels=[
            _runs_panel(runs),
            _methods_panel(runs),
            _difference_panel(runs),
            _last_panel(runs),
            _against_return_panel(runs),
            *performance_panels(runs),
        ],
    )


def _of(of: RunTables, choices: Choices) -> Line | None:
    """The chosen quantity of a run, without updates at which it was not known."""
    array = of.array(choices.quantity)
    if array is None:
        return None
    place = {"network": choices.network, "layer": choices.layer, "space": choices.space}
    where = {axis: label for axis, label in place.items() if axis in array.dims}
    found = line(of, choices.quantity, of.mark, where=where, most=min(400, of.limits.points))
    if found is None:
        return None
    known = np.isfinite(found.values)
    return replace(
        found,
        updates=found.updates[known],
        frames=found.frames[known],
        values=found.values[known],
        low=None if found.low is None else found.low[known],
        high=None if found.high is None else found.high[known],
    )


def _by_what_matters(runs: Runs, draw: Draw, *more: str) -> Draw:
    """Draw once for all values of choices that the chosen quantity has no axis for."""
    kept = lru_cache(maxsize=64)(draw)

    def of_relevant(choices: Choices) -> Figure:
        arrays = [of.array(choices.quantity) for of in runs.values()]
        axes = {str(dim) for array in arrays if array is not None for dim in array.dims}
        place = {"network": "actor", "layer": "all", "space": "psi"}
        place = {n: getattr(choices, n) if n in axes else usual for n, usual in place.items()}
        place |= {name: getattr(choices, name) for name in ("quantity", *more)}
        return kept(Choices().with_(**place))

    return of_relevant


def _axis(runs: Runs, choices: Choices) -> dict[str, Any]:
    arrays = [of.array(choices.quantity) for of in runs.values()]
    unit = next((str(a.attrs.get("unit", "")) for a in arrays if a is not None), "")
    name = for_plotly(choices.quantity.replace("_", " "))
    return {"title": {"text": f"{name} ({for_plotly(unit)})" if unit not in {"", "1"} else name}}


def _empty(runs: Runs, choices: Choices) -> str:
    if all(of.array(choices.quantity) is None for of in runs.values()):
        return NOT_RECORDED
    return "undefined for this network, layer and space"


def _runs_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        lines = [_of(of, choices) for of in runs.values()]
        return lines_figure(
            [one for one in lines if one], _axis(runs, choices), empty=_empty(runs, choices)
        )

    return Panel(
        name="quantity-runs",
        title="Every run",
        reading="One line for each run.",
        definition="The chosen quantity as it was recorded, with its interval if it has one.",
        parts=[
            Part(depends=_DEPENDS, draw=_by_what_matters(runs, draw)),
            cursor(lambda _: list(runs.values())),
        ],
    )


def _groups(runs: Runs, choices: Choices) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Frames and values of each method's runs; methods without any are left out."""
    found = {}
    for name, group in methods(runs).items():
        lines = [one for of in group if (one := _of(of, choices)) is not None and len(one.values)]
        if lines:
            found[name] = [(one.frames, one.values) for one in lines]
    return found


def _methods_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        marks, lines = method_marks(runs), []
        for name, curves in _groups(runs, choices).items():
            grid, values = at_equal_frames(curves, _POINTS)
            if not grid.size:
                continue
            mean, low, high = across_seeds(values, _RESAMPLES)
            several = len(curves) > 1
            lines.append(
                Line(
                    label=f"{name} ({len(curves)})",
                    colour=marks[name].colour,
                    updates=updates_at(methods(runs)[name][0], grid),
                    frames=grid,
                    values=mean,
                    low=low if several else None,
                    high=high if several else None,
                    group=name,
                )
            )
        return lines_figure(lines, _axis(runs, choices), empty=_empty(runs, choices))

    return Panel(
        name="quantity-methods",
        title="Methods across seeds",
        reading="Bands that do not meet: the methods differ by more than their seeds do.",
        definition="Interquartile mean over the runs of a method at equal frames, with its 95 % "
        "percentile bootstrap interval over runs (Agarwal et al., 2021). In brackets: how many.",
        parts=[
            Part(depends=_DEPENDS, draw=_by_what_matters(runs, draw)),
            cursor(lambda _: list(runs.values())),
        ],
    )


def _difference_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        groups, marks, lines = _groups(runs, choices), method_marks(runs), []
        others = groups.get(choices.against)
        for name, curves in groups.items():
            if others is None or name == choices.against:
                continue
            grid, values = at_equal_frames([*curves, *others], _DIFFERENCE_POINTS)
            if not grid.size:
                continue
            ours, theirs = values[: len(curves)], values[len(curves) :]
            mean, low, high = difference_across_seeds(ours, theirs, _RESAMPLES)
            several = bool(np.isfinite(low).any())
            lines.append(
                Line(
                    label=f"{name} - {choices.against}",
                    colour=marks[name].colour,
                    updates=updates_at(methods(runs)[name][0], grid),
                    frames=grid,
                    values=mean,
                    low=low if several else None,
                    high=high if several else None,
                    group=name,
                )
            )
        alone = len(groups) < 2
        return lines_figure(
            lines,
            _axis(runs, choices),
            reference=0.0,
            empty="needs runs of two methods" if alone else _empty(runs, choices),
            note=f"less {choices.against}" if lines else "",
        )

    return Panel(
        name="quantity-difference",
        title="Difference between methods",
        reading="A band that lies wholly above or below the dotted line: the methods differ there.",
        definition="Interquartile mean of each method's runs less that of the method chosen under "
        "Against, at equal frames, with a 95 % percentile bootstrap interval over both methods' "
        "runs; no band if one of them has a single run.",
        parts=[
            Part(
                depends=(*_DEPENDS, "against"),
                draw=_by_what_matters(runs, draw, "against"),
            ),
            cursor(lambda _: list(runs.values())),
        ],
    )


def _last_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        found: dict[str, dict[str, float]] = {}
        for name, group in methods(runs).items():
            lines = {of.mark.label: _of(of, choices) for of in group}
            found[name] = {
                run: last_tenth(one.values) for run, one in lines.items() if one is not None
            }
        return ends_figure(found, method_marks(runs), _axis(runs, choices), _empty(runs, choices))

    return Panel(
        name="quantity-last",
        title="At the end",
        reading="Dots: runs; bar: interquartile mean with its 95 % interval across seeds.",
        definition="Mean over the last tenth of the updates at which it was recorded.",
        parts=[Part(depends=_DEPENDS, draw=_by_what_matters(runs, draw))],
        height=ends_height(runs),
    )


def _against_return_panel(runs: Runs) -> Panel:
    def draw(choices: Choices) -> Figure:
        data, points = [], 0
        for of in runs.values():
            found, earned = _of(of, choices), _of(of, choices.with_(quantity="episode_return"))
            if found is None or earned is None or not len(found.values) or not len(earned.values):
                continue
            at = np.interp(found.frames, earned.frames, earned.values)
            points += len(at)
            data.append({
                "type": "scatter",
                "mode": "lines+markers",
                "x": rounded(found.values),
                "y": rounded(at),
                "customdata": found.updates.tolist(),
                "name": for_plotly(of.mark.label, 32),
                "line": {"color": of.mark.colour, "width": 1},
                "marker": {"size": 4, "color": of.mark.colour},
                "hovertemplate": "%{x:.4g}, return %{y:.4g} (update %{customdata})<extra>"
                + for_plotly(of.mark.label, 60).replace("%", "&#37;")
                + "</extra>",
            })
        return {
            "data": data,
            "layout": {
                "xaxis": _axis(runs, choices),
                "yaxis": {"title": {"text": "mean episode return"}},
                "annotations": [] if points else message(_empty(runs, choices)),
                "meta": {
                    "click": {"customdata": "update"},
                    "alt": f"Return over {choices.quantity}, along the training of each run.",
                },
            },
        }

    return Panel(
        name="quantity-return",
        title="Against the return",
        reading="Follow a line: did the return rise as the quantity changed, or without it?",
        definition="The return at each update at which the quantity was recorded, along the "
        "training. What goes together need not be cause and effect.",
        parts=[Part(depends=_DEPENDS, draw=_by_what_matters(runs, draw))],
    )

"""Panels of methods' returns over all tasks and seeds: profile, aggregates, improvement."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from analyses import performance
from dashboards.choices import Choices
from dashboards.colours import Mark, run_marks
from dashboards.lines import band
from dashboards.overview_tab import interval_mark, last_tenth, methods, returns
from dashboards.panel import Figure, Panel, Part
from dashboards.style import nothing, rounded, vertical
from dashboards.tables import RunTables
from dashboards.text import clean, for_plotly

Runs = Mapping[str, RunTables]

_RESAMPLES = 1000
_THRESHOLDS = 41
_TOO_FEW = "needs two methods with two runs each, of different return, on the same task"
_SCORES = (
    "A run's score is its return at the end (mean over the last tenth of the updates in which an "
    "episode ended) on the scale of its task (environment with agents and settings), of which 0 "
    "and 1 are the lowest and highest of all runs compared. Tasks weigh the same. "
)
_INTERVALS = (
    "Bars: 95 % percentile bootstrap intervals, runs drawn anew within each task (Agarwal et al., "
    "2021), which a few runs make somewhat too narrow. In brackets: how many runs."
)


@dataclass(frozen=True)
class _Scores:
    """What methods scored at the end.

    Attributes:
        runs: The runs by name.
    """

    runs: Runs

    @cached_property
    def known(self) -> pd.DataFrame:
        """Normalised scores of methods and tasks that can be compared; empty if there are none."""
        rows = [
            (clean(of.run.method), clean(performance.task_of(of.run)), number, score)
            for number, of in enumerate(self.runs.values())
            for score in [last_tenth(returns(of)[2])]
            if np.isfinite(score)
        ]
        scores = pd.DataFrame(rows, columns=["method", "task", "seed", "score"])
        if scores.empty:
            return scores
        several = scores.groupby(["method", "task"])["seed"].transform("size") > 1
        scores = scores[several]
        if scores.empty:
            return scores
        scores = performance.in_all_methods(scores)
        if scores["method"].nunique() < 2:
            return scores.iloc[:0]
        bounds = performance.pooled_bounds(scores)
        scores = scores[scores["task"].isin(list(bounds))]
        return scores if scores.empty else performance.normalise(scores, bounds)

    @property
    def labels(self) -> dict[str, str]:
        """Names of the methods with how many runs they have."""
        return {
            str(m): f"{m} ({n})" for m, n in self.known["method"].value_counts(sort=False).items()
        }

    @property
    def marks(self) -> dict[str, Mark]:
        """Colours of the methods, those of the other panels if there is one environment."""
        names = list(dict.fromkeys(clean(of.run.method) for of in self.runs.values()))
        return dict(zip(names, run_marks(names), strict=True))

    @property
    def note(self) -> str:
        """How much is compared, and what is not."""
        tasks, used = self.known["task"].nunique(), len(self.known)
        left = f", {len(self.runs) - used} left out" if used < len(self.runs) else ""
        return f"{used} runs of {tasks} {'task' if tasks == 1 else 'tasks'}{left}"


def performance_panels(runs: Runs) -> list[Panel]:
    """Lay out the panels.

    Args:
        runs: The runs by name.

    Returns:
        Performance profile, aggregates, probability of improvement.
    """
    scores = _Scores(runs)
    rows = max(2, len({of.run.method for of in runs.values()}))

    def part(draw: Callable[[_Scores, Choices], Figure], *depends: str) -> list[Part]:
        def drawn(choices: Choices) -> Figure:
            return nothing(_TOO_FEW) if scores.known.empty else draw(scores, choices)

        return [Part(depends=depends, draw=drawn)]

    return [
        Panel(
            name="performance-profile",
            title="Performance profile",
            reading="The higher curve has more runs beyond that return. Where two cross, one "
            "method has more good runs and the other fewer bad ones.",
            definition=f"{_SCORES}Share of a method's runs that score more than a threshold, mean "
            "over tasks. Bands: 95 % percentile bootstrap intervals of each point by itself, runs "
            "drawn anew within each task (Agarwal et al., 2021). In brackets: how many runs.",
            parts=part(_profile),
        ),
        Panel(
            name="performance-aggregates",
            title="Aggregate returns",
            reading="One number for all tasks and runs, with what the runs leave open.",
            definition=f"{_SCORES}IQM: mean of the middle half of the runs of all tasks. Median: "
            "over tasks, of the mean over runs. Optimality gap: by how much runs fall short of 1, "
            f"on average; less is better. {_INTERVALS}",
            parts=part(_aggregates),
            height=90 + 46 * rows,
            wide=True,
        ),
        Panel(
            name="performance-improvement",
            title="Probability of improvement",
            reading="Right of the dotted line: a run of the method is likely to earn more than one "
            "of the method chosen under Against.",
            definition="Share of pairs of runs of one task, one of each method, in which the "
            "method's run returns more at the end, a tie counting half; mean over tasks. "
            f"{_INTERVALS}",
            parts=part(_improvement, "against"),
            height=90 + 46 * rows,
        ),
    ]


def _profile(scores: _Scores, choices: Choices) -> Figure:  # noqa: ARG001
    thresholds = np.linspace(0, 1, _THRESHOLDS)
    table = performance.performance_profile(scores.known, thresholds.tolist(), resamples=_RESAMPLES)
    data, said = [], []
    x = rounded(thresholds)
    for method, of in table.groupby("method", sort=False):
        label = scores.labels[str(method)]
        name, colour = for_plotly(label, 32), scores.marks[str(method)].colour
        data += band(x, of["low"], of["high"], colour=colour, group=name)
        data.append({
            "type": "scatter",
            "mode": "lines",
            "x": x,
            "y": rounded(of["value"]),
            "name": name,
            "legendgroup": name,
            "line": {"color": colour, "width": 2},
            "hovertemplate": "%{y:.0%} of runs above %{x:.3f}<extra>"
            + name.replace("%", "&#37;")
            + "</extra>",
        })
        half = of["value"].iloc[_THRESHOLDS // 2]
        said.append(f"{label} {half:.0%} above 0.5")
    return {
        "data": data,
        "layout": {
            "xaxis": {"title": {"text": "normalised return"}, "range": [0, 1]},
            "yaxis": {
                "title": {"text": "share of runs above"},
                "range": [-0.02, 1.02],
                "tickformat": ".0%",
            },
            "meta": {"alt": f"Performance profile: {'; '.join(said)}.", "note": scores.note},
        },
    }


def _rows(table: pd.DataFrame) -> list[tuple[str, tuple[float, float, float]]]:
    """Methods with their values and intervals."""
    columns = (table[name].tolist() for name in ("method", "value", "low", "high"))
    return [(method, (value, low, high)) for method, value, low, high in zip(*columns, strict=True)]


def _aggregates(scores: _Scores, choices: Choices) -> Figure:  # noqa: ARG001
    measures = {
        "IQM": performance.iqm,
        "median": performance.median,
        "optimality gap": performance.optimality_gap,
    }
    data, layout, said, texts = [], {}, [], []
    for number, (measure, of) in enumerate(measures.items()):
        axis, left = "" if number == 0 else str(number + 1), number / len(measures)
        for place, (method, found) in enumerate(_rows(of(scores.known, resamples=_RESAMPLES))):
            label = scores.labels[method]
            text = "{:.2f} ({:.2f} to {:.2f})".format(*found)
            said.append(f"{measure} of {label} {text}")
            mark = interval_mark(label, found, scores.marks[method].colour, f"{measure} {text}")
            data.append(mark | {"xaxis": f"x{axis}", "yaxis": "y"})
            # in the middle, not beside the mark, where a narrow page has no room
            texts.append({
                "text": text,
                "showarrow": False,
                "font": {"size": 11},
                "xref": f"x{axis}",
                "x": 0.5,
                "yref": "y",
                "y": place,
                "yshift": 17,
            })
        layout[f"xaxis{axis}"] = {
            "domain": [left + 0.01, left + 1 / len(measures) - 0.01],
            "anchor": "y",
            "range": [-0.02, 1.02],
            "title": {"text": measure + (" (less is better)" if "gap" in measure else "")},
        }
    return {
        "data": data,
        "layout": layout
        | {
            "yaxis": {
                "type": "category",
                # downwards, with room for the text of the first
                "range": [len(scores.labels) - 0.6, -0.8],
                "showgrid": False,
            },
            "annotations": texts,
            "meta": {"alt": "; ".join(said), "note": scores.note},
        },
    }


def _improvement(scores: _Scores, choices: Choices) -> Figure:
    group = methods(scores.runs).get(choices.against)
    over = clean(group[0].run.method) if group else ""
    if over not in scores.labels:
        return nothing("the method chosen under Against has no two runs on these tasks")
    data, said = [], []
    table = performance.probability_of_improvement(scores.known, over, resamples=_RESAMPLES)
    for method, found in _rows(table):
        label = scores.labels[method]
        text = "{:.0%} ({:.0%} to {:.0%})".format(*found)
        said.append(f"{label} {text}")
        words = f"earns more than {over}: {text}"
        words = for_plotly(words, 120).replace("%", "&#37;")
        data.append(interval_mark(label, found, scores.marks[method].colour, words))
    return {
        "data": data,
        "layout": {
            "xaxis": {
                "title": {"text": f"a run earns more than one of {for_plotly(over, 40)}"},
                "range": [-0.02, 1.02],
                "tickformat": ".0%",
            },
            "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
            "shapes": [vertical(0.5)],
            "meta": {
                "alt": f"Probability of improvement over {over}: {'; '.join(said)}",
                "note": scores.note,
            },
        },
    }

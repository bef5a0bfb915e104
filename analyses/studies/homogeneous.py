"""Where agents are to act alike: does HyperMARL lose anything against one shared network?"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analyses.studies.chart import Line, Panel, chart
from analyses.studies.seeds import (
    difference,
    estimate,
    estimates,
    last,
    over_last_tenth,
    over_training,
    select,
    side_by_side,
)
from analyses.studies.study import Findings, Study
from analyses.studies.verdict import Estimate, Verdict, judge
from gradlab.run import Run

ALGORITHMS = ("ippo", "mappo")
METHODS = ("fups", "fups-id", "nops", "hypermarl")
MARGIN = 0.1
"""Difference of win rates below which methods count as equal."""
LEARNED = 0.2
"""Win rate that a method must be above before being equal to it says anything."""

_WINS, _WINS_DRAWN, _RETURN = "win rate", "win rate while training", "return while training"
_FIGURES = {
    _WINS: ".3f",
    _WINS_DRAWN: ".3f",
    _RETURN: ".3f",
    "conflict rate of g": ".3f",
    "mean cosine of g": "+.3f",
}
_BY = ("map", "algorithm", "method")
_REFERENCE = "fups"


def _sweep(
    maps: Sequence[str],
    algorithms: Sequence[str],
    methods: Sequence[str],
    settings: Mapping[str, object],
) -> dict[str, Any]:
    return {
        "settings": dict(settings),
        "grid": {
            "preset": [f"smax-{name}" for name in maps],
            "algorithm": list(algorithms),
            "method": list(methods),
            "seed": list(range(5)),
        },
    }


def _row(run: Run) -> dict[str, Any]:
    return {
        "map": run.environment.removeprefix("smax/"),
        "algorithm": run.config["algorithm"],
        "method": run.method,
        "seed": int(run.info["seed"]),
        _WINS: last(run, "evaluation_outcome_rate", outcome="win"),
        _WINS_DRAWN: over_last_tenth(run, "outcome_rate", outcome="win"),
        _RETURN: over_last_tenth(run, "episode_return"),
        "conflict rate of g": over_training(run, "conflict_rate", "psi"),
        "mean cosine of g": over_training(run, "mean_cosine", "psi"),
    }


def read(runs: Sequence[Run]) -> Findings:
    """Read the study's runs.

    Args:
        runs: Those that are done.

    Returns:
        Win rates, returns and conflict of every map, algorithm and method.
    """
    found = pd.DataFrame([_row(run) for run in runs])
    table = estimates(found, _BY, _FIGURES)
    return Findings(
        shown=side_by_side(table, _BY[:2], "method"),
        verdicts=_verdicts(found),
        tables={"homogeneous": table.drop(columns="text"), "homogeneous-runs": found},
        figures={"homogeneous": _figure(table)},
    )


def _verdicts(found: pd.DataFrame) -> list[Verdict]:
    places = list(dict.fromkeys(zip(found["map"], found["algorithm"], strict=True)))
    methods = [name for name in METHODS if name in set(found["method"]) and name != _REFERENCE]

    def gaps(figure: str, method: str, among: Sequence[tuple[str, str]]) -> dict[str, Estimate]:
        return {
            f"{name}, {algorithm}": difference(
                *(
                    select(found, figure, map=name, algorithm=algorithm, method=m)
                    for m in (method, _REFERENCE)
                )
            )
            for name, algorithm in among
        }

    wins = {
        (name, algorithm): estimate(
            select(found, _WINS, map=name, algorithm=algorithm, method=_REFERENCE)
        )
        for name, algorithm in places
    }
    learned = [place for place in places if wins[place].low > LEARNED]
    return [
        judge(
            f"{_REFERENCE} learns to win (win rate above {LEARNED}; elsewhere that methods are "
            "equal would say nothing)",
            {f"{name}, {algorithm}": wins[name, algorithm] for name, algorithm in places},
            above=LEARNED,
        ),
        *(
            judge(
                f"{method} wins as often as {_REFERENCE}, where that has learned to (difference "
                f"within {MARGIN})",
                gaps(_WINS, method, learned),
                above=-MARGIN,
                below=MARGIN,
                form="+.3f",
            )
            for method in methods
        ),
        *(
            judge(
                f"{method} returns less than {_REFERENCE} while training",
                gaps(_RETURN, method, places),
                below=0,
                form="+.3f",
            )
            for method in methods
        ),
    ]


def _figure(table: pd.DataFrame) -> str:
    methods = list(dict.fromkeys(table["method"]))
    panels = []
    for name, algorithm in dict.fromkeys(zip(table["map"], table["algorithm"], strict=True)):
        lines = []
        for figure in (_WINS, _WINS_DRAWN, _RETURN):
            where = (table["map"] == name) & (table["algorithm"] == algorithm)
            rows = table[where & (table["figure"] == figure)].set_index("method").reindex(methods)
            numbers = [Estimate(*row) for row in rows[["value", "low", "high"]].to_numpy()]
            lines.append(Line.of(figure, numbers))
        top = max([1.0, *(x for line in lines for x in line.high if math.isfinite(x))])
        ticks = tuple(np.arange(math.ceil(top / 0.5) + 1) * 0.5)
        panels.append(Panel(title=f"{name}, {algorithm}", lines=lines, ticks=ticks))
    return chart(panels, methods, "method")


MAPS = ("2s3z", "3s5z", "smacv2_10_units", "smacv2_20_units")

_FINAL = 1_000_000
"""Updates between evaluations: more than there are, so that only the last one is evaluated."""
_SMALL = {
    "diagnostics": "full",
    "copies": 32,
    "steps": 64,
    "network": {"memory_size": 32, "hidden": [32]},
}
"""Settings that keep the smaller budgets small, over the paper's."""

HOMOGENEOUS = Study(
    name="homogeneous",
    question="Where agents are alike, is HyperMARL about as good as one shared network?",
    budgets={
        "quick": _sweep(
            MAPS[:1],
            ALGORITHMS[:1],
            METHODS[::3],
            _SMALL
            | {"frames": 16_384, "every": 4, "evaluation": {"every": _FINAL, "episodes": 32}},
        ),
        "standard": _sweep(
            MAPS[::3],
            ALGORITHMS,
            METHODS,
            _SMALL
            | {"frames": 500_000, "every": 20, "evaluation": {"every": _FINAL, "episodes": 128}},
        ),
        "full": _sweep(
            MAPS,
            ALGORITHMS,
            METHODS,
            {
                "diagnostics": "full",
                "every": 30,
                "evaluation": {"every": _FINAL, "episodes": 128},
            },
        ),
    },
    about="Interquartile means over seeds with 95 % percentile bootstrap intervals (none for "
    "fewer than 5 seeds). Recurrent policies and critics; agents are units of one side, and a "
    "unit that dies has left its episode. Win rate: of whole episodes after the last update, each "
    "policy's likeliest actions. While training: actions drawn, mean over the last tenth of the "
    "updates; the return is of an agent, and ends with its death. Conflict: of the actors, means "
    "over the diagnosed updates: share of agent pairs told to be in conflict at a false discovery "
    "rate of 5 %, of g_i in psi-space, and mean plug-in cosine over pairs.\n\nThe paper finds "
    "HyperMARL about equal to full sharing on all four maps (a figure without numbers), with step "
    "sizes that were tuned for each method and map; gradlab's presets have those. Its baselines' "
    "actors know no ID, as fups; its embeddings and hypernetworks differ between maps. The smaller "
    "budgets have smaller networks and rollouts, and end long before the paper's 10 million "
    "frames.",
    read=read,
)

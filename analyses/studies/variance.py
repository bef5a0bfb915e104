"""Does HyperMARL's policy gradient vary less, and by more than its size alone explains?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analyses.studies.across_tasks import across_tasks
from analyses.studies.chart import Line, Panel, chart, ticks_for
from analyses.studies.seeds import (
    difference,
    estimates,
    over_last_tenth,
    over_training,
    select,
    side_by_side,
    signal_to_noise,
)
from analyses.studies.size import trained_parameters
from analyses.studies.study import Findings, Study
from analyses.studies.verdict import Estimate, Verdict, judge
from gradlab.run import Run

METHODS = ("fups-id", "nops", "hypermarl-linear", "hypermarl")

_COORDINATE = "coordinate variance"
_SIZE = "trained parameters"
_SIGNAL = "signal to noise of Z"
_FIGURES = {
    "reward": ".3g",
    _COORDINATE: ".2e",
    _SIZE: ",.0f",
    _SIGNAL: ".3f",
    "signal to noise of g": ".3f",
    "squared length of Z": ".2e",
    "variance of the mean Z": ".2e",
}
_BY = ("environment", "method")
_REFERENCE = "fups-id"

_PRESETS = ("dispersion", "navigation-4ag-different")
_SMALL = {
    "diagnostics": "full",
    "copies": 64,
    "steps": 32,
    "ppo": {"epochs": 4, "minibatches": 4, "learning_rate": 5e-4},
    "network": {"hidden": [64, 64]},
    "evaluation": {"every": 0},
}
"""Settings that keep the smaller budgets small, over the paper's."""


def _sweep(presets: Sequence[str], settings: dict[str, Any], seeds: int) -> dict[str, Any]:
    return {
        "settings": settings,
        "grid": {
            "preset": list(presets),
            "method": list(METHODS),
            "seed": list(range(seeds)),
        },
    }


def _row(run: Run) -> dict[str, Any]:
    return {
        "environment": run.environment,
        "method": run.method,
        "seed": int(run.info["seed"]),
        "reward": over_last_tenth(run, "reward_per_step"),
        _COORDINATE: over_training(run, "coordinate_variance"),
        _SIZE: trained_parameters(run),
        _SIGNAL: signal_to_noise(run, "theta"),
        "signal to noise of g": signal_to_noise(run, "psi"),
        "squared length of Z": over_training(run, "squared_norm_debiased", "theta"),
        "variance of the mean Z": over_training(run, "variance_mean", "theta"),
    }


def read(runs: Sequence[Run]) -> Findings:
    """Read the study's runs.

    Args:
        runs: Those that are done.

    Returns:
        Variances, the paper's and ours, of every environment and method.
    """
    found = pd.DataFrame([_row(run) for run in runs])
    table = estimates(found, _BY, _FIGURES)
    return Findings(
        shown=side_by_side(table, _BY[:1], "method"),
        verdicts=_verdicts(found),
        tables={"variance": table.drop(columns="text"), "variance-runs": found},
        figures={"variance": _figure(found, table)},
        sections=[across_tasks("variance", runs)],
    )


def _orders(found: pd.DataFrame, environment: str, method: str, other: str) -> Estimate:
    """How many powers of ten a method's coordinate variance lies above another's."""
    logs = [
        np.log10(select(found, _COORDINATE, environment=environment, method=name))
        for name in (method, other)
    ]
    return difference(*(values.tolist() for values in logs))


def _size_orders(found: pd.DataFrame, environment: str, method: str, other: str) -> float:
    sizes = [select(found, _SIZE, environment=environment, method=name) for name in (method, other)]
    return float(np.log10(sizes[0][0] / sizes[1][0])) if all(sizes) else float("nan")


def _verdicts(found: pd.DataFrame) -> list[Verdict]:
    environments = list(dict.fromkeys(found["environment"]))

    verdicts = []
    for method in ("hypermarl-linear", "hypermarl"):
        of_code = {name: _orders(found, name, _REFERENCE, method) for name in environments}
        beyond = {
            name: estimate.less(_size_orders(found, name, method, _REFERENCE))
            for name, estimate in of_code.items()
        }
        verdicts += [
            judge(
                f"by the paper's measure {method}'s policy gradient varies less than "
                f"{_REFERENCE}'s (powers of ten)",
                of_code,
                above=0,
                form="+.2f",
            ),
            judge(
                "that reduction is more than the ratio of the numbers of trained parameters "
                f"(powers of ten beyond it, {method})",
                beyond,
                above=0,
                form="+.2f",
            ),
        ]
        verdicts += [
            judge(
                f"{method}'s Z_i has more signal to noise than {other}'s",
                {
                    name: difference(
                        *(
                            select(found, _SIGNAL, environment=name, method=m)
                            for m in (method, other)
                        )
                    )
                    for name in environments
                },
                above=0,
                form="+.3f",
            )
            for other in (_REFERENCE, "nops")
        ]
    return verdicts


def _figure(found: pd.DataFrame, table: pd.DataFrame) -> str:
    methods = list(dict.fromkeys(found["method"]))
    panels = []
    for environment in dict.fromkeys(found["environment"]):
        orders = [_orders(found, environment, method, _REFERENCE) for method in methods]
        size = [-_size_orders(found, environment, method, _REFERENCE) for method in methods]
        panels.append(
            Panel(
                title=f"{environment}: log10 of ratio to {_REFERENCE}",
                lines=[
                    Line.of(_COORDINATE, orders),
                    Line(name="1 / trained parameters", values=size, dashed=True),
                ],
                ticks=(-3.0, -2.0, -1.0, 0.0, 1.0),
                marks=(0.0,),
            )
        )
        where = (table["environment"] == environment) & (table["figure"] == _SIGNAL)
        rows = table[where].set_index("method").reindex(methods)
        signals = [Estimate(*row) for row in rows[["value", "low", "high"]].to_numpy()]
        panels.append(
            Panel(
                title=f"{environment}: {_SIGNAL}",
                lines=[Line.of(_SIGNAL, signals)],
                ticks=ticks_for(signals),
            )
        )
    return chart(panels, methods, "method")


VARIANCE = Study(
    name="variance",
    question="Does HyperMARL's policy gradient vary less, and by more than its size explains?",
    budgets={
        "quick": _sweep(_PRESETS[:1], _SMALL | {"frames": 20_480, "every": 2}, 5),
        "standard": _sweep(_PRESETS, _SMALL | {"frames": 51_200, "every": 5}, 10),
        "full": _sweep(
            _PRESETS, {"diagnostics": "full", "every": 20, "evaluation": {"every": 0}}, 10
        ),
    },
    about="Interquartile means over seeds with 95 % percentile bootstrap intervals (none for "
    "fewer than 5 seeds); powers of ten are differences of the logarithms' means. All of the "
    "actor, means over the diagnosed updates; signal to noise, a squared length over a variance, "
    "without bias, is a ratio of such means, over agents and updates. Coordinate variance is the "
    "paper's measure as its code has it: over the coordinates of the one gradient of all agents, "
    "and so about its squared length over the number of trained parameters: a network with more "
    "of them has less, whatever its gradient does. Z_i has the same size for all methods; its "
    "variance is that of the mean over environment copies, and a smaller gradient does not count "
    "as less noise (docs/variance.md). J_i of all these methods is given by the agent alone, so "
    "that it adds no noise. Reward: per step and agent.\n\nNot as in the paper (but for `--budget "
    "full`): fewer frames, copies and steps, and equal networks (64, 64) and settings of PPO for "
    "both scenarios; numbered actions of Dispersion are VMAS's 9.",
    read=read,
)

"""Which methods adapt to goals that are the same, different or mixed, and how they do it."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from analyses.studies.chart import Line, Panel, chart, ticks_for
from analyses.studies.seeds import (
    difference,
    estimate,
    estimates,
    over_last_tenth,
    select,
    side_by_side,
)
from analyses.studies.study import Findings, Study
from analyses.studies.verdict import Estimate, Verdict, judge
from gradlab.run import Run

METHODS = (
    "fups",
    "fups-id",
    "nops",
    "hypermarl-linear",
    "hypermarl",
    "adapters",
    "dico",
    "kaleidoscope",
)
"""Sharing schemes for any number of agents."""
SEPS = "seps"
"""The one that groups agents, of which there must be more than 2."""
HAPPO = "happo"
"""The algorithm whose agents are updated one after the other, beside the sharing schemes."""

NEAR = 0.9
"""Share of the best method's reward that counts as near to it."""
ROBUST = ("fups-id", "nops", "hypermarl-linear", "hypermarl")
"""Methods that are asked whether they do well whatever the goals."""

_ENV, _METHOD = "environment", "method"
_REWARD, _SND = "reward", "SND"
_FIGURES = {_REWARD: ".4f", _SND: ".3f"}
_BY = (_ENV, _METHOD)


def row_of(run: Run) -> dict[str, Any]:
    """Read a run's numbers.

    Args:
        run: A finished run.

    Returns:
        One number for each figure.
    """
    happo = run.config["algorithm"] == HAPPO
    return {
        _ENV: str(run.config["preset"]),
        _METHOD: HAPPO if happo else run.method_of("actor"),
        "seed": int(run.info["seed"]),
        _REWARD: over_last_tenth(run, "reward_per_step"),
        _SND: float(run.quantity("snd").isel(update=-1)),
    }


def read(runs: Sequence[Run]) -> Findings:
    """Read the study's runs.

    Args:
        runs: Those that are done.

    Returns:
        What `report` says of them.
    """
    return report(pd.DataFrame([row_of(run) for run in runs]))


def report(found: pd.DataFrame) -> Findings:
    """Say what the numbers of runs come to.

    Args:
        found: One row for each run, as `row_of` makes it.

    Returns:
        Rewards and diversity of every scenario and method.
    """
    table = estimates(found, _BY, _FIGURES)
    return Findings(
        shown=side_by_side(table, _BY[:1], _METHOD),
        verdicts=_verdicts(found),
        tables={"adaptability": table.drop(columns="text"), "adaptability-runs": found},
        figures={"adaptability": _figure(table)},
    )


def _verdicts(found: pd.DataFrame) -> list[Verdict]:
    scenarios = [str(name) for name in dict.fromkeys(found[_ENV])]
    methods = [str(name) for name in dict.fromkeys(found[_METHOD])]

    def of(figure: str, scenario: str, method: str) -> list[float]:
        return select(found, figure, environment=scenario, method=method)

    def gaps(one: str, other: str, goals: str) -> dict[str, Estimate]:
        return {
            name: difference(of(_REWARD, name, one), of(_REWARD, name, other))
            for name in scenarios
            if name.endswith(goals)
        }

    verdicts = [
        judge(
            f"{one} earns more than {other} where {goals}",
            gaps(one, other, name),
            above=0,
            form="+.4f",
        )
        for one in ("hypermarl", "hypermarl-linear")
        for other, name, goals in (
            ("fups-id", "different", "each agent has a goal of its own"),
            ("nops", "same", "all agents have one goal"),
        )
    ]
    verdicts += [
        judge(
            f"{method} earns at least {NEAR:.0%} of what the best method does, in every scenario "
            f"(reward above that)",
            {name: _above_best(found, name, method) for name in scenarios},
            above=0,
            form="+.4f",
        )
        for method in ROBUST
        if method in methods
    ]
    pairs = [(name, name.replace("different", "same")) for name in scenarios]
    return verdicts + [
        judge(
            f"{method}'s agents act more differently with a goal each than with one for all (SND)",
            {
                f"{different} - {same}": difference(
                    of(_SND, different, method), of(_SND, same, method)
                )
                for different, same in pairs
                if different != same and same in scenarios
            },
            above=0,
            form="+.3f",
        )
        for method in ROBUST
        if method in methods
    ]


def _above_best(found: pd.DataFrame, scenario: str, method: str) -> Estimate:
    """Reward of a method above `NEAR` times that of the best other one, below 0 if it is worse."""
    rewards = {
        str(name): runs[_REWARD].dropna().tolist()
        for name, runs in found[found[_ENV] == scenario].groupby(_METHOD)
        if name != method
    }
    known = {name: values for name, values in rewards.items() if values}
    if not known:
        return estimate([])
    best = max(known.values(), key=lambda values: estimate(values).value)
    return difference(
        select(found, _REWARD, environment=scenario, method=method), [NEAR * x for x in best]
    )


def _figure(table: pd.DataFrame) -> str:
    """Of Navigation, by number of agents; over what goals they have."""
    names = [str(name) for name in dict.fromkeys(table[_ENV])]
    navigation = {name: name.split("-")[1:] for name in names if name.startswith("navigation-")}
    goals = [g for g in ("same", "half", "different") if g in {x[1] for x in navigation.values()}]
    panels = []
    for figure in _FIGURES:
        for agents in dict.fromkeys(x[0] for x in navigation.values()):
            lines = []
            for method in dict.fromkeys(table[_METHOD]):
                where = (table[_METHOD] == method) & (table["figure"] == figure)
                rows = table[where].set_index(_ENV)[["value", "low", "high"]]
                wanted = [f"navigation-{agents}-{goal}" for goal in goals]
                numbers = [Estimate(*row) for row in rows.reindex(wanted).to_numpy()]
                lines.append((str(method), numbers))
            panels.append(
                Panel(
                    title=f"{agents.removesuffix('ag')} agents: {figure}",
                    lines=[Line.of(*line) for line in lines],
                    ticks=ticks_for([x for _, numbers in lines for x in numbers]),
                )
            )
    return chart(panels, goals, "goals")


def _sweep(
    presets: Sequence[str],
    settings: dict[str, Any],
    seeds: int,
    methods: Sequence[str] = METHODS,
    further: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    sweep = {
        "settings": {"diagnostics": "full", "evaluation": {"every": 0}, **settings},
        "grid": {
            "preset": list(presets),
            "method": list(methods),
            "seed": list(range(seeds)),
        },
    }
    runs = [run | {"seed": seed} for run in further for seed in range(seeds)]
    return sweep | ({"runs": runs} if runs else {})


_NAVIGATION = tuple(
    f"navigation-{agents}ag-{goals}"
    for agents in (2, 4, 8)
    for goals in ("same", "half", "different")
    if (agents, goals) != (2, "half")
)
_PRESETS = (*_NAVIGATION, "dispersion")
_FURTHER = [{"preset": preset, "method": SEPS} for preset in _PRESETS if "-2ag-" not in preset]
_FURTHER += [{"preset": preset, "algorithm": HAPPO, "method": "nops"} for preset in _NAVIGATION]
_SMALL = {
    "copies": 64,
    "steps": 32,
    "network": {"hidden": [32, 32]},
    "hypernetwork": {"hidden": [32]},
    "ppo": {"epochs": 4, "minibatches": 4, "learning_rate": 1e-3},
    "seps": {"pretraining_frames": 4096},
}
"""Settings that keep the smaller budgets small, over the paper's."""

ADAPTABILITY = Study(
    name="adaptability",
    question="Which methods do well whether agents have the same goal or different ones?",
    budgets={
        "quick": _sweep(
            ("navigation-4ag-same", "navigation-4ag-different"),
            _SMALL | {"frames": 22_528, "every": 10, "effects_every": 10},
            5,
            methods=(*ROBUST, "dico"),
        ),
        "standard": _sweep(
            _PRESETS,
            _SMALL | {"frames": 411_648, "every": 40, "effects_every": 40},
            5,
            further=_FURTHER,
        ),
        "full": _sweep(_PRESETS, {"every": 40}, 10, further=_FURTHER),
    },
    about="Interquartile means over seeds with 95 % percentile bootstrap intervals (none for fewer "
    "than 5 seeds). VMAS Navigation, with one goal for all agents (same), a goal for half of "
    "them and one for each other (half), or one each (different), and Dispersion. Reward: per "
    "step and agent, mean over the last tenth of the updates. SND: mean distance between two "
    "agents' action distributions on observations that they share, at the last update at "
    "which it is measured (docs/diversity.md); Wasserstein's, in action units, in Navigation, "
    "Jensen-Shannon's in Dispersion: not to be compared between the two. The best other "
    "method is chosen by the same seeds that it is compared on, which flatters it. dico is "
    "told which diversity to have in the scenarios of one goal, and with 2 agents "
    "(docs/presets.md); happo learns from the team's reward and is of Navigation only, seps is of "
    "more than 2 agents (docs/baselines.md).\n\n"
    "Not as in the paper (but for `--budget full`): fewer frames, copies and steps, small "
    "equal networks for all methods, and one chosen set of PPO's settings, while the paper "
    "searched some of them for dico; its returns are shown in figures only. `--budget quick` "
    "is of five methods and two scenarios, after 11 updates.",
    read=read,
)

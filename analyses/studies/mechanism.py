"""Is it the coupling that protects agents? It is set by hand, and conflict taken away."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analyses.studies.chart import Line, Panel, chart, ticks_for
from analyses.studies.seeds import (
    difference,
    estimate,
    estimates,
    over_last_tenth,
    over_pairs,
    over_training,
    select,
    side_by_side,
)
from analyses.studies.study import Findings, Study
from analyses.studies.verdict import Estimate, Verdict, judge
from gradlab.run import Run
from trainers.config import NONE

COSINES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Couplings that are set."""
MOST = 0.9
"""The largest at which agents can still differ: at 1 all have the same policy for good."""
LEAST = 0.25
"""The smallest at which steps reach the others: at 0 they do nothing to them by construction."""
SURGERIES = ("pcgrad", "upgrad")
APART, ALIKE = "specialisation-temporal", "synchronisation-temporal"
"""A game in which agents must differ, and one in which they must not."""

_SCHEME = "sharing"
_REWARD, _LEARNING = "reward", "reward over training"
_COUPLING = "measured coupling"
_SHARED = "cosine of g"
_OWN, _OTHERS = "change of own loss", "change of others' losses"
_FIGURES = {
    _REWARD: ".3f",
    _LEARNING: ".3f",
    _COUPLING: ".3f",
    "cosine of Z": "+.3f",
    _SHARED: "+.3f",
    _OWN: "+.2e",
    _OTHERS: "+.2e",
    "conflict rate of g": ".3f",
}
_BY = ("game", _SCHEME)


def set_to(cosine: int | float) -> str:
    """Name the runs whose coupling is set by hand.

    Args:
        cosine: What it is set to.

    Returns:
        Their name in the tables.
    """
    return f"coupling {cosine:g}"


def _surgery(name: str) -> str:
    return "fups-id" if name == NONE else f"fups-id+{name}"


def _scheme(run: Run) -> str:
    if run.method_of("actor") == "hypermarl-linear":
        return set_to(run.config["hypernetwork"]["cosine"])
    return _surgery(run.config["aggregate"])


def row_of(run: Run) -> dict[str, Any]:
    """Read a run's numbers.

    Args:
        run: A finished run.

    Returns:
        One number for each figure.
    """
    return {
        "game": run.environment,
        _SCHEME: _scheme(run),
        "seed": int(run.info["seed"]),
        _REWARD: over_last_tenth(run, "reward_per_step"),
        _LEARNING: float(run.quantity("reward_per_step").mean()),
        _COUPLING: over_pairs(run, "coupling"),
        "cosine of Z": over_pairs(run, "cosine_debiased", space="theta"),
        _SHARED: over_pairs(run, "cosine_debiased", space="psi"),
        _OWN: over_pairs(run, "transference", own=True),
        _OTHERS: over_pairs(run, "transference"),
        "conflict rate of g": over_training(run, "conflict_rate", "psi"),
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
        Rewards, and what agents' steps do to each other, by coupling and by aggregator.
    """
    table = estimates(found, _BY, _FIGURES)
    return Findings(
        shown=side_by_side(table, _BY[:1], _SCHEME),
        verdicts=_verdicts(found),
        tables={"mechanism": table.drop(columns="text"), "mechanism-runs": found},
        figures={"mechanism": _figure(table)},
    )


def trend(
    found: pd.DataFrame, figure: str, game: str, *, least: float = 0.0, most: float = 1.0
) -> Estimate:
    """Spearman's rank correlation of a number with the coupling that was set.

    Args:
        found: One row for each run.
        figure: The number's column.
        game: Of which game.
        least: The smallest coupling that counts.
        most: The largest.

    Returns:
        Over seeds; each has a correlation of its own, over its couplings. Unknown for seeds without
        two different numbers.
    """
    cosines = {set_to(cosine): cosine for cosine in COSINES if least <= cosine <= most}
    of_game = found[(found["game"] == game) & found[_SCHEME].isin(cosines)]
    of_seeds = []
    for _, runs in of_game.groupby("seed"):
        known = runs[runs[figure].notna()]
        if known[figure].nunique() > 1 and known[_SCHEME].nunique() > 1:
            couplings = known[_SCHEME].map(cosines)
            of_seeds.append(float(stats.spearmanr(couplings, known[figure]).statistic))
    return estimate(of_seeds)


def _verdicts(found: pd.DataFrame) -> list[Verdict]:
    games = list(dict.fromkeys(found["game"]))

    def gap(figure: str, game: str, one: str, other: str) -> dict[str, Estimate]:
        values = (select(found, figure, game=game, **{_SCHEME: s}) for s in (one, other))
        return {f"{one} - {other}": difference(*values)}

    verdicts = []
    if APART in games:
        verdicts += [
            judge(
                f"{APART}: the more coupling, the less reward, among couplings at which agents can "
                "differ (Spearman)",
                {f"0 to {MOST:g}": trend(found, _REWARD, APART, most=MOST)},
                below=0,
                form="+.2f",
            ),
            judge(
                f"{APART}: agents without coupling earn more than with the largest at which they "
                "can differ",
                gap(_REWARD, APART, set_to(0), set_to(MOST)),
                above=0,
                form="+.3f",
            ),
        ]
    if ALIKE in games:
        verdicts += [
            judge(
                f"{ALIKE}: the more coupling, the more reward over the training (Spearman)",
                {"0 to 1": trend(found, _LEARNING, ALIKE)},
                above=0,
                form="+.2f",
            ),
            judge(
                f"{ALIKE}: agents that are fully coupled earn more over the training than agents "
                "that are not",
                gap(_LEARNING, ALIKE, set_to(1), set_to(0)),
                above=0,
                form="+.3f",
            ),
        ]
    if APART in games:
        verdicts.append(
            judge(
                f"{APART}: the more coupling, the more an agent's step raises the others' losses, "
                "among couplings at which agents can differ (Spearman; without 0, at which steps "
                "do nothing to others by construction)",
                {f"{LEAST:g} to {MOST:g}": trend(found, _OTHERS, APART, least=LEAST, most=MOST)},
                above=0,
                form="+.2f",
            )
        )
    if ALIKE in games:
        verdicts.append(
            judge(
                f"{ALIKE}: the more coupling, the more an agent's step lowers the others' losses "
                "(Spearman; without 0, at which steps do nothing to others by construction)",
                {f"{LEAST:g} to 1": trend(found, _OTHERS, ALIKE, least=LEAST)},
                below=0,
                form="+.2f",
            )
        )
    return verdicts + [
        judge(
            f"{game}: conflict taken away by {name}, fups-id earns more",
            gap(_REWARD, game, _surgery(name), "fups-id"),
            above=0,
            form="+.3f",
        )
        for game in games
        for name in SURGERIES
    ]


def _figure(table: pd.DataFrame) -> str:
    known = set(table[_SCHEME])
    dial = [set_to(cosine) for cosine in COSINES]
    others = [name for name in map(_surgery, (NONE, *SURGERIES)) if name in known]
    panels = []
    for game in dict.fromkeys(table["game"]):
        for figure, short in ((_REWARD, _REWARD), (_OTHERS, "others' losses")):
            where = (table["game"] == game) & (table["figure"] == figure)
            rows = table[where].set_index(_SCHEME)[["value", "low", "high"]]
            numbers = [Estimate(*row) for row in rows.reindex(dial).to_numpy()]
            levels = [
                Line(name=name, values=[rows["value"].get(name, np.nan)] * len(dial), dashed=True)
                for name in others
            ]
            panels.append(
                Panel(
                    title=f"{game}: {short}",
                    lines=[Line.of("coupling set by hand", numbers), *levels],
                    ticks=(0.0, 0.25, 0.5, 0.75, 1.0) if figure == _REWARD else ticks_for(numbers),
                )
            )
    return chart(panels, [f"{cosine:g}" for cosine in COSINES], "coupling")


def _sweep(settings: dict[str, Any], seeds: int) -> dict[str, Any]:
    games = [APART, ALIKE]
    return {
        "settings": {
            "agents": 4,
            "method": "hypermarl-linear",
            "critic_method": "nops",
            "hypernetwork": {"embedding": "equiangular", "bias": False},
            "diagnostics": "full",
            "evaluation": {"every": 0},
            **settings,
        },
        "grid": {
            "env": games,
            "hypernetwork.cosine": list(COSINES),
            "seed": list(range(seeds)),
        },
        "runs": [
            {"env": game, "method": "fups-id", "aggregate": name, "seed": seed}
            for game in games
            for name in (NONE, *SURGERIES)
            for seed in range(seeds)
        ],
    }


_PPO = {"epochs": 4, "minibatches": 4}
_SMALL = {"copies": 64, "steps": 32, "network": {"hidden": [32]}, "every": 10, "effects_every": 10}
"""Settings that keep the smaller budgets small."""

MECHANISM = Study(
    name="mechanism",
    question="Is it the coupling that protects agents from each other?",
    budgets={
        "quick": _sweep(_SMALL | {"frames": 43_008, "ppo": _PPO | {"learning_rate": 2.5e-3}}, 5),
        "standard": _sweep(_SMALL | {"frames": 104_448, "ppo": _PPO | {"learning_rate": 1e-3}}, 10),
        "full": _sweep({"frames": 1_000_000, "every": 20}, 30),
    },
    about="Interquartile means over seeds with 95 % percentile bootstrap intervals (none for fewer "
    "than 5 seeds); Spearman's correlation is one of each seed's. Coupling 0 to 1: "
    "hypermarl-linear without bias on equiangular embeddings (docs/methods.md), so that the "
    "actor's theta_i = sqrt(c) W_0 + sqrt(1 - c) W_i, with W_0 common and W_i the agent's "
    "own, and J_i J_k^T = c I: at 0 agents are separate, at 1 they have one policy for good; "
    "in between each can have any policy, so that only where they start and what their "
    "gradients do to each other differs. fups-id: a shared network with agents' numbers, "
    "plain and with conflict taken away by two aggregators (docs/aggregation.md). All critics "
    "are separate (nops). Reward: per step and agent, actions drawn, mean over the last tenth "
    "of the updates, and over all of them; 1 is the optimum. The rest is of the actor, mean "
    "over the diagnosed updates and pairs of agents: coupling as measured (docs/coupling.md); "
    "cosines without bias, where they are known, which takes gradients of both agents that stand "
    "out from noise: of a dash that is so of no pair at no update of any run, and the CSV's column "
    "*seeds* counts the runs that know one; what an agent's step along its own gradient does to "
    "its own loss and to the others' (docs/transference.md): the change of the loss on held-out "
    "samples, in the loss's unit, below 0 where it helps and above 0 where it harms, by a step a "
    "thousandth as long as the vector of the actor's trained parameters, so that it is to be "
    "compared among couplings rather than with fups-id, which has other parameters; share of pairs "
    "told to be in conflict at a false discovery rate of 5 %. At coupling 0 the change of the "
    "others' losses is 0 by construction and says nothing of any game, so that the claims about "
    "it are of couplings above 0.\n\n"
    "Not held apart: with more coupling agents' initial weights are more alike too (their "
    "first policies are all near uniform). Adam scales the gradients of W_0 and of W_i each "
    "by itself: the coupling of its steps is not quite that of the gradients, and where "
    "agents agree they are up to sqrt 2 times as long between the ends. The paper has no such "
    "experiment.",
    read=read,
)

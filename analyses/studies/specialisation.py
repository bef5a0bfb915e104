"""Which sharing schemes learn to act apart, and alike, and what their gradients do meanwhile."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from analyses.performance import task_of
from analyses.studies.across_tasks import across_tasks
from analyses.studies.chart import Line, Panel, chart
from analyses.studies.published import as_published
from analyses.studies.seeds import (
    difference,
    estimate,
    estimates,
    over_last_tenth,
    over_training,
    select,
    side_by_side,
    signal_to_noise,
)
from analyses.studies.study import Findings, Section, Study
from analyses.studies.verdict import Estimate, Verdict, judge
from gradlab.run import Run
from trainers.envs.matrix_games import NAMES

METHODS = ("fups", "fups-id", "fups-id-nostate", "nops", "hypermarl-linear", "hypermarl")
LEARNED = 0.97
AT_CHANCE = 0.03

_REWARD = "reward"
_CONFLICT = "conflict rate of g"
_FIGURES = {
    _REWARD: ".3f",
    _CONFLICT: ".3f",
    "conflict rate of Z": ".3f",
    "mean cosine of g": ".3f",
    "norm of g": ".2e",
    "signal to noise of Z": ".3f",
    "coordinate variance": ".2e",
}
_BY = ("game", "agents", "method")
_MORE_CONFLICT = "there is more conflict in the trained parameters of fups-id than of hypermarl"


def _sweep(
    games: Sequence[str],
    agents: Sequence[int],
    *,
    seeds: int,
    every: int,
    settings: Mapping[str, Any] = MappingProxyType({}),
    of: Literal["env", "preset"] = "env",
) -> dict[str, Any]:
    """A sweep of games, by gradlab's default settings or by the presets of the same names."""
    return {
        "settings": {**settings, "diagnostics": "full", "every": every},
        "grid": {
            of: list(games),
            "agents": list(agents),
            "method": list(METHODS),
            "seed": list(range(seeds)),
        },
    }


def levels(game: str, agents: int) -> tuple[float, float]:
    """Rewards of play that needs no learning.

    Args:
        game: A game's name.
        agents: How many play, with as many actions.

    Returns:
        Mean reward per step and agent if all draw actions uniformly at random, and if all always
        act alike.
    """
    others = np.arange(agents)  # how many of the others choose what I choose
    chances = stats.binom.pmf(others, agents - 1, 1 / agents)
    if game.startswith("specialisation"):
        return float(chances @ (1 / (1 + others))), 1 / agents
    return float(chances @ (1 / (agents - others))), 1.0


def _row(run: Run) -> dict[str, Any]:
    return {
        "game": run.environment,
        "agents": int(run.info["agents"]),
        "method": run.method,
        "seed": int(run.info["seed"]),
        _REWARD: over_last_tenth(run, "reward_per_step"),
        _CONFLICT: over_training(run, "conflict_rate", "psi"),
        "conflict rate of Z": over_training(run, "conflict_rate", "theta"),
        "mean cosine of g": over_training(run, "mean_cosine", "psi"),
        "norm of g": over_training(run, "norm", "psi"),
        "signal to noise of Z": signal_to_noise(run, "theta"),
        "coordinate variance": over_training(run, "coordinate_variance"),
    }


def read(runs: Sequence[Run]) -> Findings:
    """Read the study's runs.

    Args:
        runs: Those that are done.

    Returns:
        Rewards, conflict and variance of every game, number of agents and method.
    """
    found = pd.DataFrame([_row(run) for run in runs])
    table = estimates(found, _BY, _FIGURES)
    shown = side_by_side(table, _BY[:2], "method")
    known = [levels(row["game"], row["agents"]) for row in shown.to_dict("records")]
    of_reward = (shown["figure"] == _REWARD).tolist()
    for place, name in enumerate(("chance", "all the same")):
        texts = [
            f"{x[place]:.3f}" if is_reward else ""
            for x, is_reward in zip(known, of_reward, strict=True)
        ]
        shown.insert(3 + place, name, texts)
    return Findings(
        shown=shown,
        verdicts=_verdicts(found),
        tables={"specialisation": table.drop(columns="text"), "specialisation-runs": found},
        figures={
            "specialisation-reward": _figure(table, _REWARD, with_levels=True),
            "specialisation-conflict": _figure(table, _CONFLICT, with_levels=False),
        },
        sections=[as_published(found, levels), _across_tasks(runs)],
    )


def _across_tasks(runs: Sequence[Run]) -> Section:
    games = {task_of(run): (run.environment, int(run.info["agents"])) for run in runs}
    return across_tasks(
        "specialisation",
        runs,
        bounds={task: (levels(*game)[0], 1.0) for task, game in games.items()},
        scale="0 is chance, 1 the optimum",
    )


def _figure(table: pd.DataFrame, figure: str, *, with_levels: bool) -> str:
    sizes = sorted(set(table["agents"]))
    panels = []
    for game in dict.fromkeys(table["game"]):
        lines = []
        for method in dict.fromkeys(table["method"]):
            where = (table["game"] == game) & (table["method"] == method)
            rows = table[where & (table["figure"] == figure)].set_index("agents").reindex(sizes)
            numbers = [Estimate(*row) for row in rows[["value", "low", "high"]].to_numpy()]
            lines.append(Line.of(str(method), numbers))
        if with_levels:
            for place, name in enumerate(("chance", "all the same")):
                values = [levels(str(game), size)[place] for size in sizes]
                lines.append(Line(name=name, values=values, dashed=True))
        panels.append(
            Panel(title=f"{game}: {figure}", lines=lines, ticks=(0.0, 0.25, 0.5, 0.75, 1.0))
        )
    return chart(panels, [str(size) for size in sizes], "agents")


def _verdicts(found: pd.DataFrame) -> list[Verdict]:
    games, sizes = (list(dict.fromkeys(found[name])) for name in ("game", "agents"))

    def rewards(game: str, *methods: str, less_chance: bool = False) -> dict[str, Estimate]:
        return {
            f"{method}, {size} agents": estimate([
                value - (levels(game, size)[0] if less_chance else 0)
                for value in select(found, _REWARD, game=game, agents=size, method=method)
            ])
            for method in methods
            for size in sizes
        }

    def gaps(game: str, figure: str, method: str, other: str) -> dict[str, Estimate]:
        return {
            f"{size} agents": difference(
                select(found, figure, game=game, agents=size, method=method),
                select(found, figure, game=game, agents=size, method=other),
            )
            for size in sizes
        }

    verdicts = []
    if "specialisation" in games:
        verdicts += [
            judge(
                "specialisation: fups, which can't tell agents apart, does no better than chance "
                f"by more than {AT_CHANCE} (for 2 agents the paper's theorem 1: at most 0.75)",
                rewards("specialisation", "fups", less_chance=True),
                below=AT_CHANCE,
            ),
            judge(
                f"specialisation: all other methods reach {LEARNED:.0%} of the optimum",
                rewards("specialisation", *METHODS[1:]),
                above=LEARNED,
            ),
            judge(
                f"specialisation: {_MORE_CONFLICT}",
                gaps("specialisation", _CONFLICT, "fups-id", "hypermarl"),
                above=0,
                form="+.3f",
            ),
        ]
    verdicts += [
        judge(
            f"{game}: {method} reaches {LEARNED:.0%} of the optimum",
            rewards(game, method),
            above=LEARNED,
        )
        for method in ("fups", "hypermarl")
        for game in games
        if game.startswith("synchronisation")
    ]
    if (game := "specialisation-temporal") in games:
        verdicts += [
            judge(
                f"{game}: {method} earns more than fups-id",
                gaps(game, _REWARD, method, "fups-id"),
                above=0,
                form="+.3f",
            )
            for method in ("nops", "hypermarl", "fups-id-nostate")
        ]
        verdicts += [
            judge(
                f"{game}: {method}",
                gaps(game, _CONFLICT, "fups-id", other),
                above=0,
                form="+.3f",
            )
            for other, method in (
                (
                    "fups-id-nostate",
                    "that the policy sees the observation beside the ID raises conflict in the "
                    "trained parameters",
                ),
                ("hypermarl", _MORE_CONFLICT),
            )
        ]
    return verdicts


_BRISK = {"frames": 40_960, "copies": 16, "steps": 32, "ppo": {"learning_rate": 1e-3}}
"""Settings that learn from few frames: short rollouts, long steps."""

SPECIALISATION = Study(
    name="specialisation",
    question="Which sharing schemes learn to specialise and to synchronise, and do their "
    "gradients conflict?",
    budgets={
        "quick": _sweep(
            ("specialisation", "specialisation-temporal", "synchronisation-temporal"),
            (4,),
            seeds=5,
            every=6,
            settings={"frames": 60_000},
        ),
        "standard": _sweep(NAMES, (2, 4, 8, 16), seeds=5, every=20, settings=_BRISK),
        "full": _sweep(NAMES, (2, 4, 8, 16), seeds=30, every=20, of="preset"),
    },
    about="Interquartile means over seeds with 95 % percentile bootstrap intervals (none for "
    "fewer than 5 seeds). Reward: per step and agent, actions drawn, mean over the last tenth of "
    "the updates; 1 is the optimum. Chance: all draw uniformly at random. All the same: all "
    "always act alike. The rest is of the actor, mean over the diagnosed updates: shares of agent "
    "pairs told to be in conflict at a false discovery rate of 5 %, of g_i in psi-space and of "
    "Z_i in theta-space; mean plug-in cosine over pairs, as the paper reports it, which noise "
    "that agents share can turn; mean plug-in norm of g_i; squared length of Z_i over its "
    "variance, without bias, ratio of means over updates and agents; coordinate variance, what "
    "the paper's code calls gradient variance (docs/variance.md).\n\nNot as in the paper: trained "
    "by PPO with a learned baseline, and but for `--budget full` by gradlab's default settings, "
    "all methods with the same policy network (64, 64), while the official trainer uses REINFORCE, "
    "one hidden layer of 64 units, and gives nops 64/N. `--budget full` has the presets' settings "
    "(docs/presets.md), which are the paper's where they are known: these networks, one pass in "
    "one minibatch, lambda 1. The official trainer also computes returns over the rewards of all "
    "agents interleaved, consumes a queue that lags behind, and multiplies each sample's weights "
    "with all samples' states for HyperMARL; evaluates greedily, where fups in the Specialisation "
    "game earns 1/N instead of chance; and returns the mean cosine with its sign turned.",
    read=read,
)

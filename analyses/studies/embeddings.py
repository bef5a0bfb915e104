"""Do agents that share a goal end up with embeddings near each other, and the others apart?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from scipy.spatial.distance import pdist, squareform

from analyses.embeddings import pca, tsne_of_seed
from analyses.studies.chart import Cloud, Line, Panel, chart, scatter, ticks_for
from analyses.studies.relabelling import Relabelled, correlations, gaps, within_seeds
from analyses.studies.seeds import (
    difference,
    estimate,
    estimates,
    over_last_tenth,
    select,
    side_by_side,
)
from analyses.studies.study import Findings, Study
from analyses.studies.verdict import Verdict, judge
from gradlab import procrustes
from gradlab.run import Run
from trainers.evaluation import saved_trainer

AGENTS = 4
PAIRS = (0, 0, 1, 1)
"""Whose goal each agent has where two goals are shared by two each."""
KINDS = ("embeddings", "weights", "behaviour")
"""What agents are near or far in."""

_GOALS = "goals"
_REWARD = "reward"
_MANTEL = "embeddings as behaviour"
_BY = (_GOALS,)

Matrix = Float[np.ndarray, "agent agent_other"]


def goals_of(env_args: Mapping[str, Any]) -> tuple[int, ...]:
    """Tell which agents of VMAS's Navigation share a goal.

    Args:
        env_args: Arguments to the scenario.

    Returns:
        The number of each agent's goal.
    """
    same = int(env_args.get("agents_with_same_goal", 1))
    if env_args.get("split_goals", False):
        return tuple(agent // same for agent in range(AGENTS))
    return tuple(0 if agent < same else agent - same + 1 for agent in range(AGENTS))


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """How a run's agents lie to each other in the end.

    Attributes:
        goals: Each agent's goal.
        distances: Between agents, in each of `KINDS`.
        embeddings: Of the actor, the last that are recorded.
    """

    goals: tuple[int, ...]
    distances: Mapping[str, Matrix]
    embeddings: Float[np.ndarray, "agent feature"]


def arrange(run: Run) -> Arrangement:
    """Read how a run's agents lie to each other in the end.

    Args:
        run: A run of hypermarl with learned embeddings.

    Returns:
        Euclidean distances of embeddings and of generated weights, and distances of behaviour
        (docs/diversity.md).
    """
    embeddings = run.embeddings["actor"].isel(update=-1).to_numpy().astype(float)
    with torch.no_grad():
        theta = saved_trainer(run, None, []).actor.all_agents()
    weights = torch.cat([t.flatten(1) for t in theta.values() if len(t) == AGENTS], dim=1)
    return Arrangement(
        goals=goals_of(run.config["env_args"]),
        distances={
            "embeddings": squareform(pdist(embeddings)),
            "weights": squareform(pdist(weights.double().numpy())),
            "behaviour": run.quantity("behavioural_distance").isel(update=-1).to_numpy(),
        },
        embeddings=embeddings,
    )


def read(runs: Sequence[Run]) -> Findings:
    """Read the study's runs.

    Args:
        runs: Those that are done.

    Returns:
        How near agents are to those that share their goal, and to others.
    """
    arrangements = [arrange(run) for run in runs]
    rows = [_row(run, arrangement) for run, arrangement in zip(runs, arrangements, strict=True)]
    found = pd.DataFrame(rows)
    table = estimates(found, _BY, _FORMS)
    of_goals: dict[str, list[Arrangement]] = {}
    for row, arrangement in zip(rows, arrangements, strict=True):
        of_goals.setdefault(row[_GOALS], []).append(arrangement)
    tests = {name: _tests(some) for name, some in of_goals.items()}
    shown = side_by_side(table, (), _GOALS)
    for what in (*map(_gap, KINDS), _MANTEL):
        row = {name: test[what].text() for name, test in tests.items()}
        shown.loc[len(shown)] = {"figure": f"{what}: permutation test", **row}
    return Findings(
        shown=shown,
        verdicts=_verdicts(found, tests),
        tables={"embeddings": table.drop(columns="text"), "embeddings-runs": found},
        figures={
            "embeddings-distance": _distances_over_training(runs),
            "embeddings-pca": _pictures(of_goals, "PCA"),
            "embeddings-tsne": _pictures(of_goals, "t-SNE"),
        },
    )


def _named(goals: Sequence[int]) -> str:
    number = len(set(goals))
    return f"{number} goal{'s' if number > 1 else ''}"


def _gap(kind: str) -> str:
    return f"gap in {kind}"


def _spread(kind: str) -> str:
    return f"distance in {kind}"


_FORMS = {
    _REWARD: ".4f",
    **{_spread(kind): ".3f" for kind in KINDS},
    **{_gap(kind): "+.3f" for kind in KINDS},
    _MANTEL: "+.2f",
}


def _row(run: Run, arrangement: Arrangement) -> dict[str, Any]:
    distances = arrangement.distances
    pair = np.triu_indices(AGENTS, 1)
    return {
        _GOALS: _named(arrangement.goals),
        "seed": int(run.info["seed"]),
        _REWARD: over_last_tenth(run, "reward_per_step"),
        **{_spread(kind): float(distances[kind][pair].mean()) for kind in KINDS},
        **{_gap(kind): float(gaps(distances[kind], PAIRS)[0]) for kind in KINDS},
        _MANTEL: float(correlations(distances["embeddings"], distances["behaviour"])[0]),
    }


def _tests(arrangements: Sequence[Arrangement]) -> dict[str, Relabelled]:
    """Permutation tests by what they are of; of goals that are not pairs they are a control."""
    return {
        _gap(kind): within_seeds([gaps(x.distances[kind], PAIRS) for x in arrangements])
        for kind in KINDS
    } | {
        _MANTEL: within_seeds([
            correlations(x.distances["embeddings"], x.distances["behaviour"]) for x in arrangements
        ])
    }


def _verdicts(found: pd.DataFrame, tests: Mapping[str, Mapping[str, Relabelled]]) -> list[Verdict]:
    one, two, four = (_named(goals) for goals in (range(1), range(2), range(4)))
    verdicts = []
    if two in tests:
        verdicts = [
            tests[two][_gap(kind)].verdict(
                f"{two}: agents that share one are nearer to each other in {kind} than to the "
                "others",
                estimate(select(found, _gap(kind), goals=two)).text("+.3f"),
            )
            for kind in KINDS
        ]
    verdicts += [
        tests[name][_MANTEL].verdict(
            f"{name}: the further apart two agents' embeddings, the further apart their behaviour "
            "(Mantel's test, Spearman)",
            estimate(select(found, _MANTEL, goals=name)).text("+.2f"),
        )
        for name in (two, four)
        if name in tests
    ]
    if {one, four} <= tests.keys():
        verdicts += [
            judge(
                f"agents lie further apart in {kind} with a goal each than with one for all",
                {
                    f"{four} - {one}": difference(
                        *(select(found, _spread(kind), goals=name) for name in (four, one))
                    )
                },
                above=0,
                form="+.3f",
            )
            for kind in KINDS
        ]
    return verdicts


def _distances_over_training(runs: Sequence[Run]) -> str:
    """How far embeddings moved apart, within the pairs and across, over updates."""
    pair = np.array(PAIRS)
    same = (pair[:, None] == pair) & ~np.eye(AGENTS, dtype=bool)
    sides = {"agents 0 and 1, 2 and 3": same, "other pairs": pair[:, None] != pair}
    of_goals: dict[str, list[xr.DataArray]] = {}
    for run in runs:
        goals = _named(goals_of(run.config["env_args"]))
        of_goals.setdefault(goals, []).append(run.embeddings["actor"])
    updates = next(iter(of_goals.values()))[0]["update"].to_numpy()
    kept = np.unique(np.linspace(0, len(updates) - 1, 6).astype(int))
    panels = []
    for goals, paths in of_goals.items():
        distances = [
            np.array([squareform(pdist(rows)) for rows in path.to_numpy()[kept].astype(float)])
            for path in paths
        ]
        lines = {
            name: [
                estimate([
                    float(seed[place][side].mean() / seed[0][side].mean()) - 1 for seed in distances
                ])
                for place in range(len(kept))
            ]
            for name, side in sides.items()
        }
        panels.append(
            Panel(
                title=f"{goals}: growth of embeddings' distance",
                lines=[Line.of(name, numbers) for name, numbers in lines.items()],
                ticks=ticks_for([x for numbers in lines.values() for x in numbers]),
            )
        )
    return chart(panels, [str(update) for update in updates[kept]], "update")


def _pictures(of_goals: Mapping[str, Sequence[Arrangement]], how: str) -> str:
    """Final embeddings of all seeds, each turned onto the first one's."""
    clouds = []
    for name, arrangements in of_goals.items():
        first = arrangements[0].embeddings - arrangements[0].embeddings.mean(0)
        rows = np.concatenate([
            procrustes(first, x.embeddings, translation=True)["aligned"].to_numpy()
            for x in arrangements
        ])
        across, up = f"{how} 1", f"{how} 2"
        if how == "PCA":
            found = pca(xr.DataArray(rows[None], dims=("update", "agent", "feature")))
            places = found["position"].to_numpy()[0]
            shares = found["explained_variance_ratio"].to_numpy()
            across, up = (
                f"{axis} ({share:.0%})" for axis, share in zip((across, up), shares, strict=True)
            )
        else:
            places, _ = tsne_of_seed(rows, seed=0)
        clouds.append(
            Cloud(
                title=f"{name}: final embeddings",
                across=across,
                up=up,
                points=[(float(x), float(y)) for x, y in places],
                marks=[str(agent) for _ in arrangements for agent in range(AGENTS)],
                groups=[f"goal {goal}" for x in arrangements for goal in x.goals],
            )
        )
    return scatter(clouds)


def _sweep(settings: dict[str, Any], seeds: int) -> dict[str, Any]:
    return {
        "settings": {
            "preset": "navigation-4ag-different",
            "method": "hypermarl",
            "diagnostics": "full",
            "evaluation": {"every": 0},
            **settings,
        },
        "grid": {
            "env_args": [
                {"agents_with_same_goal": 4},
                {"agents_with_same_goal": 2, "split_goals": True},
                {"agents_with_same_goal": 1},
            ],
            "seed": list(range(seeds)),
        },
    }


_SMALL = {
    "copies": 64,
    "steps": 32,
    "network": {"hidden": [32, 32]},
    "hypernetwork": {"hidden": [32]},
    "ppo": {"epochs": 4, "minibatches": 4, "learning_rate": 1e-3},
}
"""Settings that keep the smaller budgets small, over the paper's."""

EMBEDDINGS = Study(
    name="embeddings",
    question="Do agents that share a goal end up with embeddings near each other?",
    budgets={
        "quick": _sweep(_SMALL | {"frames": 63_488, "every": 10, "effects_every": 10}, 5),
        "standard": _sweep(_SMALL | {"frames": 329_728, "every": 20, "effects_every": 20}, 10),
        "full": _sweep({"every": 20}, 10),
    },
    about="VMAS Navigation, 4 agents that see all goals and are paid each for coming nearer to its "
    "own: one goal for all, one for agents 0 and 1 and another for 2 and 3, or a goal each. "
    "hypermarl with learned embeddings of 4 numbers, which start with the same distance "
    "between any two. Distances in the end: of the actor's embeddings, of the weights that it "
    "makes of them, and of the policies' action distributions on the same observations "
    "(docs/diversity.md). Gap: mean distance between agents of different pairs (0 and 1, 2 "
    "and 3) less that within the pairs, over the mean of all; with one goal, or one each, the "
    "same split is a control, which should show nothing; of six independent controls one at "
    "p < 0.05 is seen by chance in about a quarter of studies (1 - 0.95^6 = 0.26). Permutation "
    "test: the pairs are drawn anew within each seed, all 3 ways; p is the share of all "
    "combinations whose mean gap is at least as large, and a claim is supported if it is at most "
    "0.05, not supported if as few have one as small. Mantel's test, of embeddings against "
    "behaviour, permutes the agents within each seed in the same way. Interquartile means over "
    "seeds with 95 % percentile bootstrap intervals (none for fewer than 5 seeds). Reward: per "
    "step and agent, mean over the last tenth of the updates.\n\n"
    "Pictures: final embeddings of all seeds, each turned onto the first one's as it fits "
    "best, agent by agent (docs/geometry.md), so that it is no finding that the points of one "
    "agent are near each other; points are agents' numbers, colours their goals. In t-SNE's, "
    "sizes and distances between clusters mean little.\n\n"
    "The official code saves embeddings; nothing that projects or tests them was found. Here "
    "are fewer frames, copies and steps than the paper's budget has, and smaller networks "
    "(but for `--budget full`); the settings of PPO are chosen, as the paper's were not "
    "found.",
    read=read,
)

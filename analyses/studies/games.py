"""How each sharing scheme does in all games, stateless and temporal, as agents are added."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import pandas as pd
from scipy import stats

from analyses.aggregate import interquartile_mean
from analyses.studies.study import Findings, Study, Verdict, over_last_tenth
from gradlab.run import Run
from trainers.envs.matrix_games import NAMES, chance_return

METHODS = ("fups", "fups-id", "fups-id-nostate", "nops", "hypermarl")
_FRAMES = 100_000
_AT_CHANCE = 0.03
_LEARNED = 0.97


def _runs(games: tuple[str, ...], agents: tuple[int, ...], seeds: int) -> dict[str, Any]:
    return {
        f"{game}-{n}ag-{method}-seed{seed}": {
            "method": method,
            "env": game,
            "agents": n,
            "seed": seed,
            "frames": _FRAMES,
            "diagnostics": "off",
        }
        for game, n, method, seed in product(games, agents, METHODS, range(seeds))
    }


def _report(runs: Mapping[str, Run]) -> Findings:
    found = pd.DataFrame([
        {
            "game": str(run.config["env"]),
            "agents": int(run.info["agents"]),
            "method": run.method,
            "reward": over_last_tenth(run, "reward_per_step"),
        }
        for run in runs.values()
    ])
    rows = []
    for (game, agents), cells in found.groupby(["game", "agents"], sort=False):
        count = int(str(agents))
        levels = (1 / count, chance_return(count, count))
        kind = str(game).startswith("specialisation")
        row: dict[str, Any] = {
            "game": game,
            "agents": count,
            "all the same": f"{levels[0]:.3f}" if kind else "1.000",
            "chance": f"{levels[1]:.3f}" if kind else "",
        }
        for method in METHODS:
            values = cells.loc[cells["method"] == method, "reward"].to_numpy(float)
            mean, low, high = (f"{x:.3f}" for x in interquartile_mean(values))
            row[method] = f"{mean} ({low} to {high})" if len(values) > 1 else mean
        rows.append(row)
    return Findings(table=pd.DataFrame(rows), verdicts=_verdicts(found))


def _verdicts(found: pd.DataFrame) -> list[Verdict]:
    """What the paper's theorem and figures say, as far as the runs tell."""

    def of(game: str, *methods: str) -> pd.DataFrame:
        return found[(found["game"] == game) & found["method"].isin(methods)]

    def lowest(game: str, *methods: str) -> float:
        return float(of(game, *methods)["reward"].min())

    def centre(game: str, method: str) -> pd.Series:
        by_size = of(game, method).groupby("agents")["reward"]
        return by_size.agg(lambda values: stats.trim_mean(values, 0.25))

    verdicts = []
    shared = of("specialisation", "fups")
    if len(shared):
        chance = shared["agents"].map(lambda n: chance_return(n, n))
        above = float((shared["reward"] - chance).max())
        reached = lowest("specialisation", *(m for m in METHODS if m != "fups"))
        verdicts += [
            Verdict(
                claim="specialisation: fups, which can't tell agents apart, never does better than "
                f"chance by more than {_AT_CHANCE} (for 2 agents theorem 1: at most 0.75)",
                holds=above <= _AT_CHANCE,
                evidence=f"at most {above:+.3f}",
            ),
            Verdict(
                claim=f"specialisation: all others reach {_LEARNED:.0%} of the optimum in every "
                "run",
                holds=reached >= _LEARNED,
                evidence=f"lowest {reached:.3f}",
            ),
        ]
    for game in ("synchronisation", "synchronisation-temporal"):
        if len(of(game, "fups")):
            reached = lowest(game, "fups")
            verdicts.append(
                Verdict(
                    claim=f"{game}: fups reaches {_LEARNED:.0%} of the optimum in every run",
                    holds=reached >= _LEARNED,
                    evidence=f"lowest {reached:.3f}",
                )
            )
    game = "specialisation-temporal"
    for better in ("nops", "hypermarl"):
        if len(of(game, better)):
            gaps = centre(game, better) - centre(game, "fups-id")
            said = ", ".join(f"{gap:+.3f} for {agents}" for agents, gap in gaps.items())
            verdicts.append(
                Verdict(
                    claim=f"{game}: {better} does better than fups-id at every number of agents",
                    holds=bool((gaps > 0).all()),
                    evidence=f"difference of interquartile means: {said} agents",
                )
            )
    return verdicts


GAMES_STUDY = Study(
    name="games",
    question="How do the sharing schemes do in the stateless and temporal games, 2 to 16 agents?",
    budgets={
        "quick": _runs(("specialisation", "synchronisation"), (2,), 1),
        "standard": _runs(NAMES, (2, 4, 8, 16), 5),
    },
    caption="Each cell: mean reward per step and agent over the last tenth of the updates, actions "
    f"sampled, after {_FRAMES} frames with the default settings of every method: interquartile mean"
    " over seeds and its 95 % bootstrap interval; 1 is the optimum. Chance: uniformly random play, "
    "1 - (1 - 1/N)^N for N agents. All the same: all agents always act alike.",
    report=_report,
)

"""Can a shared policy specialise? The stateless Specialisation game, by sharing scheme."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import pandas as pd

from analyses.studies.study import Findings, Study, Verdict, over_last_tenth
from gradlab.run import Run
from trainers.envs.matrix_games import chance_return

METHODS = ("fups", "fups-id", "nops", "hypermarl")
_LEARNED = 0.97
_AT_CHANCE = 0.03
_FIGURES = {"return": 3, "negative cosines of g": 3, "mean cosine of g": 3, "seconds": 0}


def _runs(agents: tuple[int, ...], seeds: int) -> dict[str, Mapping[str, Any]]:
    return {
        f"{method}-{n}ag-seed{seed}": {
            "method": method,
            "env": "specialisation",
            "agents": n,
            "seed": seed,
            "diagnostics": "light",
        }
        for n, method, seed in product(agents, METHODS, range(seeds))
    }


def _over_training(run: Run, quantity: str) -> float:
    """Mean over the diagnosed updates of a figure of the whole actor in psi-space."""
    where = {"network": "actor", "space": "psi", "layer": "all"}
    return float(run.quantity(quantity).sel(where).mean())


def _report(runs: Mapping[str, Run]) -> Findings:
    found = pd.DataFrame([
        {
            "method": run.method,
            "agents": int(run.info["agents"]),
            "return": over_last_tenth(run, "episode_return"),
            "negative cosines of g": _over_training(run, "negative_rate"),
            "mean cosine of g": _over_training(run, "mean_cosine"),
            "seconds": float(run.quantity("seconds").sum()),
        }
        for run in runs.values()
    ])
    rows = []
    for agents, of_size in found.groupby("agents"):
        count = int(str(agents))
        levels = {
            "all the same": f"{1 / count:.3f}",
            "chance": f"{chance_return(count, count):.3f}",
        }
        for figure, digits in _FIGURES.items():
            row = {"agents": count, "figure": figure}
            row |= levels if figure == "return" else dict.fromkeys(levels, "")
            for method in METHODS:
                values = of_size.loc[of_size["method"] == method, figure]
                mean, low, high = (
                    f"{x:.{digits}f}" for x in (values.mean(), values.min(), values.max())
                )
                row[method] = f"{mean} ({low} to {high})"
            rows.append(row)
    return Findings(table=pd.DataFrame(rows), verdicts=_verdicts(found))


def _verdicts(found: pd.DataFrame) -> list[Verdict]:
    verdicts = []
    for method in METHODS[1:]:
        lowest = float(found.loc[found["method"] == method, "return"].min())
        verdicts.append(
            Verdict(
                claim=f"{method} reaches {_LEARNED:.0%} of the optimum in every run",
                holds=lowest >= _LEARNED,
                evidence=f"lowest return {lowest:.3f}",
            )
        )
    shared = found[found["method"] == "fups"]
    chance = shared["agents"].map(lambda agents: chance_return(agents, agents))
    gap = float((shared["return"] - chance).abs().max())
    verdicts.append(
        Verdict(
            claim=f"fups, which can't tell agents apart, stays within {_AT_CHANCE} of chance "
            "in every run",
            holds=gap <= _AT_CHANCE,
            evidence=f"largest distance {gap:.3f}",
        )
    )
    return verdicts


SPECIALISATION = Study(
    name="specialisation",
    question="Which sharing schemes learn to specialise in the stateless Specialisation game?",
    budgets={"quick": _runs((2, 4), 1), "standard": _runs((2, 4, 8), 5)},
    caption="Each cell: mean over seeds (smallest to largest seed). Return: sampled, mean over the "
    "last tenth of the updates; 1 is the optimum. Chance: uniformly random play, 1 - (1 - 1/N)^N "
    "for N agents. All the same: 1/N. Conflict rate and mean cosine: plug-in figures of the actor's"
    " g_i in psi-space over all pairs, mean over the diagnosed updates. Seconds: of updates, on "
    "one thread.",
    report=_report,
)

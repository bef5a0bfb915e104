"""Can a shared policy specialise? The stateless Specialisation game, by sharing scheme."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from analyses.studies.study import Study, Verdict
from gradlab.run import Run
from trainers.envs.matrix_games import chance_return

METHODS = ("fups", "fups-id", "nops", "hypermarl")
_LEARNED = 0.97
_AT_CHANCE = 0.03
_LAST = 0.1  # share of a training over which its return is averaged


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


def final_return(run: Run) -> float:
    """Mean sampled return over the last tenth of a training.

    Args:
        run: A finished run.

    Returns:
        The mean; 1 is the game's optimum.
    """
    returns = run.quantity("episode_return").to_numpy()
    return float(np.nanmean(returns[-max(1, int(_LAST * len(returns))) :]))


def _report(runs: Mapping[str, Run]) -> tuple[pd.DataFrame, list[Verdict]]:
    found = pd.DataFrame([
        {
            "method": run.method,
            "agents": int(run.info["agents"]),
            "return": final_return(run),
            "seconds": float(run.quantity("seconds").sum()),
        }
        for run in runs.values()
    ])
    rows = []
    for agents, of_size in found.groupby("agents"):
        count = int(str(agents))
        row = {"agents": count, "all the same": f"{1 / count:.3f}"}
        row["chance"] = f"{chance_return(count, count):.3f}"
        for method in METHODS:
            values = of_size.loc[of_size["method"] == method, "return"]
            row[method] = f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"
        row["longest run"] = f"{of_size['seconds'].max():.0f} s"
        rows.append(row)
    return pd.DataFrame(rows), _verdicts(found)


def _verdicts(found: pd.DataFrame) -> list[Verdict]:
    verdicts = []
    means = found.groupby(["method", "agents"])["return"].mean()
    for method in METHODS[1:]:
        lowest = float(means[method].min())
        verdicts.append(
            Verdict(
                claim=f"{method} reaches {_LEARNED:.0%} of the optimum for every number of agents",
                holds=lowest >= _LEARNED,
                evidence=f"lowest mean over seeds {lowest:.3f}",
            )
        )
    gaps = [abs(float(mean) - chance_return(int(n), int(n))) for n, mean in means["fups"].items()]
    verdicts.append(
        Verdict(
            claim=f"fups, which can't tell agents apart, stays within {_AT_CHANCE} of chance",
            holds=max(gaps) <= _AT_CHANCE,
            evidence=f"largest distance {max(gaps):.3f}",
        )
    )
    return verdicts


SPECIALISATION = Study(
    name="specialisation",
    question="Which sharing schemes learn to specialise in the stateless Specialisation game?",
    budgets={"quick": _runs((2, 4), 1), "standard": _runs((2, 4, 8), 5)},
    report=_report,
)

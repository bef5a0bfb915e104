"""What more agents cost each sharing scheme, and what becomes of their conflict and coupling."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analyses.studies.chart import Line, Panel, chart, ticks_for
from analyses.studies.seeds import (
    difference,
    estimate,
    estimates,
    over_last_tenth,
    over_training,
    select,
    side_by_side,
)
from analyses.studies.size import trained_parameters
from analyses.studies.study import Findings, Study
from analyses.studies.verdict import Estimate, Verdict, judge
from gradlab.run import Run

METHODS = ("fups-id", "nops", "hypermarl-linear", "hypermarl")
SIZES = (2, 4, 8, 16, 32, 64)

LINEAR = 0.8
"""Exponent of growth from which on it counts as linear: that of (N + 1) is below 0.9 here."""
FLAT = 0.1
"""Exponent of growth below which there counts as being hardly any."""

_REFERENCE = "fups-id"
_TRAINING, _DIAGNOSIS = "seconds per update", "seconds per diagnosis"
_ACTOR, _CRITIC = "trained parameters of the actors", "trained parameters of the critics"
_CONFLICT, _COSINE, _COUPLING = "conflict rate of g", "mean cosine of g", "coupling"
_RATIO = f"{{}}, by that of {_REFERENCE}".format
_COSTS = (_TRAINING, _DIAGNOSIS, _ACTOR, _CRITIC)
_FIGURES = {
    _TRAINING: ".4f",
    _RATIO(_TRAINING): ".2f",
    _DIAGNOSIS: ".3f",
    _RATIO(_DIAGNOSIS): ".2f",
    _ACTOR: ",.0f",
    _CRITIC: ",.0f",
    _CONFLICT: ".3f",
    _COSINE: "+.3f",
    _COUPLING: ".3f",
    "reward": ".3f",
}
_BY = ("agents", "method")


def _sweep(seeds: int, sizes: Sequence[int], **settings: object) -> dict[str, Any]:
    return {
        "settings": {"env": "specialisation", "diagnostics": "full", **settings},
        "grid": {
            "agents": list(sizes),
            # before the method, so that what is compared is trained at about the same time
            "seed": list(range(seeds)),
            "method": list(METHODS),
        },
    }


def seconds(run: Run) -> tuple[float, float]:
    """Time an update takes, and what a diagnosis adds to it.

    Args:
        run: A run with diagnostics.

    Returns:
        Medians: of the updates without a diagnosis, and of those with one, less the former. What
        is measured more seldom (coupling, transference and the like) is not counted.
    """
    found = run.quantity("seconds")
    updates = found["update"].to_numpy()
    diagnosed = np.isin(updates, run.quantity("residual")["update"].to_numpy())
    effects = np.isin(updates, run.quantity("snd")["update"].to_numpy())
    plain, more = (_median(found.to_numpy()[of]) for of in (~diagnosed, diagnosed & ~effects))
    return plain, more - plain


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if values.size else float("nan")


def coupling(run: Run) -> float:
    """Mean normalised trace of the actors' K_ik over pairs of agents, as recorded.

    Args:
        run: A run with full diagnostics.

    Returns:
        The mean over pairs and updates.
    """
    found = run.quantity("coupling", where={"network": "actor", "layer": "all"}).to_numpy()
    i, k = np.triu_indices(found.shape[-1], 1)
    return float(found[:, i, k].mean())


def _row(run: Run) -> dict[str, Any]:
    training, diagnosis = seconds(run)
    return {
        "agents": int(run.info["agents"]),
        "method": run.method,
        "seed": int(run.info["seed"]),
        _TRAINING: training,
        _DIAGNOSIS: diagnosis,
        _ACTOR: trained_parameters(run),
        _CRITIC: trained_parameters(run, "critic"),
        _CONFLICT: over_training(run, "conflict_rate", "psi"),
        _COSINE: over_training(run, "mean_cosine", "psi"),
        _COUPLING: coupling(run),
        "reward": over_last_tenth(run, "reward_per_step"),
    }


def with_ratios(found: pd.DataFrame) -> pd.DataFrame:
    """Divide times by the reference's of the same seed and number of agents.

    Args:
        found: One row for each run.

    Returns:
        The same with a column for each ratio; NaN where there is no such run.
    """
    pair = ["agents", "seed"]
    times = [_TRAINING, _DIAGNOSIS]
    reference = found.loc[found["method"] == _REFERENCE].set_index(pair)[times]
    own = pd.MultiIndex.from_frame(found[pair])
    ratios = {
        _RATIO(time): found[time].to_numpy() / reference[time].reindex(own).to_numpy()
        for time in times
    }
    return found.assign(**ratios)


def slopes(found: pd.DataFrame, figure: str, *, of_logarithm: bool) -> dict[str, list[float]]:
    """Fit how a number grows with the agents, for each method and seed.

    Args:
        found: One row for each run.
        figure: The number's column.
        of_logarithm: Whether to fit its logarithm to that of the number of agents, so that the
            slope is an exponent, or the number itself to the binary one, so that the slope is what
            twice as many agents add.

    Returns:
        Least squares slopes by method, one for each seed that has the number at every size.
    """
    sizes = found["agents"].nunique()
    fitted: dict[str, list[float]] = {str(method): [] for method in found["method"].unique()}
    for (method, _), runs in found.groupby(["method", "seed"], sort=False):
        height = runs[figure].to_numpy(dtype=float)
        with np.errstate(divide="ignore", invalid="ignore"):
            height = np.log2(height) if of_logarithm else height
        if len(runs) == sizes > 1 and np.isfinite(height).all():
            fitted[str(method)].append(float(np.polyfit(np.log2(runs["agents"]), height, 1)[0]))
    return fitted


def read(runs: Sequence[Run]) -> Findings:
    """Read the study's runs.

    Args:
        runs: Those that are done.

    Returns:
        Cost, conflict and coupling of every method at every number of agents, and exponents.
    """
    found = with_ratios(pd.DataFrame([_row(run) for run in runs]))
    table = estimates(found, _BY, _FIGURES)
    exponents = pd.DataFrame([
        {"method": method, "figure": f"exponent of {cost}", "seeds": len(values)}
        | (number := estimate(values)).numbers()
        | {"text": number.text(".2f")}
        for cost in _COSTS
        for method, values in slopes(found, cost, of_logarithm=True).items()
    ])
    shown = pd.concat([table, exponents.assign(agents="growth")])
    return Findings(
        shown=side_by_side(shown, _BY[:1], "method"),
        verdicts=_verdicts(found),
        tables={
            "scaling": table.drop(columns="text"),
            "scaling-exponents": exponents.drop(columns="text"),
            "scaling-runs": found,
        },
        figures={
            "scaling-cost": _figure(
                table, (_RATIO(_TRAINING), _RATIO(_DIAGNOSIS), _ACTOR, _CRITIC), logarithm=True
            ),
            "scaling-gradients": _figure(table, (_CONFLICT, _COSINE, _COUPLING), logarithm=False),
        },
    )


def _figure(table: pd.DataFrame, figures: Sequence[str], *, logarithm: bool) -> str:
    sizes = sorted(set(table["agents"]))
    panels = []
    for figure in figures:
        lines, drawn = [], []
        for method in dict.fromkeys(table["method"]):
            where = (table["method"] == method) & (table["figure"] == figure)
            rows = table[where].set_index("agents").reindex(sizes)
            heights = rows[["value", "low", "high"]].to_numpy()
            with np.errstate(divide="ignore", invalid="ignore"):
                heights = np.log10(heights) if logarithm else heights
            numbers = [Estimate(*row) for row in heights]
            drawn += numbers
            lines.append(Line.of(str(method), numbers))
        title = f"log10 of {figure}" if logarithm else figure
        panels.append(Panel(title=title, lines=lines, ticks=ticks_for(drawn)))
    return chart(panels, [str(size) for size in sizes], "agents")


def _verdicts(found: pd.DataFrame) -> list[Verdict]:
    sizes = sorted(set(found["agents"]))

    def at_every_size(figure: str, method: str, other: str | None = None) -> dict[str, Estimate]:
        numbers = {}
        for size in sizes:
            own, others = (
                select(found, figure, agents=size, method=m) if m else [] for m in (method, other)
            )
            numbers[f"{size} agents"] = difference(own, others) if other else estimate(own)
        return numbers

    def growth(figure: str, *methods: str, of_logarithm: bool = True) -> dict[str, Estimate]:
        fitted = slopes(found, figure, of_logarithm=of_logarithm)
        return {method: estimate(fitted.get(method, [])) for method in methods}

    ratio = _RATIO(_TRAINING)
    return [
        judge(
            "trained parameters grow nearly linearly with the agents in nops, hypermarl-linear and "
            f"fups-id (exponent above {LINEAR}; of the critics)",
            growth(_CRITIC, "nops", "hypermarl-linear", "fups-id"),
            above=LINEAR,
            form=".2f",
        ),
        judge(
            f"in hypermarl they hardly grow (exponent below {FLAT})",
            growth(_CRITIC, "hypermarl"),
            below=FLAT,
            form=".2f",
        ),
        judge(
            "with few agents hypermarl trains more parameters than nops (2 agents; actors)",
            {
                "2 agents": difference(
                    *(select(found, _ACTOR, agents=2, method=m) for m in ("hypermarl", "nops"))
                )
            },
            above=0,
            form=",.0f",
        ),
        judge(
            f"an update of hypermarl takes longer than one of {_REFERENCE} (ratio)",
            at_every_size(ratio, "hypermarl"),
            above=1,
            form=".2f",
        ),
        judge(
            "an update of hypermarl takes less time than one of nops (difference of the ratios)",
            at_every_size(ratio, "hypermarl", "nops"),
            below=0,
            form="+.2f",
        ),
        judge(
            "a diagnosis takes time that grows less than with the square of the agents (exponent)",
            growth(_DIAGNOSIS, *METHODS),
            below=2,
            form=".2f",
        ),
        judge(
            f"the more agents, the more pairs of {_REFERENCE} conflict (change of the share with "
            "twice as many)",
            growth(_CONFLICT, _REFERENCE, of_logarithm=False),
            above=0,
            form="+.3f",
        ),
        *(
            judge(
                f"there is more conflict in the trained parameters of {_REFERENCE} than of "
                f"{method}",
                at_every_size(_CONFLICT, _REFERENCE, method),
                above=0,
                form="+.3f",
            )
            for method in ("hypermarl-linear", "hypermarl")
        ),
        judge(
            "hypermarl's agents are the more coupled the more there are (change of the coupling "
            "with twice as many)",
            growth(_COUPLING, "hypermarl", of_logarithm=False),
            above=0,
            form="+.3f",
        ),
    ]


_SETTINGS = {"copies": 32, "steps": 8}

SCALING = Study(
    name="scaling",
    question="What do more agents cost, and do they conflict more?",
    budgets={
        "quick": _sweep(5, (2, 8, 32), frames=3_072, every=3, effects_every=6, **_SETTINGS),
        "standard": _sweep(5, SIZES, frames=6_144, every=4, effects_every=12, **_SETTINGS),
        "full": _sweep(10, SIZES, frames=200_000, every=10, copies=64, steps=32),
    },
    about="Interquartile means over seeds with 95 % percentile bootstrap intervals (none for "
    "fewer than 5 seeds). The stateless Specialisation Game: what agents see is the same constant "
    "at every number of agents, stepping it costs next to nothing, and as there are as many "
    "actions as agents, a chosen action is as crowded with many agents as with few; so what "
    "changes is the number of agents, the ID's columns and, of the policies alone, the outputs, "
    "one for each action. The critics' networks are of one size throughout: exponents of the "
    "number of trained parameters are judged by theirs.\n\nSeconds per update: median over the "
    "updates without a diagnosis, collecting and training together. Seconds per diagnosis (of "
    "actors and critics, by the same samples of each agent at every number of agents): what the "
    "median with one is more; coupling and what is recorded with it, mostly dearer, is not in it. "
    "A run has one thread; as many ran at once as the machine has cores, which disturbs times, so "
    "that methods are compared by the ratio to the run of fups-id of the same agents and seed, "
    "which was trained at about the same time. Growth: least squares slope of the logarithm "
    "against that of the number of agents, seed by seed. Conflict: share of agent pairs told to "
    "be in conflict at a false discovery rate of 5 %, of g_i in psi-space; the more pairs, the "
    "more evidence each of them takes. Mean cosine: plug-in, over pairs, as the paper reports it. "
    "Both are means over the diagnosed updates. Coupling: normalised trace of K_ik in closed form "
    "(docs/coupling.md), mean over pairs and the updates at which it was recorded. Reward: per "
    "step and agent.\n\nNot as in the paper: it counts parameters of 4 to 1024 agents, and times "
    "forward passes of a recurrent policy of 4 to 512 on a GPU; here whole updates are timed, on "
    "a CPU, all agents' networks at once in every method. All runs have the same number of frames, "
    "in which few agents may learn the game and many not, nor all methods alike: where the reward "
    "at the end is near 1 it was learned, and where it is near chance it was not. So sizes and "
    "methods are compared at different stages of learning: conflict and mean cosine, means over "
    "the updates, are of all of it where the game was learned, the time after that included, and "
    "of its beginning alone where it was not.",
    read=read,
)

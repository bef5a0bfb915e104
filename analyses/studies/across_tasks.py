"""The part of a report that is about all of a study's tasks together, method by method."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from analyses import performance
from analyses.curves import series
from analyses.studies.chart import Line, Numbers, Panel, chart, ticks_for
from analyses.studies.seeds import FEWEST, over_last_tenth
from analyses.studies.study import Section
from analyses.studies.verdict import Estimate
from gradlab.run import Run

Bounds = Mapping[str, tuple[float, float]]

_THRESHOLDS = 51  # points of a performance profile
_IQM, _MEDIAN, _GAP, _IMPROVEMENT = "IQM", "median", "optimality gap", "improvement"
_POOLED = (
    "0 and 1 are the lowest and highest score of all runs on a task, so that the scale depends on "
    "which methods are compared"
)


def across_tasks(
    name: str,
    runs: Sequence[Run],
    *,
    task: Callable[[Run], str] = performance.task_of,
    quantity: str = "reward_per_step",
    bounds: Bounds | None = None,
    scale: str = _POOLED,
    over: str = "fups-id",
) -> Section:
    """Compare methods over all tasks of a study.

    Args:
        name: The study's, which its files' names begin with.
        runs: Those that are done.
        task: Names the task of a run, the same for all methods and seeds.
        quantity: What is compared, more being better: a recorded scalar, mean over the last tenth
            of the updates.
        bounds: For each task the scores that become 0 and 1; by default the lowest and highest.
        scale: What these bounds are.
        over: The method that others may improve on.

    Returns:
        Aggregates of the normalised scores with intervals, performance profiles and
        sample-efficiency curves; without them if nothing is left to compare. Said is what is left
        out, and whether seeds are unequal.
    """
    scores, said = _scores(runs, task, quantity)
    if bounds is None:
        bounds = performance.pooled_bounds(scores) if len(scores) else {}
        alike = sorted(set(scores["task"]) - set(bounds))
        said += [f"Left out is {of}, where all runs score the same." for of in alike]
        scores = scores[~scores["task"].isin(alike)]
    title = "Over all tasks"
    if not len(scores):
        return Section(title=title, about=" ".join([*said, "Nothing is left to compare."]))
    known = performance.normalise(scores, bounds)
    aggregates = _aggregates(known, over)
    lowest, highest = min(0.0, known["score"].min()), max(1.0, known["score"].max())
    thresholds = np.linspace(lowest, highest, _THRESHOLDS).tolist()
    profiles = _enough(performance.performance_profile(known, thresholds))
    curves = _curves(runs, task, quantity, known)
    learning = _enough(performance.sample_efficiency(performance.normalise(curves, bounds)))
    return Section(
        title=title,
        about=" ".join([*said, *_unequal(aggregates), _about(known, scale, over)]),
        shown=_side_by_side(aggregates),
        tables={
            f"{name}-aggregates": aggregates,
            f"{name}-profiles": profiles,
            f"{name}-curves": learning,
        },
        figures={f"{name}-tasks": _figure(profiles, learning)},
    )


def _scores(
    runs: Sequence[Run], task: Callable[[Run], str], quantity: str
) -> tuple[pd.DataFrame, list[str]]:
    """One score of each run, but what can't be compared, and sentences on that."""
    rows = [
        (run.method, task(run), int(run.info["seed"]), over_last_tenth(run, quantity))
        for run in runs
    ]
    scores = pd.DataFrame(rows, columns=["method", "task", "seed", "score"])
    lost = scores["score"].isna()
    said = [
        f"Left out is a run of {row.method} on {row.task} (seed {row.seed}) without any finite "
        f"{quantity}."
        for row in scores[lost].itertuples()
    ]
    scores = scores[~lost]
    if not len(scores):
        return scores, said
    kept = performance.in_all_methods(scores)
    dropped = [str(name) for name in scores["task"].unique() if name not in set(kept["task"])]
    said += [f"Left out is {name}, which not all methods have runs of." for name in dropped]
    return kept, said


def _curves(
    runs: Sequence[Run], task: Callable[[Run], str], quantity: str, scores: pd.DataFrame
) -> pd.DataFrame:
    """The quantity over training, of the runs that have scores."""
    wanted = set(scores[["method", "task", "seed"]].itertuples(index=False, name=None))
    curves = []
    for run in runs:
        of, seed = task(run), int(run.info["seed"])
        if (run.method, of, seed) in wanted:
            found = series(run, quantity)
            places = found[["frames"]].assign(method=run.method, task=of, seed=seed)
            curves.append(places.assign(score=found["value"]))
    return pd.concat(curves, ignore_index=True)


def _enough(table: pd.DataFrame) -> pd.DataFrame:
    """Leave out intervals of too few seeds, as of all numbers in a report."""
    few = table["fewest_seeds"] < FEWEST
    return table.assign(low=table["low"].mask(few), high=table["high"].mask(few))


def _aggregates(scores: pd.DataFrame, over: str) -> pd.DataFrame:
    measures = {
        _IQM: performance.iqm(scores),
        _MEDIAN: performance.median(scores),
        _GAP: performance.optimality_gap(scores),
    }
    methods = set(scores["method"])
    if over in methods and len(methods) > 1:
        improvement = performance.probability_of_improvement(scores, over)
        measures[f"{_IMPROVEMENT} over {over}"] = improvement.drop(columns="over")
    tables = [_enough(table).assign(measure=name) for name, table in measures.items()]
    columns = ["measure", *tables[0].columns.drop("measure")]
    return pd.concat(tables, ignore_index=True)[columns]


def _side_by_side(aggregates: pd.DataFrame) -> pd.DataFrame:
    texts = aggregates.assign(
        text=[Estimate(*row).text() for row in aggregates[["value", "low", "high"]].to_numpy()]
    )
    shown = texts.pivot_table(
        index="measure", columns="method", values="text", aggfunc="first", sort=False
    )
    return shown.fillna("").reset_index()


def _unequal(aggregates: pd.DataFrame) -> list[str]:
    of = aggregates[aggregates["measure"] == _IQM]
    if of["fewest_seeds"].min() == of["most_seeds"].max():
        return []
    seeds = ", ".join(
        f"{row.fewest_seeds} to {row.most_seeds} of {row.method}" for row in of.itertuples()
    )
    return [f"**Seeds are not equal**: on a task there are {seeds}; tasks weigh the same."]


def _about(scores: pd.DataFrame, scale: str, over: str) -> str:
    tasks = sorted(scores["task"].unique())
    return (
        f"Scores of {len(tasks)} {'task' if len(tasks) == 1 else 'tasks'} ({'; '.join(tasks)}), "
        f"mean over the last tenth of the updates, normalised: {scale}. "
        f"{_IQM}: mean of the middle half of the runs of all tasks; {_MEDIAN}: over tasks, of the "
        f"mean over seeds; {_GAP}: by how much runs fall short of 1, on average; {_IMPROVEMENT}: "
        f"probability that a run scores more than one of {over}, a tie counting half, mean over "
        "tasks. In the figure the share of runs that score more than a threshold, mean over "
        "tasks, and the IQM over tasks and seeds at equal frames. Intervals: 95 % percentile "
        "bootstrap, seeds drawn anew within each task; bands are of each point by itself; none "
        f"for fewer than {FEWEST} seeds (docs/across-seeds.md)."
    )


def _figure(profiles: pd.DataFrame, curves: pd.DataFrame) -> str:
    share = (0.0, 0.25, 0.5, 0.75, 1.0)
    heights = [Estimate(*row) for row in curves[["value", "low", "high"]].to_numpy()]
    # in thousands, whose labels have room
    frames = curves["frames"] / 1000
    return chart([
        _panel("share of runs above", profiles, "threshold", "normalised score", share),
        _panel(
            "IQM of normalised scores",
            curves.assign(frames=frames),
            "frames",
            "thousand frames",
            ticks_for(heights),
        ),
    ])


def _panel(title: str, table: pd.DataFrame, axis: str, named: str, ticks: Sequence[float]) -> Panel:
    at = table[axis].unique().tolist()
    lines = [
        Line.of(str(method), [Estimate(*row) for row in of[["value", "low", "high"]].to_numpy()])
        for method, of in table.groupby("method", sort=False)
    ]
    ends = ticks_for([Estimate(at[0], at[0], at[-1])])
    return Panel(title=title, lines=lines, ticks=ticks, across=Numbers(named, at, ends))

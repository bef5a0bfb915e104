"""Performance over several tasks and seeds: aggregates, profiles and curves with intervals.

All take and return tables in long form, in which every number says of which method, task and seed
it is: an array whose axes are swapped resamples tasks in place of seeds, and nothing in it shows.
Measures and the stratified bootstrap are those of Agarwal et al., "Deep RL at the edge of the
statistical precipice" (2021); the resampling is SciPy's.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.aggregate import RESAMPLES, at_equal_frames, bootstrap, interquartile_mean_of
from gradlab.checks import UsageError, check, unknown_name
from gradlab.run import Run

_OF = ["method", "task", "seed"]
_Strata = dict[str, dict[str, NDArray[np.float64]]]
"""Draws [seed, point] of each task of each method."""


def task_of(run: Run) -> str:
    """Name what a run was trained on.

    Args:
        run: A run.

    Returns:
        Its environment, number of agents, and settings of the environment.
    """
    given = run.config.get("env_args", {})
    settings = given if isinstance(given, dict) else {}
    named = [f"{name}={settings[name]}" for name in sorted(settings, key=str)]
    return ", ".join([run.environment, f"{run.info.get('agents', 'unknown')} agents", *named])


def pooled_bounds(scores: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Find each task's lowest and highest score, of all methods and seeds.

    Args:
        scores: Columns method, task, seed, score, and maybe frames.

    Returns:
        Bounds by task, for `normalise`; none of a task on which all runs score the same, which
        tells no methods apart. They depend on which methods are compared; and as they are drawn
        with the scores, while intervals take them as given, those are somewhat too narrow.

    Raises:
        UsageError: If scores lack a column, or are not one for each method, task and seed.
    """
    _check(scores, maybe_curves=True)
    ends = scores.groupby("task", sort=False)["score"].agg(["min", "max"])
    return {
        str(task): (float(low), float(high))
        for task, low, high in zip(ends.index, ends["min"], ends["max"], strict=True)
        if low < high
    }


def normalise(scores: pd.DataFrame, bounds: Mapping[str, tuple[float, float]]) -> pd.DataFrame:
    """Put the scores of all tasks on one scale.

    Args:
        scores: Columns method, task, seed, score, and maybe frames.
        bounds: For each task the score that becomes 0, and the higher one that becomes 1, such as
            those of random play and of the optimum, or `pooled_bounds`.

    Returns:
        The same table with normalised scores, which may lie beyond 0 and 1.

    Raises:
        UsageError: If a task has no bounds, or they are not finite and in ascending order.
    """
    _check(scores, maybe_curves=True)
    for task in scores["task"].unique():
        if task not in bounds:
            raise unknown_name("task", task, bounds)
        low, high = bounds[task]
        rule = "be two finite numbers, the lower one first"
        holds = bool(np.isfinite([low, high]).all() and low < high)
        check(holds, f"bounds[{task!r}]", rule, (low, high))
    zero, one = (scores["task"].map({t: x[end] for t, x in bounds.items()}) for end in (0, 1))
    return scores.assign(score=(scores["score"] - zero) / (one - zero))


def in_all_methods(scores: pd.DataFrame) -> pd.DataFrame:
    """Keep the tasks that all methods have scores of, as only these compare methods.

    Args:
        scores: Columns method, task, seed, score, and maybe frames.

    Returns:
        Those rows.

    Raises:
        UsageError: If scores lack a column, or are not one for each method, task and seed.
    """
    _check(scores, maybe_curves=True)
    methods = scores.groupby("task")["method"].nunique()
    return scores[scores["task"].isin(methods.index[methods == scores["method"].nunique()])]


def iqm(scores: pd.DataFrame, *, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """Interquartile mean of each method: of the middle half of its runs of all tasks together.

    Args:
        scores: Columns method, task, seed, score. Tasks weigh the same, whatever their seeds.
        resamples: How often each task's seeds are drawn anew, within that task.
        seed: Seed of these draws.

    Returns:
        Columns method, value, low, high (the 95 % interval, NaN if a task has a single seed),
        tasks, fewest_seeds and most_seeds (of a task); one row for each method.

    Raises:
        UsageError: If scores lack a column, are not one finite number for each method, task and
            seed, or not of the same tasks for all methods.
    """
    return _of_methods(_strata(scores), interquartile_mean_of, resamples, seed)


def mean(scores: pd.DataFrame, *, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """Mean over tasks of the mean over seeds, which a single task can pull anywhere.

    Args:
        scores: As of `iqm`.
        resamples: As of `iqm`.
        seed: As of `iqm`.

    Returns:
        As `iqm`.

    Raises:
        UsageError: As `iqm`.
    """
    return _of_methods(_strata(scores), _mean, resamples, seed)


def median(scores: pd.DataFrame, *, resamples: int = RESAMPLES, seed: int = 0) -> pd.DataFrame:
    """Median over tasks of the mean over seeds, which knows nothing of half of the tasks.

    Args:
        scores: As of `iqm`.
        resamples: As of `iqm`.
        seed: As of `iqm`.

    Returns:
        As `iqm`.

    Raises:
        UsageError: As `iqm`.
    """
    return _of_methods(_strata(scores), _median, resamples, seed)


def optimality_gap(
    scores: pd.DataFrame, target: float = 1.0, *, resamples: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """By how much runs fall short of a target, mean over tasks of the mean over seeds.

    Args:
        scores: As of `iqm`.
        target: The score beyond which more counts for nothing.
        resamples: As of `iqm`.
        seed: As of `iqm`.

    Returns:
        As `iqm`; less is better, and 0 is best.

    Raises:
        UsageError: As `iqm`.
    """
    strata = _each(_strata(scores), lambda draws: np.maximum(target - draws, 0.0))
    return _of_methods(strata, _mean, resamples, seed)


def probability_of_improvement(
    scores: pd.DataFrame, over: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """How likely a run of a method scores more than one of another, mean over tasks.

    Of each task it is the Mann-Whitney statistic, the share of pairs of runs in which the method's
    run scores more, a tie counting half. Seeds are not paired. Scores need not be normalised.

    Args:
        scores: As of `iqm`.
        over: The other method.
        resamples: As of `iqm`; both methods' seeds are drawn anew, independently.
        seed: As of `iqm`.

    Returns:
        Columns method, over, and those of `iqm` (seeds are of both methods); one row for each
        other method.

    Raises:
        UsageError: As `iqm`; or if there is no such method.
    """
    strata = _strata(scores)
    if over not in strata:
        raise unknown_name("method", over, strata)
    theirs = {f"over {task}": draws for task, draws in strata.pop(over).items()}
    table = _of_methods(
        {method: tasks | theirs for method, tasks in strata.items()}, _improvement, resamples, seed
    )
    table.insert(1, "over", over)
    return table.assign(tasks=len(theirs))


def performance_profile(
    scores: pd.DataFrame,
    thresholds: Sequence[float],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Share of runs that score more than each threshold, mean over tasks of the share of seeds.

    Args:
        scores: As of `iqm`.
        thresholds: Scores.
        resamples: As of `iqm`; a draw counts at all thresholds.
        seed: As of `iqm`.

    Returns:
        Columns method, threshold, and those of `iqm`; one row for each method and threshold. The
        intervals are of each threshold by itself; a whole curve leaves them more often.

    Raises:
        UsageError: As `iqm`.
    """
    at = np.asarray(thresholds, dtype=float)
    strata = _each(_strata(scores), lambda draws: (draws > at).astype(float))
    return _of_methods(strata, _mean, resamples, seed, threshold=at)


def sample_efficiency(
    curves: pd.DataFrame, points: int = 60, *, resamples: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Interquartile mean over tasks and seeds at equal numbers of environment frames.

    Args:
        curves: Columns method, task, seed, frames, score; points whose score is not finite are left
            out.
        points: How many numbers of frames, evenly spaced over those that all curves have; between
            its points a curve is a straight line.
        resamples: As of `iqm`; a draw counts at all numbers of frames.
        seed: As of `iqm`.

    Returns:
        Columns method, frames, and those of `iqm`; one row for each method and number of frames.
        The intervals are of each number of frames by itself.

    Raises:
        UsageError: If curves lack a column, have two scores of a method, task and seed at the same
            frames, are not of the same tasks for all methods, or one has no finite score.
    """
    _check(curves, ["frames"])
    known = curves[np.isfinite(curves["score"].to_numpy(dtype=float))]
    runs = {
        key: (run["frames"].to_numpy(dtype=float), run["score"].to_numpy(dtype=float))
        for key, unsorted in known.groupby(_OF, sort=False)
        for run in [unsorted.sort_values("frames")]
    }
    lacking = curves[~curves.set_index(_OF).index.isin(list(runs))]
    if len(lacking):
        raise UsageError(f"`score` must be finite somewhere. Got none of {_row(lacking)}.")
    first = max(frames[0] for frames, _ in runs.values())
    last = min(frames[-1] for frames, _ in runs.values())
    check(bool(first <= last), "frames", "overlap between all curves", f"{first:g} to {last:g}")
    grid, values = at_equal_frames(list(runs.values()), points)
    found = pd.DataFrame(list(runs), columns=_OF).assign(row=range(len(runs)))
    strata = _each(_strata(found, "row"), lambda rows: values[rows[:, 0].astype(int)])
    return _of_methods(strata, interquartile_mean_of, resamples, seed, frames=grid)


def _check(
    table: pd.DataFrame, at: Sequence[str] = (), score: str = "score", *, maybe_curves: bool = False
) -> None:
    """Refuse what is not one number for each method, task and seed, at each of `at` if given."""
    is_table = isinstance(table, pd.DataFrame)
    if maybe_curves and is_table and "frames" in table.columns:
        at = ["frames"]
    wanted = [*_OF, *at, score]
    check(
        is_table and set(wanted) <= set(table.columns),
        "scores",
        f"be a table with the columns {', '.join(wanted)}, and a row for each score",
        list(table.columns) if is_table else type(table).__name__,
    )
    check(len(table) > 0, "scores", "have at least one row", 0)
    for name, rule, is_so in (
        ("method", "be text", pd.api.types.is_string_dtype),
        ("task", "be text (are tasks and seeds swapped?)", pd.api.types.is_string_dtype),
        ("seed", "be whole numbers (are tasks and seeds swapped?)", pd.api.types.is_integer_dtype),
    ):
        check(is_so(table[name]), name, rule, table[name].tolist()[0])
    twice = table.duplicated([*_OF, *at])
    if twice.any():
        raise UsageError(
            f"`scores` must have one row for each {', '.join([*_OF, *at])}: a run's episodes and "
            f"agents make one number first, as seeds are drawn anew. Got two of "
            f"{_row(table[twice])}."
        )


def _strata(scores: pd.DataFrame, score: str = "score") -> _Strata:
    """Sort scores into strata; the order of the rows makes no difference but to that of methods."""
    _check(scores, score=score)
    bad = ~np.isfinite(scores[score].to_numpy(dtype=float))
    if bad.any():
        raise UsageError(
            "`score` must be finite: a run without one can be left out, but says something of its "
            f"method. Got {scores[score][bad].iloc[0]} of {_row(scores[bad])}."
        )
    tasks = sorted(scores["task"].unique(), key=str)
    strata: _Strata = {}
    for method, of in scores.sort_values("seed").groupby("method", sort=False):
        groups = dict(list(of.groupby("task")[score]))
        for task in tasks:
            if task not in groups:
                raise UsageError(
                    f"`scores` must be of the same tasks for all methods. Got none of method="
                    f"{method!r} on task={task!r}; `in_all_methods` leaves such tasks out."
                )
        strata[str(method)] = {
            str(task): groups[task].to_numpy(dtype=float)[:, None] for task in tasks
        }
    # by first appearance in the caller's table, which sorting by seed may have changed
    return {str(method): strata[str(method)] for method in scores["method"].unique()}


def _row(table: pd.DataFrame) -> str:
    return ", ".join(f"{name}={table[name].iloc[0]}" for name in _OF)


def _each(strata: _Strata, change: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> _Strata:
    return {
        method: {task: change(draws) for task, draws in tasks.items()}
        for method, tasks in strata.items()
    }


def _of_methods(
    strata: _Strata,
    statistic: Callable[..., Any],
    resamples: int,
    seed: int,
    **points: NDArray[np.float64],
) -> pd.DataFrame:
    """Estimate a statistic of each method at each point, named by the axis of points if any."""
    tables = []
    for method, tasks in strata.items():
        value, low, high = bootstrap(list(tasks.values()), statistic, resamples, seed)
        seeds = [len(draws) for draws in tasks.values()]
        tables.append(
            pd.DataFrame({
                "method": method,
                **points,
                "value": value,
                "low": low,
                "high": high,
                "tasks": len(tasks),
                "fewest_seeds": min(seeds),
                "most_seeds": max(seeds),
            })
        )
    return pd.concat(tables, ignore_index=True)


def _over_tasks(
    reduce: Callable[..., Any], *strata: NDArray[np.float64], axis: int
) -> NDArray[np.float64]:
    return np.asarray(reduce([np.mean(draws, axis=axis) for draws in strata], axis=0))


_mean = partial(_over_tasks, np.mean)
_median = partial(_over_tasks, np.median)


def _improvement(*strata: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Mann-Whitney statistic of the first half of the strata over the second, mean over tasks."""
    moved = [np.moveaxis(draws, axis, -1) for draws in strata]
    half = len(moved) // 2
    shares = [
        0.5 + 0.5 * np.sign(ours[..., :, None] - theirs[..., None, :]).mean((-2, -1))
        for ours, theirs in zip(moved[:half], moved[half:], strict=True)
    ]
    return np.asarray(np.mean(shares, axis=0))

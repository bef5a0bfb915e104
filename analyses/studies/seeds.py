"""From runs to one row of numbers each, and from rows to estimates across seeds."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from analyses.aggregate import Resampled, difference_of, interquartile_mean_of, resample
from analyses.studies.verdict import Estimate
from gradlab.run import Run

FEWEST = 5
"""Seeds that an interval takes at least: of fewer, resampling them says too little."""

_WHOLE_ACTOR = {"network": "actor", "layer": "all"}


def over_last_tenth(run: Run, quantity: str, **where: object) -> float:
    """Mean of a recorded number over the last tenth of a training's updates.

    Args:
        run: A finished run.
        quantity: Its name.
        **where: A label on each of its axes, if it has some.

    Returns:
        The mean over the updates that have it, NaN if none does.
    """
    values = run.quantity(quantity, where=where).to_numpy()
    return _mean(values[-max(1, len(values) // 10) :])


def last(run: Run, quantity: str, **where: object) -> float:
    """Look up the last record of a number, e.g. of the evaluation after a training's last update.

    Args:
        run: A finished run.
        quantity: Its name.
        **where: A label on each of its axes, if it has some.

    Returns:
        The number.
    """
    return float(run.quantity(quantity, where=where)[-1])


def over_training(run: Run, quantity: str, space: str | None = None) -> float:
    """Mean of a diagnosed quantity of the whole actor over all diagnosed updates, and agents.

    Args:
        run: A run with diagnostics.
        quantity: Its name.
        space: "psi" or "theta", of a quantity that has both.

    Returns:
        The mean of what is known, NaN if nothing is.
    """
    return _mean(_of_actor(run, quantity, space).to_numpy())


def _of_actor(run: Run, quantity: str, space: str | None) -> xr.DataArray:
    found = run.quantity(quantity)
    where = {**_WHOLE_ACTOR, "space": space}
    return found.sel({axis: where[axis] for axis in where if axis in found.dims})


def over_pairs(run: Run, quantity: str, *, own: bool = False, space: str | None = None) -> float:
    """Mean of what is recorded of the whole actor's pairs of agents, over the updates that have it.

    Args:
        run: A run with diagnostics.
        quantity: Its name.
        own: Take each agent with itself, not with the others.
        space: "psi" or "theta", of a quantity that has both.

    Returns:
        The mean of what is known, NaN if nothing is.
    """
    pairs = _of_actor(run, quantity, space).transpose(..., "agent", "agent_other").to_numpy()
    return _mean(pairs[..., np.eye(pairs.shape[-1], dtype=bool) == own])


def signal_to_noise(run: Run, space: str) -> float:
    """Squared length of the actor's true mean gradients over the variance of the measured ones.

    The inverse of the normalised variance, as a ratio of means over updates and agents: of all
    estimates, known or not, so that updates whose gradient is lost in noise count as they should.

    Args:
        run: A run with full diagnostics.
        space: "psi", of g_i, or "theta", of Z_i.

    Returns:
        The ratio; below 0 where noise alone makes the estimate of the squared length so.
    """
    signal = over_training(run, "squared_norm_debiased", space)
    return signal / over_training(run, "variance_mean", space)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def estimate(values: Sequence[float]) -> Estimate:
    """Interquartile mean over seeds and its 95 % bootstrap interval.

    Args:
        values: One number for each seed.

    Returns:
        The estimate, without an interval for fewer than `FEWEST` seeds.
    """
    if not len(values):
        return Estimate.unknown()
    found = resample([_column(values)], interquartile_mean_of)
    return _as_estimate(found, len(values))


def difference(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """Difference of two groups' interquartile means and its 95 % bootstrap interval.

    Args:
        values: One number for each seed of one group.
        others: One number for each seed of the other.

    Returns:
        First less second, without an interval if a group has fewer than `FEWEST` seeds.
    """
    if not len(values) or not len(others):
        return Estimate.unknown()
    found = resample([_column(values), _column(others)], difference_of)
    return _as_estimate(found, min(len(values), len(others)))


def _column(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, dtype=float)[:, None]


def _as_estimate(found: Resampled, seeds: int) -> Estimate:
    value, low, high = (float(array[0]) for array in found.interval)
    if seeds < FEWEST:
        return Estimate(value, float("nan"), float("nan"))
    return Estimate(value, low, high, found.drawn[0])


def select(found: pd.DataFrame, figure: str, **where: object) -> list[float]:
    """Look up a number of some runs, those where it is known.

    Args:
        found: One row for each run.
        figure: The number's column.
        **where: Values of other columns.

    Returns:
        One number for each run.
    """
    kept = np.logical_and.reduce([found[name] == value for name, value in where.items()])
    return found.loc[kept, figure].dropna().astype(float).tolist()


def estimates(found: pd.DataFrame, by: Sequence[str], figures: Mapping[str, str]) -> pd.DataFrame:
    """Estimate each number in each group of runs.

    Args:
        found: One row for each run.
        by: Columns whose values make a group.
        figures: Formats of the columns with numbers, by name.

    Returns:
        Columns `by`, figure, seeds, value, low, high, text; one row for each group and figure.
    """
    rows = []
    for group, runs in found.groupby(list(by), sort=False):
        labels = dict(zip(by, group if isinstance(group, tuple) else (group,), strict=True))
        for figure, form in figures.items():
            values = runs[figure].dropna().astype(float).tolist()
            number = estimate(values)
            rows.append(
                labels
                | {"figure": figure, "seeds": len(values), **number.numbers()}
                | {"text": number.text(form)}
            )
    return pd.DataFrame(rows)


def side_by_side(table: pd.DataFrame, by: Sequence[str], across: str) -> pd.DataFrame:
    """Lay estimates out for reading: a row for each group and figure, a column for each method.

    Args:
        table: What `estimates` returned.
        by: Columns that make a row, with the figure.
        across: The column whose values become columns.

    Returns:
        Texts.
    """
    rows: dict[tuple[object, ...], dict[str, object]] = {}
    columns = list(dict.fromkeys(table[across]))
    for entry in table.to_dict("records"):
        key = tuple(entry[name] for name in (*by, "figure"))
        row = rows.setdefault(key, dict(zip((*by, "figure"), key, strict=True)))
        row[str(entry[across])] = entry["text"]
    shown = pd.DataFrame(list(rows.values()), columns=[*by, "figure", *map(str, columns)])
    return shown.fillna("")

"""The runs in a folder at a glance."""

from pathlib import Path

import numpy as np
import pandas as pd

from gradlab.checks import UsageError
from gradlab.run import Run, open_run, runs_below

COLUMNS = ("run", "method", "environment", "frames", "last_return", "evaluated", "state")


def list_runs(folder: Path) -> pd.DataFrame:
    """List the runs anywhere below a folder.

    Args:
        folder: Where to look.

    Returns:
        Columns run, method, environment, frames, last_return (of the episodes that ended last in
        the training), evaluated (return of the last evaluation during the training), both NaN
        where there is none, state; one row for each run. What keeps a run from being read stands
        in its state.
    """
    return pd.DataFrame([_row(path) for path in runs_below(folder)], columns=list(COLUMNS))


def last_number(run: Run, quantity: str) -> float:
    """Look up the last number that was recorded of a quantity without axes.

    Args:
        run: A run.
        quantity: The quantity's name.

    Returns:
        The last that is not NaN; NaN if there is none.
    """
    if quantity not in run.quantities or run.axes(quantity):
        return float("nan")
    # The end first: a long training has thousands of records.
    newest = run.newest(quantity)
    for since in () if newest is None else (max(newest - 50, 0), 0):
        values = run.quantity(quantity, since=since).to_numpy()
        known = values[~np.isnan(values)]
        if known.size:
            return float(known[-1])
    return float("nan")


def _row(path: Path) -> tuple[object, ...]:
    try:
        run = open_run(path)
    except UsageError as error:
        return str(path), "-", "-", "-", float("nan"), float("nan"), str(error)
    frames = last_number(run, "frames")
    state = "; ".join([run.state, *run.problems])
    shown = "-" if frames != frames else f"{frames:,.0f}"
    returns = (last_number(run, "episode_return"), last_number(run, "evaluation_return"))
    return str(path), run.method, run.environment, shown, *returns, state

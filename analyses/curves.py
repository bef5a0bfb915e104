"""Recorded quantities as tables over training, ready to be drawn or exported."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from gradlab.run import Run


def learning_curve(run: Run) -> pd.DataFrame:
    """Tabulate the mean return of the episodes that ended in each update.

    Args:
        run: A run.

    Returns:
        Columns update, frames (cumulative environment frames), episode_return; one row for each
        update in which an episode ended. Infinite returns, of a run that diverged, are kept.

    Raises:
        UsageError: If the run has recorded no returns.
    """
    table = series(run, "episode_return").rename(columns={"value": "episode_return"})
    return table.dropna(subset=["episode_return"]).reset_index(drop=True)


def series(run: Run, quantity: str) -> pd.DataFrame:
    """Tabulate one quantity over training in long form.

    Args:
        run: A run.
        quantity: One of `run.quantities`.

    Returns:
        Columns update, frames, the quantity's further axes (e.g. network, space, layer), value;
        one row for each recorded number, NaN included. `frames` is NaN where it was not recorded.

    Raises:
        UsageError: If no such quantity is recorded.
    """
    array = run.quantity(quantity)
    dims = [str(dim) for dim in array.dims[1:]]
    # pandas spells out the product of the axes in C order, the order of the values.
    index = pd.MultiIndex.from_product(
        [array[dim].to_numpy() for dim in array.dims], names=array.dims
    )
    table = index.to_frame(index=False)
    table["value"] = array.to_numpy().ravel().astype(float)
    table["frames"] = table["update"].map(frames_by_update(run)).astype(float)
    return table[["update", "frames", *dims, "value"]]


def frames_by_update(run: Run) -> pd.Series:
    """Look up the cumulative environment frames at the end of each update.

    Args:
        run: A run.

    Returns:
        Frames indexed by update; empty if they were not recorded.
    """
    if "frames" not in run.quantities:
        return pd.Series(dtype=float)
    frames = run.quantity("frames")
    return pd.Series(frames.to_numpy().astype(float), index=frames["update"].to_numpy())


def evenly_spaced(updates: xr.DataArray | Sequence[int], limit: int = 40) -> list[int]:
    """Thin updates for drawing, keeping the first and the last.

    Args:
        updates: Recorded updates in increasing order.
        limit: At most this many are kept; at least 2.

    Returns:
        The kept updates, evenly spaced in the order of recording.

    >>> evenly_spaced(range(0, 100, 10), limit=4)
    [0, 30, 60, 90]
    """
    known = [int(update) for update in np.asarray(updates)]
    if len(known) <= limit:
        return known
    positions = np.linspace(0, len(known) - 1, limit).round().astype(int)
    return [known[position] for position in positions]

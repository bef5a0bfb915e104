"""A recorded quantity that is too large to be held: an array that reads what is looked at."""

import math
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from gradlab.run import Run


def size(run: Run, quantity: str) -> int:
    """Find out how large a quantity is, without reading it.

    Args:
        run: A run.
        quantity: The quantity's name.

    Returns:
        Bytes that all its records together take, at 8 for a number.
    """
    numbers = math.prod(len(labels) for labels in run.axes(quantity).values())
    return len(run.updates(quantity)) * numbers * 8


def on_demand(run: Run, quantity: str) -> xr.DataArray:
    """Read nothing of a quantity but its labels.

    Args:
        run: A run.
        quantity: The quantity's name.

    Returns:
        An array as of `Run.quantity`, whose numbers are read whenever they are asked for, each
        time anew; a record that turns out to be damaged holds NaN, or 0 for whole numbers.
    """
    records = _Records(run, quantity)
    return xr.DataArray(
        xr.Variable(("update", *records.axes), indexing.LazilyIndexedArray(records)),
        coords={"update": records.updates, **records.axes},
        name=quantity,
    )


class _Records(BackendArray):
    def __init__(self, run: Run, quantity: str) -> None:
        self.axes = run.axes(quantity)
        self.updates = run.updates(quantity)
        self.shape = (len(self.updates), *map(len, self.axes.values()))
        self.dtype = run.quantity(quantity, until=-1).dtype
        self._run = run
        self._quantity = quantity

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        part: np.ndarray = indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.BASIC, self._part
        )
        return part

    def _part(self, key: tuple[Any, ...]) -> np.ndarray:
        when, *at = key
        wanted = np.atleast_1d(np.array(self.updates)[when]).tolist()
        where, rest = {}, []
        for (dim, labels), place in zip(self.axes.items(), at, strict=True):
            if isinstance(place, slice):
                rest.append(place)
            else:
                where[dim] = labels[place]
        if not wanted:
            found = self._run.quantity(self._quantity, until=-1, where=where)
        else:
            since, until = min(wanted), max(wanted)
            found = self._run.quantity(self._quantity, since=since, until=until, where=where)
        # Only those that are asked for, in that order, and a row for each that was lost since.
        floating = np.issubdtype(self.dtype, np.floating)
        found = found.reindex(update=wanted, fill_value=np.nan if floating else 0)
        part = found.to_numpy()[(slice(None), *rest)]
        return part if isinstance(when, slice) else part[0]

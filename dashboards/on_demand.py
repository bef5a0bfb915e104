"""A recorded quantity that is too large to be held: an array that reads what is looked at."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from gradlab.run import Run


def on_demand(run: Run, quantity: str, updates: Sequence[int]) -> xr.DataArray:
    """Read nothing of a quantity but its labels.

    Args:
        run: A run.
        quantity: The quantity's name.
        updates: Those at which it is looked at.

    Returns:
        An array as of `Run.quantity`, whose numbers are read whenever they are asked for, each
        time anew; a record that turns out to be damaged holds NaN, or 0 for whole numbers.
    """
    records = _Records(run, quantity, updates)
    return xr.DataArray(
        xr.Variable(("update", *records.axes), indexing.LazilyIndexedArray(records)),
        coords={"update": records.updates, **records.axes},
        name=quantity,
    )


class _Records(BackendArray):
    def __init__(self, run: Run, quantity: str, updates: Sequence[int]) -> None:
        self.axes = run.axes(quantity)
        self.updates = list(updates)
        self.shape = (len(self.updates), *map(len, self.axes.values()))
        self.dtype = run.quantity(quantity, until=-1).dtype
        self._run = run
        self._quantity = quantity

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        part: np.ndarray = indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER_1VECTOR, self._part
        )
        return part

    def _part(self, key: tuple[Any, ...]) -> np.ndarray:
        when, *at = key
        wanted = np.atleast_1d(np.array(self.updates)[when]).tolist()
        where, rest = {}, []
        for (dim, labels), place in zip(self.axes.items(), at, strict=True):
            if isinstance(place, slice | np.ndarray):
                rest.append(place)
            else:
                where[dim] = labels[place]
        ordered = sorted(set(wanted))
        found = self._run.quantity(self._quantity, at=ordered, where=where)
        # Only those that are asked for, in that order, and a row for each that was lost since.
        floating = np.issubdtype(self.dtype, np.floating)
        found = found.reindex(update=wanted, fill_value=np.nan if floating else 0)
        part = found.to_numpy()[(slice(None), *rest)]
        return part if isinstance(when, slice | np.ndarray) else part[0]

"""A quantity of a run that grows, at no more updates than are told apart."""

import math
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Bool, Int

from dashboards.on_demand import on_demand
from gradlab.run import Run


@dataclass(frozen=True, kw_only=True, eq=False)
class Thinned:
    """A quantity at some of the updates at which it was recorded.

    Which ones does not depend on when it was looked at: all records are cut into stretches of
    equal length, a power of two; kept is the first of each, and the last of all. Of numbers without
    axes, which may be known at some updates only, it is the first that is one.

    Attributes:
        array: The quantity as of `Run.quantity`; one that is large reads what is looked at.
        count: How many records there are, those that are not whole among them.
        places: Which of them are kept, counted from 0 [update].
        held: Whether its numbers were read.
    """

    array: xr.DataArray
    count: int
    places: Int[np.ndarray, " update"]
    held: bool


def read_thinned(
    run: Run, quantity: str, *, most: int, held: int, before: Thinned | None = None
) -> Thinned:
    """Read a quantity, of one that was read before only what is new.

    Args:
        run: A run.
        quantity: One of its quantities.
        most: The most updates that are kept; at least 3.
        held: The most bytes, at 8 for a number, that are read at once.
        before: What was read when the run was shorter, by the same limits.

    Returns:
        The quantity.
    """
    axes = run.axes(quantity)
    if before is not None and axes != {
        dim: before.array[dim].to_numpy().tolist() for dim in before.array.dims[1:]
    }:
        before = None
    known = np.empty(0, np.int64) if before is None else before.array["update"].to_numpy()
    since = int(known[-1]) + 1 if len(known) else 0
    fresh = run.marks(quantity, since=since)
    count = (0 if before is None else before.count) + len(fresh)
    stride = _stride(count, most)
    updates = np.concatenate([known, fresh])
    places = np.arange(count - len(fresh), count)
    if before is not None:
        places = np.concatenate([before.places, places])
    number = np.ones(len(updates), bool)
    if not axes and stride > 1:
        number = _numbers(run, quantity, updates, places // stride, before)
    kept = _kept(places, number, stride)
    small = len(kept) * math.prod(map(len, axes.values())) * 8 <= held
    if small:
        array = _array(run, quantity, updates[kept], before)
    else:
        array = on_demand(run, quantity, run.updates(quantity, at=updates[kept].tolist()))
    whole = np.isin(updates[kept], array["update"])
    return Thinned(array=array, count=count, places=places[kept][whole], held=small)


def _stride(count: int, most: int) -> int:
    stride = 1
    while count > most and -(-count // stride) >= most:
        stride *= 2
    return stride


def _numbers(
    run: Run,
    quantity: str,
    updates: Int[np.ndarray, " record"],
    stretch: Int[np.ndarray, " record"],
    before: Thinned | None,
) -> Bool[np.ndarray, " record"]:
    """Tell which records are numbers; where the first of a stretch is one, the others may be."""
    number, unread = np.ones((2, len(updates)), bool)
    if before is not None:
        had = slice(before.array.sizes["update"])
        number[had] = np.isfinite(before.array.to_numpy())
        unread[had] = False

    def read(records: Bool[np.ndarray, " record"]) -> None:
        wanted = records & unread
        told = run.quantity(quantity, at=updates[wanted].tolist())
        finite = told["update"].to_numpy()[np.isfinite(told.to_numpy())]
        number[wanted] = np.isin(updates[wanted], finite)
        unread[wanted] = False

    first = np.diff(stretch, prepend=-1) > 0
    read(first)
    read(np.isin(stretch, stretch[first & ~number]))
    return number


def _kept(
    places: Int[np.ndarray, " record"], number: Bool[np.ndarray, " record"], stride: int
) -> Int[np.ndarray, " update"]:
    """Choose among records: of each stretch the first, of those that are numbers if any is."""
    if not len(places):
        return np.empty(0, np.int64)
    order = np.lexsort([places, ~number, places // stride])
    stretch = places[order] // stride
    first = order[np.flatnonzero(np.diff(stretch, prepend=-1))]
    return np.union1d(first, [len(places) - 1])


def _array(
    run: Run, quantity: str, updates: Int[np.ndarray, " update"], before: Thinned | None
) -> xr.DataArray:
    if before is None or not before.held:
        return run.quantity(quantity, at=updates.tolist())
    old = before.array["update"].to_numpy()
    stay = np.isin(old, updates)
    missing = updates[~np.isin(updates, old)].tolist()
    if stay.all() and not missing:
        return before.array
    return _joined(before.array[stay], run.quantity(quantity, at=missing))


def _joined(earlier: xr.DataArray, later: xr.DataArray) -> xr.DataArray:
    """Put records after others, with the later ones' labels.

    Not by `xarray.concat`: a `pandas.Index` keeps a weak reference to each that was ever made of
    it, so that labels handed on with every update take more and more memory.
    """
    pair = (earlier, later)
    return xr.DataArray(
        np.concatenate([array.to_numpy() for array in pair]),
        dims=later.dims,
        coords={
            **{dim: later[dim] for dim in later.dims[1:]},
            "update": np.concatenate([array["update"].to_numpy() for array in pair]),
        },
        name=later.name,
        attrs=later.attrs,
    )

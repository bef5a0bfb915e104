"""What is measured: an array with its axes' names and labels, its unit and its estimator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantity:
    """One measured quantity, as light as a training loop needs it.

    Attributes:
        values: The numbers.
        dims: Names of their axes, in order.
        coords: Labels of each axis.
        unit: Unit of the numbers, "1" for none.
        estimator: How they were estimated.
    """

    values: NDArray[Any]
    dims: tuple[str, ...] = ()
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    unit: str = ""
    estimator: str = ""

    @classmethod
    def scalar(cls, value: float, unit: str = "1", estimator: str = "") -> "Quantity":
        """A single number.

        Args:
            value: The number.
            unit: Its unit.
            estimator: How it was estimated.

        Returns:
            A quantity without axes.
        """
        return cls(values=np.asarray(float(value)), unit=unit, estimator=estimator)

    @classmethod
    def of(cls, array: xr.DataArray) -> "Quantity":
        """Take over a labelled array.

        Args:
            array: The array; attributes `unit` and `estimator` are kept, and an axis without
                labels gets its positions.

        Returns:
            The quantity.
        """
        return cls(
            values=array.to_numpy(),
            dims=tuple(str(dim) for dim in array.dims),
            coords={str(dim): np.asarray(array[dim]).tolist() for dim in array.dims},
            unit=array.attrs.get("unit", ""),
            estimator=array.attrs.get("estimator", ""),
        )


def dataset(quantities: Mapping[str, Quantity]) -> xr.Dataset:
    """Label quantities for analysis.

    Args:
        quantities: Quantities by name; axes of the same name have the same labels.

    Returns:
        One variable for each, with attributes `unit` and `estimator`.
    """
    coords = {axis: labels for q in quantities.values() for axis, labels in q.coords.items()}
    return xr.Dataset(
        {
            name: (q.dims, q.values, {"unit": q.unit, "estimator": q.estimator})
            for name, q in quantities.items()
        },
        coords={axis: list(labels) for axis, labels in coords.items()},
    )


def join(found: Mapping[str, Mapping[str, Quantity]], axis: str, union: str) -> dict[str, Quantity]:
    """Put the quantities of several parts side by side.

    Args:
        found: Quantities by part and name, with the same axes.
        axis: Name of the new leading axis, labelled by the parts.
        union: Name of an axis whose labels may differ: it gets the labels of all parts, and NaN
            where a part lacks one.

    Returns:
        Quantities by name.
    """
    everything = [q for quantities in found.values() for q in quantities.values()]
    labels = list(dict.fromkeys(label for q in everything for label in q.coords.get(union, ())))
    position = {label: number for number, label in enumerate(labels)}
    joined: dict[str, Quantity] = {}
    for name in dict.fromkeys(name for quantities in found.values() for name in quantities):
        first = next(quantities[name] for quantities in found.values() if name in quantities)
        coords = {dim: labels if dim == union else first.coords[dim] for dim in first.dims}
        values = np.full((len(found), *(len(c) for c in coords.values())), np.nan)
        for number, quantities in enumerate(found.values()):
            if name in quantities:
                own = quantities[name].coords
                # At most one axis is indexed by a list, so that each number keeps its place.
                place = tuple(
                    [position[label] for label in own[dim]] if dim == union else slice(None)
                    for dim in first.dims
                )
                values[number : number + 1][(slice(None), *place)] = quantities[name].values
        joined[name] = Quantity(
            values=values,
            dims=(axis, *first.dims),
            coords={axis: list(found), **coords},
            unit=first.unit,
            estimator=first.estimator,
        )
    return joined

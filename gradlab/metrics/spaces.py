"""Labels of what is measured by layer in two spaces side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradlab.decomposition import Decomposition
from gradlab.parameters import WHOLE
from gradlab.quantity import Quantity

SPACES = ("psi", "theta")


@dataclass(frozen=True)
class SpaceLabels:
    """Axes (space, layer, agent, agent_other), with the layers of both spaces.

    Attributes:
        layers: The whole network, and every layer of either space.
        agents: Number of agents.
        columns: Where the whole network and each layer of a space stand in `layers`, by space.
    """

    layers: tuple[str, ...]
    agents: int
    columns: Mapping[str, list[int]]

    @classmethod
    def of(cls, decomposition: Decomposition) -> "SpaceLabels":
        """Read them off a decomposition.

        Args:
            decomposition: What `decompose` returned.

        Returns:
            The labels.
        """
        d = decomposition
        of_spaces = {"psi": d.psi_layout.layers, "theta": d.theta_layout.layers}
        layers = tuple(dict.fromkeys((WHOLE, *of_spaces["theta"], *of_spaces["psi"])))
        columns = {
            space: [layers.index(layer) for layer in (WHOLE, *own)]
            for space, own in of_spaces.items()
        }
        return cls(layers, d.agents, columns)

    def placed(
        self, of_spaces: Mapping[str, Mapping[str, NDArray[np.float64]]]
    ) -> NDArray[np.float64]:
        """Put arrays by space and layer in their places.

        Args:
            of_spaces: By space and layer, arrays of the same shape.

        Returns:
            One array with two leading axes, NaN for a layer that a space lacks.
        """
        like = next(iter(next(iter(of_spaces.values())).values()))
        found = np.full((len(SPACES), len(self.layers), *like.shape), np.nan)
        for space, of_layers in of_spaces.items():
            for layer, values in of_layers.items():
                found[SPACES.index(space), self.layers.index(layer)] = values
        return found

    def of_estimates(
        self, rows: Mapping[str, slice], values: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Put what `gradlab.estimates` says in its place.

        Args:
            rows: Which rows are a space's.
            values: Numbers over (row, ...).

        Returns:
            One array with two leading axes, NaN for a layer that a space lacks.
        """
        found = np.full((len(SPACES), len(self.layers), *values.shape[1:]), np.nan)
        for number, space in enumerate(SPACES):
            found[number, self.columns[space]] = values[rows[space]]
        return found

    def of_layers(self, space: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Put an array of one space in its place among the layers of both.

        Args:
            space: The space.
            values: Numbers over (layer, ...), those of the whole network first.

        Returns:
            The numbers, NaN for a layer that the space lacks.
        """
        found = np.full((len(self.layers), *values.shape[1:]), np.nan)
        found[self.columns[space]] = values
        return found

    def quantity(
        self, values: NDArray[np.float64], unit: str, estimator: str, *, spaces: bool = True
    ) -> Quantity:
        """Label an array.

        Args:
            values: Numbers over (space, layer), or more of the axes in their order.
            unit: Their unit.
            estimator: How they were estimated.
            spaces: Whether there is an axis of spaces.

        Returns:
            The labelled quantity.
        """
        labels: dict[str, Sequence[Any]] = {
            "space": SPACES,
            "layer": self.layers,
            "agent": range(self.agents),
            "agent_other": range(self.agents),
        }
        if not spaces:
            del labels["space"]
        dims = tuple(labels)[: values.ndim]
        coords = {dim: labels[dim] for dim in dims}
        return Quantity(values=values, dims=dims, coords=coords, unit=unit, estimator=estimator)


def with_whole(
    layers: Sequence[str], values: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Name the rows of an array whose first is the whole network's.

    Args:
        layers: Names of the other rows.
        values: The rows.

    Returns:
        The rows by layer.
    """
    return dict(zip((WHOLE, *layers), map(np.asarray, values), strict=True))


def ratio(
    numerator: NDArray[np.float64] | NDArray[np.int64],
    denominator: NDArray[np.float64] | NDArray[np.int64],
) -> NDArray[np.float64]:
    """Divide.

    Args:
        numerator: Numbers.
        denominator: What they are divided by.

    Returns:
        The quotients, NaN where the denominator is 0.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator != 0, numerator / denominator, np.nan)

"""Labels of what is measured by layer in two spaces side by side, of one network or several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradlab.decomposition import Decomposition
from gradlab.estimates import Estimates
from gradlab.parameters import WHOLE
from gradlab.quantity import Quantity

SPACES = ("psi", "theta")


@dataclass(frozen=True, eq=False)
class SideBySide:
    """Decompositions of several networks' gradients, of the same samples.

    What is measured of them is one array (network, space, layer, agent, agent_other), or of some of
    these axes in their order: the same few operations serve them all. A *row* below is a layer of
    one space of one network, the whole of it first; rows are by network, space (psi, theta), layer.

    Attributes:
        of_networks: The decompositions by network.
    """

    of_networks: Mapping[str, Decomposition]

    @property
    def first(self) -> Decomposition:
        """One of them, for what they have in common: agents, samples and copies."""
        return next(iter(self.of_networks.values()))

    @property
    def agents(self) -> int:
        """Number of agents."""
        return self.first.agents

    @cached_property
    def count(self) -> NDArray[np.int64]:
        """Number of samples, [agent]."""
        found: NDArray[np.int64] = self.first.moments.count.cpu().numpy()
        return found

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The whole network, and every layer of any network in either space."""
        return tuple(
            dict.fromkeys(
                layer
                for d in self.of_networks.values()
                for layer in (WHOLE, *d.theta_layout.layers, *d.psi_layout.layers)
            )
        )

    @cached_property
    def estimates(self) -> Estimates[tuple[str, str]] | None:
        """What the products say of the true gradients, rows first, then the Jacobians' noise.

        None if clusters are not told apart.
        """
        products = {
            (network, space): found
            for network, d in self.of_networks.items()
            for space, found in d.products.items()
        }
        order = [(n, s) for n in self.of_networks for s in SPACES]
        order += [key for key in products if key not in order]
        return Estimates({key: products[key] for key in order}) if products else None

    def placed(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Put rows in their places.

        Args:
            values: Numbers over (row, ...); what follows the rows is left out.

        Returns:
            One array with three leading axes, NaN for a layer that a network or a space lacks.
        """
        shape = (len(self.of_networks), len(SPACES), len(self.layers))
        found = np.full((*shape, *values.shape[1:]), np.nan)
        found.reshape(-1, *values.shape[1:])[self._places] = values[: len(self._places)]
        return found

    def of_theta(self, of_networks: Sequence[Tensor]) -> NDArray[np.float64]:
        """Put what is known in theta-space alone in its place among the layers of both.

        Args:
            of_networks: For each network numbers over (layer, ...), the whole first.

        Returns:
            One array with two leading axes, network and layer; NaN for a layer that it lacks.
        """
        shape = of_networks[0].shape[1:]
        found = np.full((len(self.of_networks), len(self.layers), *shape), np.nan)
        for own, d, values in zip(found, self.of_networks.values(), of_networks, strict=True):
            own[self.columns(d.theta_layout.layers)] = values.cpu().numpy()
        return found

    def quantity(
        self, values: NDArray[Any], unit: str, estimator: str, *, spaces: bool = True
    ) -> Quantity:
        """Label an array.

        Args:
            values: Numbers over (network, space, layer), or more or fewer of the axes in order.
            unit: Their unit.
            estimator: How they were estimated.
            spaces: Whether there is an axis of spaces.

        Returns:
            The labelled quantity.
        """
        labels: dict[str, Sequence[Any]] = {
            "network": list(self.of_networks),
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

    def columns(self, layers: Sequence[str]) -> list[int]:
        """Where a network's whole and some of its layers stand among all.

        Args:
            layers: Their names.

        Returns:
            Positions, the whole's first.
        """
        return [self.layers.index(layer) for layer in (WHOLE, *layers)]

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        """Where each row stands among (network, space, layer)."""
        total, found = len(self.layers), list[NDArray[np.int64]]()
        for d in self.of_networks.values():
            for layout in (d.psi_layout, d.theta_layout):
                columns = np.asarray(self.columns(layout.layers))
                found.append(len(found) * total + columns)
        return np.concatenate(found)


def alone(found: Mapping[str, Quantity]) -> dict[str, Quantity]:
    """Drop the axis of networks, of which there is one.

    Args:
        found: Quantities by name, that axis leading.

    Returns:
        Quantities by name.
    """
    return {
        name: replace(
            q,
            values=np.asarray(q.values[0]),
            dims=q.dims[1:],
            coords={d: q.coords[d] for d in q.dims[1:]},
        )
        for name, q in found.items()
    }


def with_whole(of_layers: Tensor) -> Tensor:
    """Put the sum over layers before them.

    Args:
        of_layers: Numbers over (layer, ...).

    Returns:
        Numbers over (1 + layer, ...).
    """
    return torch.cat([of_layers.sum(0, keepdim=True), of_layers])


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

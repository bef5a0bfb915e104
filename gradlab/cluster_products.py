"""What debiased estimates and their intervals are made of: products by cluster.

A cluster is a group of environment copies. Samples of one copy depend on each other, and so do
agents that act in it; different copies are independent, and so are clusters of them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from gradlab.checks import check
from gradlab.engine.clusters import Products
from gradlab.parameters import ParameterLayout

Array = NDArray[np.float64]

CLUSTERS = 32
"""Into how many clusters environment copies are pooled by default."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusterProducts:
    r"""Inner products between agents' sums of gradients over clusters, in one space.

    :math:`s_i^e` is the sum of agent i's gradients over the samples of cluster e, :math:`s_i` over
    all samples.

    Attributes:
        layers: Names of the layers.
        count: Number of samples, [agent, cluster].
        within: s_i^e . s_k^e, [layer, cluster, agent, agent].
        across: s_i^e . s_k, [layer, cluster, agent, agent].
        following: s_i^e . s_k^f with the next cluster f, [layer, cluster - 1, agent, agent].
    """

    layers: tuple[str, ...]
    count: NDArray[np.int64]
    within: Array
    across: Array
    following: Array

    @classmethod
    def of(
        cls,
        products: Products,
        layout: ParameterLayout,
        count: Int[Tensor, "agent cluster"] | None,
    ) -> "ClusterProducts":
        """Take products over from the engine.

        Args:
            products: The products with a leading axis of parameters.
            layout: The parameters, in the same order.
            count: Number of samples of each agent in each cluster, which there must be.

        Returns:
            The products as arrays.
        """
        assert count is not None
        within, across, following = (t.double().cpu().numpy() for t in products.by_layer(layout))
        return cls(
            layers=layout.layers,
            count=count.cpu().numpy(),
            within=within,
            across=across,
            following=following,
        )


def pooled(copy: Int[Tensor, " sample"], most: int = CLUSTERS) -> Int[Tensor, " sample"]:
    """Pool environment copies into clusters.

    Copies are independent, so groups of them are; fewer clusters cost less, and an interval from 32
    is hardly wider than one from more.

    Args:
        copy: The copy that each sample comes from.
        most: How many clusters there may be.

    Returns:
        The cluster that each sample comes from, from 0: neighbouring copies together, clusters of
        nearly equally many copies.

    Raises:
        UsageError: If there may be fewer than one.
    """
    check(most >= 1, "most", "be at least 1", most)
    labels, rank = torch.unique(copy, return_inverse=True)
    cluster: Tensor = rank * min(most, len(labels)) // len(labels)
    return cluster

"""Gradients summed over clusters of samples, kept formed or as the factors that form them.

A cluster's summed gradient of a layer's weight is as large as the weight; the factors of its few
samples' gradients may be much smaller. Whichever is smaller is kept, so that telling apart many
environment copies never takes more memory than the backward pass itself.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gradlab.engine.per_sample import Outer, PerSample
from gradlab.parameters import ParameterLayout

_BLOCK = 4 * 2**20
"""Bytes of the clusters' gradients that are formed at once: what fits a processor's cache."""

EXACT = 4096
"""Samples whose gradients are added up in their own precision before they join a float64 sum."""


class RunningSum:
    """A sum as exact as float64 over any number of samples, at a matrix product's cost."""

    def __init__(self, like: Tensor, agents: int, shape: torch.Size) -> None:
        self._like, self._agents, self._shape = like, agents, shape
        self._total: Tensor | None = None
        self._recent: Tensor | None = None
        self._added = 0

    def add(self, gradient: PerSample, samples: int) -> None:
        """Add the gradients of some samples of every agent.

        Args:
            gradient: The gradients.
            samples: How many samples of each agent they are.
        """
        if self._added + samples > EXACT:
            self.total()
        if self._recent is None:
            self._recent = gradient.sum()
        else:
            gradient.add_sums(self._recent[:, None])
        self._added += samples

    def total(self) -> Float[Tensor, " agent *shape"]:
        """What was added up so far, in float64."""
        if self._recent is not None:
            recent = self._recent.double()
            self._total = recent if self._total is None else self._total.add_(recent)
            self._recent, self._added = None, 0
        if self._total is None:
            return self._like.new_zeros(self._agents, *self._shape, dtype=torch.float64)
        return self._total


class Products(NamedTuple):
    """Inner products between agents' sums of gradients over clusters, with g_i^e agent i's in e.

    Attributes:
        within: g_i^e . g_k^e, [*layer, cluster, agent, agent].
        across: g_i^e . g_k, with the sum over all clusters, [*layer, cluster, agent, agent].
        following: g_i^e . g_k^f with the next cluster f, [*layer, cluster - 1, agent, agent].
    """

    within: Tensor
    across: Tensor
    following: Tensor

    @classmethod
    def stacked(cls, of_parameters: Iterable["Products"]) -> "Products":
        """Put products of parameters side by side.

        Args:
            of_parameters: The products of each.

        Returns:
            Products with a leading axis of parameters.
        """
        return cls(*(torch.stack(kind) for kind in zip(*of_parameters, strict=True)))

    def by_layer(self, layout: ParameterLayout) -> "Products":
        """Add up the products of each layer's parameters.

        Args:
            layout: The parameters, in the order of the leading axis.

        Returns:
            Products with a leading axis of layers instead.
        """
        place = layout.layer_index.to(self.within.device)
        shape = len(layout.layers)
        return Products(*(t.new_zeros(shape, *t.shape[1:]).index_add_(0, place, t) for t in self))


class ClusterSums(ABC):
    """For every agent and cluster, the sum of the gradients of one parameter.

    Attributes:
        shape: The parameter's shape.
    """

    shape: torch.Size

    @abstractmethod
    def add(self, gradient: PerSample, clusters: slice) -> None:
        """Add gradients.

        Args:
            gradient: Gradients of samples in the order of the clusters, equally many of each.
            clusters: Which clusters.
        """

    @abstractmethod
    def form(
        self, clusters: slice, room: Float[Tensor, "agent room *shape"]
    ) -> Float[Tensor, "agent cluster *shape"]:
        """The sums of some clusters.

        Args:
            clusters: Which clusters; a stretch that `stretches` gave.
            room: Memory that may be used for them.

        Returns:
            The sums.
        """

    @abstractmethod
    def stretches(self, most: int) -> Iterator[slice]:
        """Cut the clusters into stretches that can be formed at once.

        Args:
            most: How many clusters a stretch may have at most.

        Yields:
            The stretches, in order.
        """

    @abstractmethod
    def formed(self) -> Float[Tensor, "agent cluster *shape"]:
        """All sums."""

    @abstractmethod
    def total(self) -> Float[Tensor, " agent *shape"]:
        """The sums over all clusters, in float64."""

    def first(self) -> Float[Tensor, "agent 1 *shape"]:
        """The sums of the first cluster, copied."""
        clusters = next(self.stretches(1))
        sums = self.form(clusters, self.like.new_empty(self.agents, 1, *self.shape))
        return sums.clone(memory_format=torch.contiguous_format)

    def products(
        self,
        total: Float[Tensor, " agent *shape"],
        after: Float[Tensor, "agent 1 *shape"] | None = None,
    ) -> "Products":
        """Inner products of agents' sums, cluster by cluster.

        Args:
            total: The sums over all clusters, in float64: of these, as `total` returns, or of more.
            after: Sums of one more cluster, whose products with the last are wanted as well.

        Returns:
            The products in float64.
        """
        agents, size = len(total), math.prod(self.shape)
        most = max(1, _BLOCK // max(1, size * agents * self.like.element_size()))
        room = self.like.new_empty(agents, most, *self.shape)
        totals = total.to(room.dtype).reshape(1, agents, size)
        within, across, following = list[Tensor](), list[Tensor](), list[Tensor]()
        last: Tensor | None = None
        for clusters in self.stretches(most):
            sums = self.form(clusters, room)
            rows = sums.reshape(agents, sums.shape[1], size).transpose(0, 1)
            within.append(_inner_products(rows, rows))
            across.append(_inner_products(rows, totals.expand(len(rows), -1, -1)))
            if last is not None:
                following.append(_inner_products(last, rows[:1]))
            if len(rows) > 1:
                following.append(_inner_products(rows[:-1], rows[1:]))
            last = rows[-1:].clone()  # the next stretch is formed in the same memory
        if after is not None:
            assert last is not None
            following.append(
                _inner_products(last, after.to(last).reshape(agents, 1, size).transpose(0, 1))
            )
        following = following or [within[0][:0]]  # of a single cluster
        return Products(
            *(p[0] if len(p) == 1 else torch.cat(p) for p in (within, across, following))
        )

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor of the same dtype and device."""

    @property
    @abstractmethod
    def agents(self) -> int:
        """Number of agents."""


class FormedSums(ClusterSums):
    """The sums themselves.

    Attributes:
        values: Tensor [agent, cluster, *shape].
    """

    def __init__(self, values: Float[Tensor, "agent cluster *shape"]) -> None:
        self.values = values
        self.shape = values.shape[2:]
        self._begun: set[tuple[int, int]] = set()
        self._precision = values.dtype

    @classmethod
    def empty(
        cls, like: Tensor, agents: int, clusters: int, samples: int, shape: torch.Size
    ) -> "FormedSums":
        """Room for sums, each of which is to be added to at least once.

        Args:
            like: A tensor of the gradients' dtype and device.
            agents: Number of agents.
            clusters: Number of clusters.
            samples: Number of samples of the largest cluster; sums of very many are in float64.
            shape: The parameter's shape.

        Returns:
            Sums without values yet.
        """
        precision = torch.float64 if samples > EXACT else like.dtype
        sums = cls(like.new_empty(agents, clusters, *shape, dtype=precision))
        sums._precision = like.dtype
        return sums

    @property
    def like(self) -> Tensor:
        """See `ClusterSums.like`."""
        return self.values

    @property
    def agents(self) -> int:
        """See `ClusterSums.agents`."""
        return len(self.values)

    def add(self, gradient: PerSample, clusters: slice) -> None:
        """See `ClusterSums.add`."""
        key = (clusters.start, clusters.stop)
        fresh = key not in self._begun
        self._begun.add(key)
        values = self.values[:, clusters]
        if values.dtype == self._precision:
            gradient.add_sums(values, fresh=fresh)
            return
        part = torch.empty_like(values, dtype=self._precision)
        gradient.add_sums(part, fresh=True)
        if fresh:
            values.copy_(part)
        else:
            values += part

    def form(
        self,
        clusters: slice,
        room: Float[Tensor, "agent room *shape"],  # noqa: ARG002
    ) -> Float[Tensor, "agent cluster *shape"]:
        """See `ClusterSums.form`."""
        return self.values[:, clusters]

    def stretches(self, most: int) -> Iterator[slice]:
        """See `ClusterSums.stretches`."""
        count = self.values.shape[1]
        for start in range(0, count, most):
            yield slice(start, min(start + most, count))

    def formed(self) -> Float[Tensor, "agent cluster *shape"]:
        """See `ClusterSums.formed`."""
        return self.values

    def total(self) -> Float[Tensor, " agent *shape"]:
        """See `ClusterSums.total`."""
        first, *more = self.values.split(64, dim=1)  # a float64 sum of all at once is far slower
        total: Tensor = first.sum(1).double()
        for some in more:
            total += some.sum(1)
        return total


class FactoredSums(ClusterSums):
    """The factors of a linear layer's gradients, from which each cluster's sum is formed.

    Attributes:
        pieces: For each stretch of clusters (start, stop) the gradients of its samples.
        clusters: Number of clusters.
    """

    def __init__(self, like: Tensor, agents: int, clusters: int, shape: torch.Size) -> None:
        self.pieces: dict[tuple[int, int], list[Outer]] = {}
        self.clusters = clusters
        self.shape = shape
        self._like = like
        self._agents = agents

    @property
    def like(self) -> Tensor:
        """See `ClusterSums.like`."""
        return self._like

    @property
    def agents(self) -> int:
        """See `ClusterSums.agents`."""
        return self._agents

    def add(self, gradient: PerSample, clusters: slice) -> None:
        """See `ClusterSums.add`."""
        assert isinstance(gradient, Outer)
        self.pieces.setdefault((clusters.start, clusters.stop), []).append(gradient)

    def form(
        self, clusters: slice, room: Float[Tensor, "agent room *shape"]
    ) -> Float[Tensor, "agent cluster *shape"]:
        """See `ClusterSums.form`."""
        sums = room[:, : clusters.stop - clusters.start]
        ((start, stop),) = (
            (start, stop)
            for start, stop in self.pieces
            if start <= clusters.start and clusters.stop <= stop
        )
        for number, piece in enumerate(self.pieces[start, stop]):
            samples = piece.inputs.shape[1] // (stop - start)
            some = slice((clusters.start - start) * samples, (clusters.stop - start) * samples)
            piece.some(some).add_sums(sums, fresh=number == 0)
        return sums

    def stretches(self, most: int) -> Iterator[slice]:
        """See `ClusterSums.stretches`."""
        for start, stop in sorted(self.pieces):
            for first in range(start, stop, most):
                yield slice(first, min(first + most, stop))

    def formed(self) -> Float[Tensor, "agent cluster *shape"]:
        """See `ClusterSums.formed`."""
        values = self._like.new_empty(self._agents, self.clusters, *self.shape)
        for clusters in self.stretches(self.clusters):
            self.form(clusters, values[:, clusters])
        return values

    def total(self) -> Float[Tensor, " agent *shape"]:
        """See `ClusterSums.total`."""
        running = RunningSum(self._like, self._agents, self.shape)
        for pieces in self.pieces.values():
            for piece in pieces:
                running.add(piece, piece.inputs.shape[1])
        return running.total()


def _inner_products(
    rows: Float[Tensor, "cluster row size"], others: Float[Tensor, "cluster other size"]
) -> Float[Tensor, "cluster row other"]:
    """`rows . others` within each cluster, in float64."""
    if len(rows) > 1:
        return torch.bmm(rows, others.mT).double()
    # One product of few long rows is done by one thread; one of several stretches by all.
    pieces = next(n for n in (8, 4, 2, 1) if rows.shape[2] % n == 0)
    stretches = (t[0].unflatten(1, (pieces, -1)).transpose(0, 1) for t in (rows, others))
    ours, theirs = stretches
    return torch.bmm(ours, theirs.mT).sum(0, dtype=torch.float64)[None]

"""One batch's moments, taken by several processes: each of a share of the clusters or samples."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from gradlab.engine.clusters import Products
from gradlab.engine.moments import SUMS, Moments

T = TypeVar("T")


@runtime_checkable
class Group(Protocol):
    """Processes that all hold the whole batch, and call the same in the same order.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    rank: int
    size: int

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over the processes in place of tensors of the same shapes in each.

        Args:
            tensors: What is added up.
        """

    def gather(self, value: T) -> list[T]:
        """Bring together what each process has.

        Args:
            value: What this one has: tensors, and what JSON can hold.

        Returns:
            What each has, in order.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """How a batch is shared out: neighbouring clusters, or samples where none are told apart.

    Attributes:
        group: The processes.
        samples: Numbers of this process' samples, ascending.
    """

    group: Group
    samples: Int[Tensor, " own"]

    @classmethod
    def of(
        cls, group: Group | None, samples: int, cluster: Int[Tensor, " sample"] | None
    ) -> "Shared | None":
        """Share a batch out.

        Args:
            group: The processes; None if there is but this one.
            samples: Number of samples of each agent.
            cluster: The cluster that each comes from, numbers from 0 without a gap.

        Returns:
            This process' share; None if there is not something for each.
        """
        number = torch.arange(samples) if cluster is None else cluster
        parts = int(number.max()) + 1
        if group is None or group.size == 1 or parts < group.size:
            return None
        start, stop = (parts * rank // group.size for rank in (group.rank, group.rank + 1))
        own = ((number >= start) & (number < stop)).nonzero()[:, 0]
        return cls(group=group, samples=own)

    def added_up(self, own: Moments) -> tuple[Moments, dict[str, Tensor] | None]:
        """Add up what all processes have taken.

        Args:
            own: Moments of this process' samples.

        Returns:
            Moments of all samples, the same in all processes, but for the sums by cluster, which
            are this process'; and the sums over the cluster that follows its last one,
            [agent, 1, ...] by parameter, None if there is none.
        """
        sums: dict[str, Any] = {
            name: getattr(own, name).clone() for name in SUMS if getattr(own, name) is not None
        }
        self.group.sum_(list(sums.values()))
        edge = None
        if own.copy_sums is not None:
            ends = {name: sums.first() for name, sums in own.copy_sums.items()}
            edge = [own.copies, own.copy_count, ends]
        first = own.first_non_finite
        first = torch.where(first < 0, first, self.samples.to(first.device)[first])
        told: Any = self.group.gather([own.engines, first, edge])
        engines, first = dict(own.engines), torch.full_like(first, -1)
        for theirs, found, _ in told:
            engines = {n: theirs[n] if e == "unused" else e for n, e in engines.items()}
            # Not the first process' that has one: their samples may lie between each other.
            both = torch.minimum(first, found)
            first = torch.where(both >= 0, both, torch.maximum(first, found))
        moments = replace(own, engines=engines, first_non_finite=first, **sums)
        if edge is None:
            return moments, None
        edges = [edge for _, _, edge in told]
        copies, count = (torch.cat([edge[n] for edge in edges], dim=n) for n in (0, 1))
        last = self.group.rank == self.group.size - 1
        after = None if last else edges[self.group.rank + 1][2]
        return replace(moments, copies=copies, copy_count=count), after

    def joined(self, products: Products) -> Products:
        """Put the products of all processes' clusters side by side.

        Args:
            products: Those of this process' clusters, the last one's with the cluster that follows
                it among them, [parameter, cluster, ...].

        Returns:
            Those of all clusters.
        """
        told = self.group.gather([kind.contiguous() for kind in products])
        return Products(*(torch.cat(kind, dim=1) for kind in zip(*told, strict=True)))

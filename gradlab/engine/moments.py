"""Sums of per-sample gradients: what every statistic of them is made of, mergeable in any order."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed

from gradlab.checks import UsageError, check
from gradlab.engine.clusters import ClusterSums, FormedSums, Products
from gradlab.engine.messages import gather_values
from gradlab.parameters import ParameterLayout


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Sums over samples of the gradients of a per-sample loss in theta-space.

    Merging adds; samples may be split into chunks, minibatches and processes in any way.

    Attributes:
        layout: Names, shapes and layers of the parameters.
        engines: For each parameter "structured", "general", or "unused" where the loss does not
            read it.
        count: Number of samples.
        sum: Sum of the gradients.
        squared_norm: Sum of the gradients' squared norms, by layer.
        non_finite: Number of samples whose gradient in a layer is not finite.
        first_non_finite: Number of the first such sample in its batch, -1 if there is none; after
            merging, in the first batch that has one.
        square: Sum of the squared coordinates, if asked for.
        plain: The same as `sum` as autograd makes it, with no sample told from another, if asked
            for.
        copies: Numbers of the environment copies that `copy_sums` tells apart, ascending.
        copy_count: Number of samples from each copy.
        copy_sums: Sums of the gradients of the samples from each copy, by parameter, in the
            batch's precision.
    """

    layout: ParameterLayout
    engines: dict[str, str]
    count: Int[Tensor, " agent"]
    sum: Float[Tensor, "agent param"]
    squared_norm: Float[Tensor, "agent layer"]
    non_finite: Int[Tensor, "agent layer"]
    first_non_finite: Int[Tensor, "agent layer"]
    square: Float[Tensor, "agent param"] | None = None
    plain: Float[Tensor, "agent param"] | None = None
    copies: Int[Tensor, " copy"] | None = None
    copy_count: Int[Tensor, "agent copy"] | None = None
    copy_sums: dict[str, ClusterSums] | None = None

    @property
    def mean(self) -> Float[Tensor, "agent param"]:
        """Z_i: each agent's mean gradient; 0 for an agent without samples."""
        return self.sum / self.count.clamp(min=1)[:, None]

    @property
    def mean_squared_norm(self) -> Float[Tensor, "agent layer"]:
        """Mean squared norm of an agent's per-sample gradients; 0 without samples."""
        return self.squared_norm / self.count.clamp(min=1)[:, None]

    def copy_products(self) -> Products:
        r"""Inner products between agents' sums of gradients, copy by copy.

        With :math:`g_i^e` agent i's sum over copy e and :math:`g_i` over all copies: what
        estimators that leave out products within a copy, and their intervals, are made of. Their
        memory does not depend on the number of parameters.

        Returns:
            :math:`g_i^e \cdot g_k^e`, :math:`g_i^e \cdot g_k`, and :math:`g_i^e \cdot g_k^f` with
            the next copy f, in float64, by layer.

        Raises:
            UsageError: If the gradients were not summed by copy.
        """
        return Products.stacked(self.parameter_products().values()).by_layer(self.layout)

    def parameter_products(self, after: Mapping[str, Tensor] | None = None) -> dict[str, Products]:
        """The same by parameter.

        Args:
            after: Sums over a copy that follows the last one, [agent, 1, ...] by parameter: its
                products with the last one are in `following` as well.

        Returns:
            Products without an axis of layers.

        Raises:
            UsageError: As for `copy_products`.
        """
        totals = self.layout.unflatten(self.sum)
        return {
            name: sums.products(totals[name], None if after is None else after[name])
            for name, sums in self.by_copy().items()
        }

    def by_copy(self) -> dict[str, ClusterSums]:
        """Sums by environment copy.

        Returns:
            They, by parameter.

        Raises:
            UsageError: If the gradients were not summed by copy.
        """
        if self.copy_sums is None:
            raise UsageError(
                "These moments hold no sums by environment copy. Give gradient_moments the "
                "argument `copy`, the copy that each sample comes from."
            )
        return self.copy_sums

    def merge(self, other: "Moments") -> "Moments":
        """Moments of the samples of both.

        Args:
            other: Moments of other samples, of the same parameters of the same agents.

        Returns:
            Their sum.

        Raises:
            UsageError: If they are of other parameters or agents, or only one of them has squared
                coordinates or sums by copy.
        """
        check(
            other.layout == self.layout and len(other.count) == len(self.count),
            "other",
            f"hold moments of the same parameters, of {len(self.count)} agents",
            f"{other.layout.shapes} of {len(other.count)} agents",
        )
        added: dict[str, Any] = self._added(other)
        added["first_non_finite"] = _first_found(self.first_non_finite, other.first_non_finite)
        engines = {
            name: other.engines[name] if engine == "unused" else engine
            for name, engine in self.engines.items()
        }
        if self.copies is None or other.copies is None:
            return replace(self, engines=engines, **added)
        copies = torch.cat([self.copies, other.copies]).unique()
        count, sums = self._spread(copies)
        other_count, other_sums = other._spread(copies)
        return replace(
            self,
            engines=engines,
            copies=copies,
            copy_count=count + other_count,
            copy_sums={name: FormedSums(ours + other_sums[name]) for name, ours in sums.items()},
            **added,
        )

    def all_reduce(self, group: distributed.ProcessGroup | None = None) -> "Moments":
        """Merge the moments of all processes of a `torch.distributed` group.

        Every process calls it, with moments of its own samples of the same agents' same
        parameters, and all get the same result.

        Args:
            group: The processes; all by default.

        Returns:
            The moments of all processes' samples.
        """

        def total(tensor: Tensor) -> Tensor:
            tensor = tensor.clone()
            distributed.all_reduce(tensor, group=group)
            return tensor

        own = None if self.copies is None else self.copies.tolist()
        said: Any = (dict(self.engines), own, self.first_non_finite.tolist())
        device = self.first_non_finite.device
        everywhere = gather_values(said, device=device, group=group)
        engines, first = self.engines, torch.full_like(self.first_non_finite, -1)
        for theirs, _, found in everywhere:
            engines = {n: theirs[n] if e == "unused" else e for n, e in engines.items()}
            first = _first_found(first, torch.tensor(found, device=device))
        sums: dict[str, Any] = {
            name: total(getattr(self, name)) for name in SUMS if getattr(self, name) is not None
        }
        sums["first_non_finite"] = first
        if self.copies is None:
            return replace(self, engines=engines, **sums)
        labels = {label for _, labels, _ in everywhere for label in labels or ()}
        copies = torch.tensor(sorted(labels), device=self.copies.device)
        count, by_copy = self._spread(copies)
        return replace(
            self,
            engines=engines,
            copies=copies,
            copy_count=total(count),
            # float64, as some of the processes may have them
            copy_sums={n: FormedSums(total(tensor.double())) for n, tensor in by_copy.items()},
            **sums,
        )

    def _added(self, other: "Moments") -> dict[str, Tensor]:
        """The plain sums of both; refuses what only one has."""
        for name in ("square", "plain", "copies"):
            check(
                (getattr(self, name) is None) == (getattr(other, name) is None),
                "other",
                f"have `{name}` if and only if these moments have",
                getattr(other, name),
            )
        return {
            name: getattr(self, name) + getattr(other, name)
            for name in SUMS
            if getattr(self, name) is not None
        }

    def _spread(self, copies: Int[Tensor, " copy"]) -> tuple[Tensor, dict[str, Tensor]]:
        """Counts and sums by copy, with 0 for the copies that have no samples here."""
        assert self.copies is not None
        assert self.copy_count is not None
        assert self.copy_sums is not None
        place = torch.searchsorted(copies, self.copies)

        def spread(ours: Tensor) -> Tensor:
            empty = ours.new_zeros(len(ours), len(copies), *ours.shape[2:])
            return empty.index_copy_(1, place, ours)

        return (
            spread(self.copy_count),
            {name: spread(sums.formed()) for name, sums in self.copy_sums.items()},
        )


def _first_found(ours: Tensor, theirs: Tensor) -> Tensor:
    return torch.where(ours >= 0, ours, theirs)


SUMS = ("count", "sum", "squared_norm", "non_finite", "square", "plain")
"""What is added up over samples, but for the sums by copy."""

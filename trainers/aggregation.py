"""What came of an aggregator over an update: the direction taken beside the plain gradient."""

import torch
from jaxtyping import Float
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.quantity import Quantity
from trainers.aggregators import Aggregator, CantAggregate

OPPOSED = -1e-3
"""Cosine below which a direction counts as against an agent: solvers keep to their constraints to
about 1e-4."""

_MEAN = "mean over the minibatches of all passes"
_DIRECTIONS = ["plain", "applied"]


class Aggregation:
    """Aggregates a network's rows minibatch by minibatch, and keeps account of it."""

    def __init__(self, aggregator: Aggregator) -> None:
        """Have aggregated nothing yet.

        Args:
            aggregator: Makes one gradient of the agents'.
        """
        self.aggregator = aggregator
        self._seen: list[dict[str, Tensor]] = []
        self._failures: list[str] = []

    def __call__(
        self, rows: Float[Tensor, "agent psi"], random: RandomGenerator
    ) -> Float[Tensor, " psi"]:
        """Combine the agents' gradients of a minibatch.

        Args:
            rows: The gradients, which add up to the plain one.
            random: Source of what is drawn.

        Returns:
            One gradient; the plain one if the aggregator makes nothing of these rows.
        """
        plain = rows.sum(0)
        if not plain.isfinite().all():
            return plain  # the training ends at it
        try:
            applied = self.aggregator(rows, random)
        except CantAggregate as error:
            self._failures.append(str(error))
            applied = plain
        self._seen.append(_compared(rows, plain, applied))
        return applied

    def account(self) -> tuple[dict[str, Quantity], str]:
        """Say what came of it since the last account.

        Returns:
            Quantities by name, as docs/aggregation.md defines them, and a sentence on what failed,
            empty if nothing did.
        """
        seen, failures = self._seen, self._failures
        self._seen, self._failures = [], []
        names = seen[0] if seen else ()
        found = {
            name: Quantity(
                values=torch.stack([of[name] for of in seen]).nanmean(0).numpy(),
                dims=("direction",) if seen[0][name].dim() else (),
                coords={"direction": _DIRECTIONS} if seen[0][name].dim() else {},
                unit="1",
                estimator=_MEAN,
            )
            for name in names
        }
        found["aggregations_failed"] = Quantity.scalar(
            float(len(failures)), "minibatches", "exact, of all passes"
        )
        if not failures:
            return found, ""
        return found, (
            f"{self.aggregator.name} made nothing of the agents' gradients in {len(failures)} of "
            f"{len(seen)} minibatches, which took the plain gradient ({failures[0]})"
        )


def _compared(rows: Tensor, plain: Tensor, applied: Tensor) -> dict[str, Tensor]:
    directions = torch.stack([plain, applied])
    lengths, norms = directions.norm(dim=1), rows.norm(dim=1)
    cosines = directions @ rows.mT / (lengths[:, None] * norms)  # NaN where there is no direction
    pairs = rows @ rows.mT / (norms[:, None] * norms)
    one, other = torch.triu_indices(len(rows), len(rows), 1)
    return {
        "aggregated_cosine": plain @ applied / lengths.prod(),
        "aggregated_length": lengths[1] / lengths[0],
        "worst_cosine": _least(cosines),
        "opposed_agents": _share_opposed(cosines),
        "opposed_pairs": _share_opposed(pairs[one, other]),
    }


def _least(cosines: Tensor) -> Tensor:
    """The least along the last axis of those that there are."""
    known = ~cosines.isnan()
    least = torch.where(known, cosines, torch.inf).amin(-1)
    return torch.where(known.any(-1), least, torch.nan)


def _share_opposed(cosines: Tensor) -> Tensor:
    """Share of the cosines that there are, along the last axis; NaN if there are none."""
    known = ~cosines.isnan()
    return ((cosines < OPPOSED) & known).sum(-1) / known.sum(-1)

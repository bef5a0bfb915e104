"""The coupling's closed form, as a generator that knows it hands it over."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class CouplingForms:
    r"""Exact traces and Frobenius norms of :math:`K_{ik} = J_i J_k^\top`, block by block.

    Block (p, q) has a row for each coordinate of agent i's policy parameter p, and a column for
    each of agent k's policy parameter q. J is taken with respect to the trained parameters, those
    that require a gradient.

    Attributes:
        names: The policy parameters, all that the generator makes, in its order.
        head: Traces of the blocks (p, p), of the share of those trained parameters alone on which
            policy parameter p depends linearly.
        trace: Traces of the blocks (p, p).
        squared: Squared Frobenius norms of the blocks (p, q).
    """

    names: tuple[str, ...]
    head: Float[Tensor, "parameter agent agent_other"]
    trace: Float[Tensor, "parameter agent agent_other"]
    squared: Float[Tensor, "parameter parameter_other agent agent_other"]

    @classmethod
    def multiples_of_identity(
        cls,
        sizes: Mapping[str, int],
        factors: Mapping[str, Float[Tensor, "agent agent_other"]],
    ) -> "CouplingForms":
        """Where every block (p, p) is a multiple of the identity and the others are zero.

        Args:
            sizes: Number of coordinates by policy parameter.
            factors: The multiples for each pair of agents, by policy parameter.

        Returns:
            The forms, all of which is the heads' share.
        """
        factor = torch.stack([factors[name] for name in sizes])
        size = torch.tensor(list(sizes.values())).to(factor)[:, None, None]
        squared = factor.new_zeros(len(sizes), *factor.shape)
        own = range(len(sizes))
        squared[own, own] = factor.square() * size
        return cls(names=tuple(sizes), head=factor * size, trace=factor * size, squared=squared)


@runtime_checkable
class KnowsCoupling(Protocol):
    """A generator with a closed form of how it ties agents together."""

    def coupling_forms(self) -> CouplingForms:
        """The forms for all of its agents."""

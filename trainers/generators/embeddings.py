"""What a hypernetwork reads of an agent: a row of a table, learned or fixed."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from gradlab.registry import Registry
from trainers.config import HypernetworkConfig

Table = Float[Tensor, "agent feature"]


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """One kind of table.

    Attributes:
        draw: Makes it, of the number of agents, settings and randomness.
        size: Number of its features, from the number of agents and the size asked for.
    """

    draw: Callable[[int, HypernetworkConfig, RandomGenerator], Table]
    size: Callable[[int, int], int] = lambda _, size: size


def _learned(agents: int, config: HypernetworkConfig, random: RandomGenerator) -> Table:
    """Where learned embeddings start: orthogonal with gain sqrt 2 (HyperMARL's official code)."""
    rows = torch.empty(agents, config.embedding_size)
    return nn.init.orthogonal_(rows, math.sqrt(2), generator=random)


def _one_hot(agents: int, config: HypernetworkConfig, random: RandomGenerator) -> Table:  # noqa: ARG001
    return torch.eye(agents)


def _equiangular(agents: int, config: HypernetworkConfig, random: RandomGenerator) -> Table:  # noqa: ARG001
    """Unit vectors of one cosine: a feature that all have, and one of each agent's own.

    Any turn of them has the same cosines, but Adam scales each feature's gradients by itself: like
    this it does at cosine 0 what it does to separate networks, and at 1 what it does to a shared
    one.
    """
    shared = torch.full((agents, 1), math.sqrt(config.cosine))
    return torch.cat([shared, math.sqrt(1 - config.cosine) * torch.eye(agents)], dim=1)


def _orthogonal(agents: int, config: HypernetworkConfig, random: RandomGenerator) -> Table:
    """Rows of a random orthogonal matrix: orthonormal, as far as there is room for them.

    With more agents than features they are the rows of as many of its columns as there are
    features.
    """
    return nn.init.orthogonal_(torch.empty(agents, config.embedding_size), generator=random)


def _random(agents: int, config: HypernetworkConfig, random: RandomGenerator) -> Table:
    return torch.randn(agents, config.embedding_size, generator=random)


EMBEDDINGS: Registry[Embedding] = Registry(
    "embedding",
    {
        "learned": Embedding(draw=_learned),
        "one-hot": Embedding(draw=_one_hot, size=lambda agents, _: agents),
        "orthogonal": Embedding(draw=_orthogonal),
        "random": Embedding(draw=_random),
        "equiangular": Embedding(draw=_equiangular, size=lambda agents, _: agents + 1),
    },
)
"""Tables by name."""

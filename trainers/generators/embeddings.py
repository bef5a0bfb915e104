"""What a hypernetwork reads of an agent: a row of a table, learned or fixed."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from gradlab.registry import Registry

Table = Callable[[int, int, RandomGenerator], Float[Tensor, "agent feature"]]


def _learned(agents: int, size: int, random: RandomGenerator) -> Float[Tensor, "agent feature"]:
    """Where learned embeddings start: orthogonal with gain sqrt 2 (HyperMARL's official code)."""
    return nn.init.orthogonal_(torch.empty(agents, size), math.sqrt(2), generator=random)


def _one_hot(agents: int, size: int, random: RandomGenerator) -> Float[Tensor, "agent feature"]:  # noqa: ARG001
    return torch.eye(agents)


def _orthogonal(agents: int, size: int, random: RandomGenerator) -> Float[Tensor, "agent feature"]:
    """Rows of a random orthogonal matrix: orthonormal, as far as there is room for them.

    With more agents than features they are the rows of as many of its columns as there are
    features.
    """
    return nn.init.orthogonal_(torch.empty(agents, size), generator=random)


def _random(agents: int, size: int, random: RandomGenerator) -> Float[Tensor, "agent feature"]:
    return torch.randn(agents, size, generator=random)


EMBEDDINGS: Registry[Table] = Registry(
    "embedding",
    {
        "learned": _learned,
        "one-hot": _one_hot,
        "orthogonal": _orthogonal,
        "random": _random,
    },
)
"""Tables [agent, feature] by name, from the number of agents and a size (one-hot has its own)."""

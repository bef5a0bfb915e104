"""What a critic reads: the only difference between independent and multi-agent PPO."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

CriticInput = Callable[[Tensor], Tensor]


def own_observation(
    observation: Float[Tensor, "agent *sample obs"],
) -> Float[Tensor, "agent *sample obs"]:
    """Each agent's value from what it sees itself (IPPO; de Witt et al., 2020).

    Args:
        observation: What each agent sees.

    Returns:
        The same.
    """
    return observation


def joint_observation(
    observation: Float[Tensor, "agent *sample obs"],
) -> Float[Tensor, "agent *sample joint"]:
    """Each agent's value from what all agents see (MAPPO; Yu et al., 2022).

    Args:
        observation: What each agent sees.

    Returns:
        The observations of all agents, one after the other in their order: the same for every
        agent, a view that takes the memory of one.
    """
    agents = len(observation)
    joint = observation.movedim(0, -2).flatten(-2)
    return joint.expand(agents, *joint.shape)


CRITIC_INPUTS: dict[str, CriticInput] = {"ippo": own_observation, "mappo": joint_observation}
"""By algorithm."""

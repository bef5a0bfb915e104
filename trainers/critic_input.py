"""What a critic reads: the only difference between independent and multi-agent PPO."""

from collections.abc import Callable, Mapping

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


def read_once(read: Float[Tensor, "agent sample joint"], theta: Mapping[str, Tensor]) -> Tensor:
    """Leave one agent to stand for all if all read the same with the same parameters.

    Args:
        read: What the agents' critics read.
        theta: Their parameters, with a leading axis [agent] or [1].

    Returns:
        The first agent's [1, sample, joint], or all agents'.
    """
    alike = read.stride(0) == 0 and all(len(parameter) == 1 for parameter in theta.values())
    return read[:1] if alike else read


CRITIC_INPUTS: dict[str, CriticInput] = {"ippo": own_observation, "mappo": joint_observation}
"""By algorithm."""

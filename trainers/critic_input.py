"""What a critic reads: its agent's observation (IPPO, A2C), or more (all others).

Samples hold `observation` of every agent. Where critics are to read the environment's own world
state, they hold `world_state` [1, sample, state] as well, once for all agents.
"""

from collections.abc import Callable, Mapping
from functools import partial

from jaxtyping import Float
from torch import Tensor

from gradlab.checks import UsageError, check
from trainers.config import TrainConfig
from trainers.envs.vector_env import EnvSpec

CriticInput = Callable[[Tensor], Tensor]


def own_observation(
    observation: Float[Tensor, "agent *sample obs"],
) -> Float[Tensor, "agent *sample obs"]:
    """Each agent's value from what it sees itself (IPPO; de Witt et al., 2020; and A2C).

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


def shared_state(
    world_state: Float[Tensor, "1 *sample state"], *, agents: int
) -> Float[Tensor, "agent *sample state"]:
    """Each agent's value from how the world stands (MAPPO; Yu et al., 2022).

    Args:
        world_state: What the environment says of itself.
        agents: Number of agents.

    Returns:
        The same for every agent, a view that takes the memory of one.
    """
    return world_state.expand(agents, *world_state.shape[1:])


def critic_source(samples: Mapping[str, Tensor]) -> str:
    """Name what critics read something of.

    Args:
        samples: Samples by name.

    Returns:
        "world_state", where critics are to read it; else "observation".
    """
    return "world_state" if "world_state" in samples else "observation"


def make_critic_input(config: TrainConfig, spec: EnvSpec) -> CriticInput:
    """Make what takes what the critics read from what `critic_source` names.

    Args:
        config: Algorithm and critic input.
        spec: What the environment looks like.

    Returns:
        The function.

    Raises:
        UsageError: If the environment has no such thing, or the algorithm does not read it.
    """
    joint = config.algorithm in {"mappo", "happo", "matd3", "masac"}
    if config.critic_input == "observations":
        return joint_observation if joint else own_observation
    check(
        joint,
        "critic_input",
        f"be observations with --algorithm {config.algorithm}, whose critics read their "
        "agent's own",
        config.critic_input,
    )
    if spec.world_state_size is None:
        raise UsageError(
            f"`critic_input` must be observations: {spec.name} has no world state. Got "
            f"critic_input={config.critic_input!r}."
        )
    return partial(shared_state, agents=spec.agents)

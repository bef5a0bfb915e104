"""How all agents act while nothing is trained: the same for collecting and for evaluating."""

from collections.abc import Callable

from jaxtyping import Bool, Float, Int
from torch import Generator as RandomGenerator
from torch import Tensor

from trainers.generators.generator import Generator
from trainers.networks import Theta
from trainers.policies import Policy
from trainers.processes import Share


def fixed_parameters(generator: Generator) -> Callable[[Tensor], Theta]:
    """What agents act with while nothing is trained, generated as seldom as can be.

    Args:
        generator: Makes their parameters.

    Returns:
        A function of observations [agent, sample, obs].
    """
    if generator.reads_observation:
        return generator.policy_for
    theta = generator.all_agents()
    return lambda _: theta


def act(
    policy: Policy,
    theta: Callable[[Tensor], Theta],
    observation: Float[Tensor, "agent copy obs"],
    mask: Bool[Tensor, "agent copy action"] | None,
    random: RandomGenerator | None,
    memory: Float[Tensor, "agent copy size"] | None = None,
    share: Share | None = None,
) -> tuple[
    Int[Tensor, "agent copy"] | Float[Tensor, "agent copy action"],
    Float[Tensor, "agent copy"],
    Float[Tensor, "agent copy size"] | None,
]:
    """Choose every agent's action in every copy.

    Args:
        policy: The policies' form.
        theta: Their parameters, given what they see.
        observation: What they see, normalised if that is asked for.
        mask: What they may do, as `VectorEnv.action_mask` says it.
        random: Draws the actions; None for each policy's mode.
        memory: What recurrent policies remember before they see it, see `MLP.begin`.
        share: Which of a training's copies these are; None: all.

    Returns:
        Actions, to be turned into the environment's by `policy.to_env`; their log-probabilities
        (nats); and what the policies remember then, to be forgotten where the episode ends.
    """
    parameters = theta(observation)
    read, memory = policy.network.read_next(parameters, observation, memory)
    if random is None:
        return *policy.mode(parameters, read, mask), memory
    return *policy.sample(parameters, read, random, mask, share), memory

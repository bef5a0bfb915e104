"""SePS: agents in groups, a network for each group.

Christianos, Papoudakis, Rahman & Albrecht, "Scaling multi-agent reinforcement learning with
selective parameter sharing" (ICML 2021). Which agent is in which group is found during the training
(`trainers.grouping`): until then all are in group 0.
"""

import torch
from jaxtyping import Float, Int
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.checks import check
from trainers.config import SePSConfig
from trainers.generators.generator import LOG_STD, initial_theta
from trainers.generators.slices import Slices
from trainers.networks import MLP, Theta

LATENT = 10
"""Size of what the agents are grouped by."""

MOST = 10
"""Groups there may be at most if their number is chosen."""


class SePS(Slices):
    """theta_i = psi_{group(i)}: a slice of the trained parameters for each group.

    Slices of groups that nobody is in are there and have no gradient.

    Attributes:
        group: Number of each agent's group [agent]; a buffer.
        encoding: What the agents were grouped by [agent, latent], 0 before they were; a buffer.
        slices: Number of groups that there is room for.
    """

    group: Tensor
    encoding: Tensor

    def __init__(
        self,
        mlp: MLP,
        agents: int,
        random: RandomGenerator,
        config: SePSConfig,
        *,
        own_log_std: bool = False,
    ) -> None:
        """Draw the initial parameters, with all agents in group 0.

        Args:
            mlp: The network.
            agents: Number of agents.
            random: Source of randomness.
            config: The number of groups.
            own_log_std: Whether each agent has its own `log_std`, or a group its own.

        Raises:
            UsageError: If there can't be so many groups, or none be chosen.
        """
        slices = slices_of(config, agents)
        own = {LOG_STD} if own_log_std and mlp.log_std_size else set()
        super().__init__(mlp, agents, _drawn(mlp, agents, slices, own, random), own)
        self.slices = slices
        self.register_buffer("group", torch.zeros(agents, dtype=torch.int64))
        self.register_buffer("encoding", torch.zeros(agents, LATENT))

    @classmethod
    def count(cls, mlp: MLP, agents: int, config: SePSConfig, own_log_std: bool = False) -> int:
        """Number of trained parameters.

        Args:
            mlp: The network.
            agents: Number of agents.
            config: The number of groups.
            own_log_std: As for the constructor.

        Returns:
            K P, and the log standard deviations, for K groups, or as many as could be chosen.
        """
        slices = slices_of(config, agents)
        return slices * mlp.size + mlp.log_std_size * (agents if own_log_std else slices)

    def selected(self, name: str, agents: Int[Tensor, " agent"]) -> Int[Tensor, " agent"]:
        """See `Slices.selected`: the group's."""
        return agents if name in self.own else self.group[agents]

    @torch.no_grad()
    def regroup(
        self,
        group: Int[Tensor, " agent"],
        encoding: Float[Tensor, "agent latent"],
        random: RandomGenerator,
    ) -> None:
        """Put agents in groups, with networks that start afresh.

        Args:
            group: The group of each agent.
            encoding: What they were grouped by.
            random: Source of randomness.
        """
        drawn = _drawn(self.mlp, self.agents, self.slices, self.own, random)
        for name, tensor in self._by_name().items():
            tensor.copy_(drawn[name])
        self.group.copy_(group)
        self.encoding.copy_(encoding)

    def representation(self) -> tuple[Float[Tensor, "agent feature"], str]:
        """See `Generator.representation`."""
        return self.encoding.clone(), "what agents are grouped by, the encoder's mean; before, 0"

    def jacobian(self) -> str:
        """See `Generator.jacobian`."""
        said = "selects the slice of the agent's group: J_i J_k^T is I in a group, 0 across"
        return f"{said}; selects the agent's own log_std" if self.own else said


def slices_of(config: SePSConfig, agents: int) -> int:
    """How many groups there may be.

    Args:
        config: Their number, if it is set.
        agents: Number of agents.

    Returns:
        That number, or else the largest that may be chosen: the index that chooses has no value for
        one group, or for as many as agents.

    Raises:
        UsageError: If it is more than there are agents, or can't be chosen.
    """
    if config.groups is None:
        rule = f"be given with {agents} agents: a number of groups is chosen for 3 agents or more"
        check(agents > 2, "seps.groups", rule, None)
        return min(MOST, agents - 1)
    rule = f"be at most {agents}, the number of agents"
    check(config.groups <= agents, "seps.groups", rule, config.groups)
    return config.groups


def _drawn(
    mlp: MLP, agents: int, slices: int, own: set[str] | frozenset[str], random: RandomGenerator
) -> Theta:
    """Initial values of every slice."""
    drawn = [initial_theta(mlp, random) for _ in range(slices)]
    theta = {name: torch.stack([of[name] for of in drawn]) for name in drawn[0]}
    return theta | {name: theta[name][:1].repeat(agents, 1) for name in own}

"""HyperMARL without gradient decoupling: the hypernetwork reads the observation as well."""

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.checks import UsageError
from trainers.generators.hypernetwork import HyperNetwork
from trainers.networks import MLP, Theta


class CoupledHyperNetwork(HyperNetwork):
    """theta_{i,t} = h([o_t ; e_i]): other parameters for every sample (HyperMARL, section 6).

    Its weight heads are scaled as HyperMARL's, for what the trunks make of the observation 0.
    """

    reads_observation: ClassVar[bool] = True

    def __init__(
        self,
        mlp: MLP,
        agents: int,
        random: RandomGenerator,
        *,
        embedding_size: int | None,
        hidden: tuple[int, ...],
        scaled_init: bool,
        bias: bool = True,
    ) -> None:
        super().__init__(
            mlp,
            agents,
            random,
            embedding_size=embedding_size,
            hidden=hidden,
            scaled_init=scaled_init,
            bias=bias,
            observation_size=mlp.sizes[0],
        )

    def forward(
        self, agents: Int[Tensor, " n"], observation: Float[Tensor, "n obs"] | None = None
    ) -> Theta:
        """Make the policy parameters of some agents for what they see.

        Args:
            agents: Numbers of the agents.
            observation: What each sees.

        Returns:
            Tensors [n, ...] by name, or [1, ...] where all share the tensor.

        Raises:
            UsageError: Without an observation.
        """
        if observation is None:
            raise UsageError(
                "`observation` must be given: this generator makes other parameters for each one."
            )
        return self.make(torch.cat([observation, self.embedding[agents]], dim=1))

    def policy_for(self, observation: Float[Tensor, "agent sample obs"]) -> Theta:
        """See `Generator.policy_for`."""
        agents, samples = observation.shape[:2]
        numbers = torch.arange(agents, device=observation.device).repeat_interleave(samples)
        theta = self(numbers, observation.flatten(0, 1))
        return {
            name: tensor if len(tensor) == 1 else tensor.unflatten(0, (agents, samples))
            for name, tensor in theta.items()
        }

"""HyperMARL without gradient decoupling: the hypernetwork reads the observation as well."""

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradlab.checks import UsageError
from gradlab.metrics.coupling_forms import CouplingForms
from trainers.generators.hypernetwork import HyperNetwork
from trainers.networks import Theta


class CoupledHyperNetwork(HyperNetwork):
    """theta_{i,t} = h([o_t ; e_i]): other parameters for every sample (HyperMARL, Fig. 8, w/o GD).

    Its weight heads are scaled as HyperMARL's, for what the trunks make of an observation of zeros.
    With a memory, whose parameters all agents share, the layers after it are made anew for every
    step.

    Attributes:
        made_by_step: Names of the policy parameters that an observation [*step, obs] makes one of
            for each step.
    """

    reads_observation: ClassVar[bool] = True

    @property
    def made_by_step(self) -> frozenset[str]:  # noqa: D102 -- with the attributes
        return frozenset(self.shapes)

    def forward(
        self, agents: Int[Tensor, " n"], observation: Float[Tensor, "n *step obs"] | None = None
    ) -> Theta:
        """Make the policy parameters of some agents for what they see.

        Args:
            agents: Numbers of the agents.
            observation: What each sees.

        Returns:
            Tensors [n, *step, ...] by name, or [1, ...] where all share the tensor.

        Raises:
            UsageError: Without an observation.
        """
        if observation is None:
            raise UsageError(
                "`observation` must be given: this generator makes other parameters for each one. "
                "Got observation=None."
            )
        steps = observation.shape[1:-1]
        embedding = self.embedding[agents].view(len(agents), *[1] * len(steps), -1)
        embedding = embedding.expand(-1, *steps, -1)
        return self.make(torch.cat([observation, embedding], dim=-1), agents)

    def policy_for(self, observation: Float[Tensor, "agent sample *step obs"]) -> Theta:
        """See `Generator.policy_for`."""
        agents, samples = observation.shape[:2]
        numbers = torch.arange(agents, device=observation.device).repeat_interleave(samples)
        theta = self(numbers, observation.flatten(0, 1))
        return {
            name: tensor if len(tensor) == 1 else tensor.unflatten(0, (agents, samples))
            for name, tensor in theta.items()
        }

    def representation(self) -> tuple[Float[Tensor, "agent feature"], str]:
        """See `Generator.representation`."""
        rows, what = super().representation()
        return rows, what if self.learned else f"{what}, for an observation of zeros"

    def jacobian(self) -> str:
        """See `Generator.jacobian`."""
        return f"another one for every sample, of its observation: {super().jacobian()}"

    def coupling_forms(self) -> CouplingForms:
        """There are none: J is another one for every sample.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "`coupling_forms` must be asked of a generator that does not read the observation: "
            "this one's J differs from sample to sample. Got generator=CoupledHyperNetwork."
        )

"""What every sharing scheme is: a map from trained parameters to each agent's policy parameters."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from gradlab.engine.per_sample import PerSample
from gradlab.metrics.coupling_forms import CouplingForms
from gradlab.quantity import Quantity
from trainers.generators.initialisation import initial_memory
from trainers.networks import MLP, Theta

LOG_STD = "log_std"
"""Name of a Gaussian policy's free vector."""


class Generator(nn.Module, ABC):
    """theta_i = h(psi, i): makes the parameters of one network for every agent.

    Attributes:
        agents: Number of agents.
        mlp: The network whose parameters are made.
        reads_observation: Whether `forward` takes an observation for each agent number as well,
            so that every sample has parameters of its own.
        made_by_step: Names of the policy parameters that are made of an observation [*step, obs],
            one for each step; none unless `reads_observation`.
    """

    reads_observation: ClassVar[bool] = False

    @property
    def made_by_step(self) -> frozenset[str]:  # noqa: D102 -- with the attributes
        return frozenset()

    def __init__(self, mlp: MLP, agents: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.agents = agents

    @abstractmethod
    def forward(self, agents: Int[Tensor, " agent"]) -> Theta:
        """Make the policy parameters of some agents.

        Args:
            agents: Numbers of the agents.

        Returns:
            Tensors [agent, ...] by name, or [1, ...] where all agents share the tensor.
        """

    @abstractmethod
    def representation(self) -> tuple[Float[Tensor, "agent feature"], str]:
        """What tells the agents apart: their embeddings, or what stands in for them.

        Returns:
            One row for each agent, and a sentence that says what the rows are.
        """

    def all_agents(self) -> Theta:
        """Make every agent's policy parameters.

        Returns:
            As `forward`, for all agents in order.
        """
        theta: Theta = self(torch.arange(self.agents))
        return theta

    @abstractmethod
    def coupling_forms(self) -> CouplingForms:
        """Closed form of how far the scheme ties agents together.

        Returns:
            Exact traces and norms of J_i J_k^T, with respect to the parameters that require a
            gradient.
        """

    @abstractmethod
    def pull_back(self, z: Theta, agents: Int[Tensor, " row"]) -> dict[str, PerSample]:
        """Apply J_i^T, as `gradlab.contributions.PullsBack` says.

        Args:
            z: Gradients [row, ...] by policy parameter.
            agents: The agent of each row.

        Returns:
            The products by trained parameter.
        """

    @abstractmethod
    def jacobian(self) -> str:
        """Say in words what J_i is.

        Returns:
            A clause without a full stop.
        """

    def adapt(self, samples: Mapping[str, Tensor]) -> None:
        """Set, between updates, what is not trained but hangs on what agents see.

        Args:
            samples: What the last update trained on, by name, as `MLP.read` takes it.
        """

    def regularise(self, loss: float) -> None:
        """Add the gradient of what is minimised beside the samples' losses, if there is any.

        A function of what is trained alone: no agent's samples have a part in it.

        Args:
            loss: Mean of the samples' losses, whose gradient is there already.
        """

    def renew(self, before: int, after: int, planned: int, random: RandomGenerator) -> None:
        """Draw anew, between updates, what is due to be.

        Args:
            before: Frames done before the last update.
            after: Frames done with it.
            planned: Frames of the whole training.
            random: Source of randomness.
        """

    def account(self) -> dict[str, Quantity]:
        """Say how what is particular to the scheme stands.

        Returns:
            Quantities by name, to be recorded of the actor after every update.
        """
        return {}

    def policy_for(
        self,
        observation: Float[Tensor, "agent sample *step obs"],  # noqa: ARG002
    ) -> Theta:
        """Make the parameters with which all agents act on what they see.

        Args:
            observation: What they see.

        Returns:
            As `forward`, for all agents in order; [agent, sample, *step, ...] if
            `reads_observation`.
        """
        return self.all_agents()

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Clip each separately trained part's gradient by its own norm, in place.

        Args:
            max_norm: The largest norm left.

        Returns:
            The norm before: a scalar, or one for each agent if they are trained apart.
        """
        return nn.utils.clip_grad_norm_(self.parameters(), max_norm)

    def layer_of(self, parameter: str) -> str:
        """Name the policy layer that a trained parameter belongs to.

        Args:
            parameter: Its name in `named_parameters`.

        Returns:
            A layer's name.
        """
        return parameter.partition("/")[0]


def initial_theta(mlp: MLP, random: RandomGenerator, *, id_columns: int = 0) -> Theta:
    """Draw a network's parameters as PPO implementations do.

    Orthogonal weights with the layers' gains, biases and log standard deviations 0.

    Args:
        mlp: The network's form.
        random: Source of randomness.
        id_columns: Number of further inputs to the layer that reads the observation.

    Returns:
        Tensors by name, without an agent axis; the first weight has the further columns last.
    """
    theta = {} if mlp.memory is None else initial_memory(mlp.memory, random, id_columns=id_columns)
    if mlp.memory is not None:
        id_columns = 0  # the memory reads them
    for position, (layer, (outputs, inputs)) in enumerate(mlp.layers.items()):
        weight = torch.empty(outputs, inputs + (id_columns if position == 0 else 0))
        theta[f"{layer}.weight"] = nn.init.orthogonal_(weight, mlp.gain(layer), generator=random)
        theta[f"{layer}.bias"] = torch.zeros(outputs)
    if mlp.log_std_size:
        theta[LOG_STD] = torch.zeros(mlp.log_std_size)
    return theta

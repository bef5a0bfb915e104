r"""Low-rank adapters: one policy for all agents, with a small change of each layer for each agent.

A layer's weight is :math:`W + U_i V_i` (Hu et al., "LoRA", ICLR 2022, section 4.1), with U_i
[outputs, rank] and V_i [rank, inputs] of agent i alone.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from gradlab.engine.per_sample import Lookup, PerSample
from gradlab.metrics.coupling_forms import CouplingForms
from trainers.config import AdapterConfig
from trainers.generators.shared import FuPS
from trainers.networks import MLP, Theta


class Adapters(FuPS):
    """theta_i = psi with W + U_i V_i in place of each layer's weight W.

    Biases, the memory of a recurrent network, and `log_std` unless told otherwise, are those of all
    agents. V_i starts with variance 1 / inputs and U_i so that U_i V_i is as long as W on average:
    agents that start alike would stay at a saddle where they have to differ.

    Attributes:
        left: U_i of all agents [agent, outputs, rank] by layer.
        right: V_i of all agents [agent, rank, inputs] by layer.
    """

    def __init__(
        self,
        mlp: MLP,
        agents: int,
        random: RandomGenerator,
        config: AdapterConfig,
        *,
        own_log_std: bool = False,
    ) -> None:
        """Draw the initial parameters.

        Args:
            mlp: The network.
            agents: Number of agents.
            random: Source of randomness.
            config: The rank.
            own_log_std: Whether each agent has its own `log_std`.
        """
        super().__init__(mlp, agents, random, own_log_std=own_log_std)
        self.left, self.right = nn.ParameterDict(), nn.ParameterDict()
        for layer, (outputs, inputs) in mlp.layers.items():
            rank = _rank(config, outputs, inputs)
            right = torch.empty(agents, rank, inputs)
            right.normal_(0, math.sqrt(1 / inputs), generator=random)
            squared_length = mlp.gain(layer) ** 2 * min(outputs, inputs)  # of W
            left = torch.empty(agents, outputs, rank)
            left.normal_(0, math.sqrt(squared_length / (outputs * rank)), generator=random)
            self.left[layer] = nn.Parameter(left)
            self.right[layer] = nn.Parameter(right)

    @classmethod
    def size(cls, mlp: MLP, agents: int, config: AdapterConfig, own_log_std: bool = False) -> int:
        """Number of trained parameters.

        Args:
            mlp: The network.
            agents: Number of agents.
            config: The rank.
            own_log_std: As for the constructor.

        Returns:
            P + N sum_l r_l (a_l + b_l), and the log standard deviations.
        """
        own = sum(
            _rank(config, outputs, inputs) * (outputs + inputs)
            for outputs, inputs in mlp.layers.values()
        )
        return cls.count(mlp, agents, own_log_std) + agents * own

    def forward(self, agents: Int[Tensor, " agent"]) -> Theta:
        """See `Generator.forward`."""
        theta = super().forward(agents)
        for layer, left in self.left.items():
            change = left[agents] @ self.right[layer][agents]
            theta[f"{layer}.weight"] = theta[f"{layer}.weight"] + change
        return theta

    @torch.no_grad()
    def pull_back(self, z: Theta, agents: Int[Tensor, " row"]) -> dict[str, PerSample]:
        """See `Generator.pull_back`: to W as it is, to U_i times V_i^T, to V_i times U_i^T."""
        found = super().pull_back(z, agents)
        for layer, left in self.left.items():
            rows, right = z[f"{layer}.weight"], self.right[layer]
            for name, table, own in (
                ("left", left, rows @ right[agents].mT),
                ("right", right, left[agents].mT @ rows),
            ):
                found[f"{name}.{layer}"] = Lookup(
                    agents[None, :, None], own[None, :, None], table.shape
                )
        return found

    def representation(self) -> tuple[Float[Tensor, "agent feature"], str]:
        """See `Generator.representation`."""
        changes = [(left @ self.right[layer]).flatten(1) for layer, left in self.left.items()]
        return torch.cat(changes, dim=1).detach(), "each agent's own change U_i V_i of the weights"

    @torch.no_grad()
    def coupling_forms(self) -> CouplingForms:
        r"""See `Generator.coupling_forms`.

        Two agents meet in W, where :math:`J_i J_k^\top` is the identity. An agent's own block has
        :math:`I + I \otimes V^\top V + U U^\top \otimes I`, with outputs before inputs.
        """
        forms = super().coupling_forms()
        trace, squared = forms.trace.clone(), forms.squared.clone()
        agents = range(self.agents)
        for layer, left in self.left.items():
            place = forms.names.index(f"{layer}.weight")
            right = self.right[layer]
            shared = float(self.theta[f"{layer}/weight"].requires_grad)
            outputs, inputs = left.shape[1], right.shape[2]
            # V^T V and U U^T, by way of the smaller V V^T and U^T U; J of U has V in it, and the
            # other way round
            v, u = right.double() * left.requires_grad, left.double() * right.requires_grad
            of_right, of_left = v @ v.mT, u.mT @ u
            t_right, t_left = (m.diagonal(dim1=1, dim2=2).sum(1) for m in (of_right, of_left))
            own = outputs * t_right + inputs * t_left
            trace[place, agents, agents] += own
            squared[place, place, agents, agents] += (
                2 * shared * own
                + outputs * of_right.square().sum((1, 2))
                + inputs * of_left.square().sum((1, 2))
                + 2 * t_right * t_left
            )
        return CouplingForms(names=forms.names, head=trace, trace=trace, squared=squared)

    def layer_of(self, parameter: str) -> str:
        """See `Generator.layer_of`."""
        own = parameter.removeprefix("left.").removeprefix("right.")
        return super().layer_of(own)

    def jacobian(self) -> str:
        """See `Generator.jacobian`."""
        return f"{super().jacobian()}; of a weight also the agent's own dU_i V_i + U_i dV_i"


def _rank(config: AdapterConfig, outputs: int, inputs: int) -> int:
    """A layer's rank: none can have more than it has inputs or outputs."""
    return min(config.rank, outputs, inputs)

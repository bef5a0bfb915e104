"""Full parameter sharing: one network for all agents, with or without their ID in its input."""

import torch
from jaxtyping import Float, Int
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from trainers.generators.generator import Generator, initial_theta
from trainers.networks import MLP, Theta


class FuPS(Generator):
    """theta_i = psi: all agents share everything."""

    def __init__(self, mlp: MLP, agents: int, random: RandomGenerator) -> None:
        super().__init__(mlp, agents)
        self.theta = _register(initial_theta(mlp, random))

    def forward(self, agents: Int[Tensor, " agent"]) -> Theta:  # noqa: ARG002
        """See `Generator.forward`."""
        return {name.replace("/", "."): tensor[None] for name, tensor in self.theta.items()}

    def representation(self) -> tuple[Float[Tensor, "agent feature"], str]:
        """See `Generator.representation`."""
        flat = torch.cat([tensor.detach().flatten() for tensor in self.theta.values()])
        return flat.expand(self.agents, -1), "the shared weights, the same for every agent"

    def coupling_traces(self) -> dict[str, Float[Tensor, "agent agent_other"]]:
        """See `Generator.coupling_traces`."""
        return _shared_traces(self.theta, self.agents)

    def layer_of(self, parameter: str) -> str:
        """See `Generator.layer_of`."""
        return parameter.removeprefix("theta.").partition("/")[0]


class FuPSID(Generator):
    """One network that reads [observation, one-hot ID].

    The ID columns of the first weight only ever add agent i's column to the first bias, so as a
    generator: theta_i = (W, b + W_id e_i, the rest of psi).
    """

    def __init__(self, mlp: MLP, agents: int, random: RandomGenerator) -> None:
        super().__init__(mlp, agents)
        theta = initial_theta(mlp, random, id_columns=agents)
        self._first = next(iter(mlp.layers))
        weight = theta[f"{self._first}.weight"]
        theta[f"{self._first}.weight"] = weight[:, :-agents].clone()
        self.theta = _register(theta)
        self.id_columns = nn.Parameter(weight[:, -agents:].mT.clone())  # [agent, hidden]

    def forward(self, agents: Int[Tensor, " agent"]) -> Theta:
        """See `Generator.forward`."""
        theta = {name.replace("/", "."): tensor[None] for name, tensor in self.theta.items()}
        bias = f"{self._first}.bias"
        return theta | {bias: theta[bias] + self.id_columns[agents]}

    def representation(self) -> tuple[Float[Tensor, "agent feature"], str]:
        """See `Generator.representation`."""
        return self.id_columns.detach(), "each agent's ID column of the first layer"

    def coupling_traces(self) -> dict[str, Float[Tensor, "agent agent_other"]]:
        """See `Generator.coupling_traces`."""
        traces = _shared_traces(self.theta, self.agents)
        bias = f"{self._first}.bias"
        own = torch.eye(self.agents, dtype=torch.float64) * self.id_columns.shape[1]
        return traces | {bias: traces[bias] + own}

    def layer_of(self, parameter: str) -> str:
        """See `Generator.layer_of`."""
        if parameter == "id_columns":
            return self._first
        return parameter.removeprefix("theta.").partition("/")[0]


def _shared_traces(theta: nn.ParameterDict, agents: int) -> dict[str, Tensor]:
    """J is the identity for every agent: the trace is the number of parameters."""
    everyone = torch.ones(agents, agents, dtype=torch.float64)
    return {name.replace("/", "."): everyone * tensor.numel() for name, tensor in theta.items()}


def _register(theta: Theta) -> nn.ParameterDict:
    """Parameters by name; "/" stands for the dot, which torch reserves for submodules."""
    return nn.ParameterDict([(n.replace(".", "/"), nn.Parameter(t)) for n, t in theta.items()])

"""Full parameter sharing: one network for all agents, with or without their ID in its input."""

import torch
from jaxtyping import Float, Int
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from gradlab.engine.per_sample import Lookup, PerSample, Rows
from gradlab.metrics.coupling_forms import CouplingForms
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

    def pull_back(self, z: Theta, agents: Int[Tensor, " row"]) -> dict[str, PerSample]:  # noqa: ARG002
        """See `Generator.pull_back`."""
        return _pulled(z)

    def coupling_forms(self) -> CouplingForms:
        """See `Generator.coupling_forms`: J is the identity for every agent."""
        return CouplingForms.multiples_of_identity(
            _sizes(self.theta), _everyone(self.theta, self.agents)
        )

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

    def pull_back(self, z: Theta, agents: Int[Tensor, " row"]) -> dict[str, PerSample]:
        """See `Generator.pull_back`."""
        own = z[f"{self._first}.bias"]
        columns = Lookup(agents[None, :, None], own[None, :, None], self.id_columns.shape)
        return _pulled(z) | {"id_columns": columns}

    def coupling_forms(self) -> CouplingForms:
        """See `Generator.coupling_forms`: only the first bias is in part an agent's own."""
        factors = _everyone(self.theta, self.agents)
        own = torch.eye(self.agents, dtype=torch.float64) * self.id_columns.requires_grad
        factors[f"{self._first}.bias"] += own
        return CouplingForms.multiples_of_identity(_sizes(self.theta), factors)

    def layer_of(self, parameter: str) -> str:
        """See `Generator.layer_of`."""
        if parameter == "id_columns":
            return self._first
        return parameter.removeprefix("theta.").partition("/")[0]


def _pulled(z: Theta) -> dict[str, PerSample]:
    return {f"theta.{name.replace('.', '/')}": Rows(rows[None]) for name, rows in z.items()}


def _sizes(theta: nn.ParameterDict) -> dict[str, int]:
    return {name.replace("/", "."): tensor.numel() for name, tensor in theta.items()}


def _everyone(theta: nn.ParameterDict, agents: int) -> dict[str, Tensor]:
    """1 for every pair of agents, where the parameter is trained."""
    ones = torch.ones(agents, agents, dtype=torch.float64)
    return {n.replace("/", "."): ones * tensor.requires_grad for n, tensor in theta.items()}


def _register(theta: Theta) -> nn.ParameterDict:
    """Parameters by name; "/" stands for the dot, which torch reserves for submodules."""
    return nn.ParameterDict([(n.replace(".", "/"), nn.Parameter(t)) for n, t in theta.items()])

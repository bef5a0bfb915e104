"""Full parameter sharing: one network for all agents, with or without their ID in its input."""

import torch
from jaxtyping import Float, Int
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from gradlab.engine.per_sample import Lookup, PerSample
from gradlab.metrics.coupling_forms import CouplingForms
from trainers.generators.generator import LOG_STD, initial_theta
from trainers.generators.slices import Slices
from trainers.networks import MLP, Theta


class FuPS(Slices):
    """theta_i = psi: all agents share everything."""

    def __init__(
        self, mlp: MLP, agents: int, random: RandomGenerator, *, own_log_std: bool = False
    ) -> None:
        """Draw the initial parameters.

        Args:
            mlp: The network.
            agents: Number of agents.
            random: Source of randomness.
            own_log_std: Whether each agent has its own `log_std` all the same.
        """
        theta, own = _log_std(initial_theta(mlp, random), agents, own_log_std)
        super().__init__(mlp, agents, theta, own)

    @classmethod
    def count(cls, mlp: MLP, agents: int, own_log_std: bool = False) -> int:
        """Number of trained parameters.

        Args:
            mlp: The network.
            agents: Number of agents.
            own_log_std: As for the constructor.

        Returns:
            P, and the log standard deviations.
        """
        return mlp.size + mlp.log_std_size * (agents if own_log_std else 1)

    def representation(self) -> tuple[Float[Tensor, "agent feature"], str]:
        """See `Generator.representation`."""
        theta = self.all_agents()
        rows = torch.cat(
            [t.detach().flatten(1).expand(self.agents, -1) for t in theta.values()], dim=1
        )
        if self.own:
            return rows, f"the shared weights and each agent's own {LOG_STD}"
        return rows, "the shared weights, the same for every agent"


class FuPSID(Slices):
    """One network that reads [observation, one-hot ID], or the ID alone.

    The ID columns of the first weight only ever add agent i's column to the first bias, so as a
    generator: theta_i = (W, b + W_id e_i, the rest of psi). With the observation withheld, W is a
    constant 0 instead of trained.

    Attributes:
        id_columns: The ID columns.
        observed: Whether the network reads the observation.
    """

    def __init__(
        self,
        mlp: MLP,
        agents: int,
        random: RandomGenerator,
        *,
        own_log_std: bool = False,
        observed: bool = True,
    ) -> None:
        """Draw the initial parameters.

        Args:
            mlp: The network.
            agents: Number of agents.
            random: Source of randomness.
            own_log_std: Whether each agent has its own `log_std`.
            observed: Whether the network reads the observation as well as the ID.
        """
        read = mlp if observed else mlp.without_observation()
        theta, own = _log_std(initial_theta(read, random, id_columns=agents), agents, own_log_std)
        first = mlp.first
        weight = theta.pop(f"{first}.weight")
        if observed:
            theta = {f"{first}.weight": weight[:, :-agents].clone()} | theta
        super().__init__(mlp, agents, theta, own)
        self.observed = observed
        self._first = first
        self.id_columns = nn.Parameter(weight[:, -agents:].mT.contiguous())  # [agent, hidden]
        if not observed:
            nothing = torch.zeros(mlp.outputs_of_first, mlp.observation_size)
            self.register_buffer("_withheld", nothing, persistent=False)

    @classmethod
    def count(
        cls, mlp: MLP, agents: int, own_log_std: bool = False, *, observed: bool = True
    ) -> int:
        """Number of trained parameters.

        Args:
            mlp: The network.
            agents: Number of agents.
            own_log_std: As for the constructor.
            observed: As for the constructor.

        Returns:
            P + N b_1, less a_1 b_1 if the observation is withheld, and the log standard deviations.
        """
        outputs = mlp.outputs_of_first
        columns = agents * outputs - (0 if observed else mlp.observation_size * outputs)
        return mlp.size + columns + mlp.log_std_size * (agents if own_log_std else 1)

    def forward(self, agents: Int[Tensor, " agent"]) -> Theta:
        """See `Generator.forward`."""
        theta = super().forward(agents)
        bias = f"{self._first}.bias"
        theta[bias] = theta[bias] + self.id_columns[agents]
        if self.observed:
            return theta
        withheld = self.get_buffer("_withheld")
        return {f"{self._first}.weight": withheld[None]} | theta

    def representation(self) -> tuple[Float[Tensor, "agent feature"], str]:
        """See `Generator.representation`."""
        return self.id_columns.detach(), "each agent's ID column of the first layer"

    def pull_back(self, z: Theta, agents: Int[Tensor, " row"]) -> dict[str, PerSample]:
        """See `Generator.pull_back`; no trained parameter makes a withheld first weight."""
        own = z[f"{self._first}.bias"]
        columns = Lookup(agents[None, :, None], own[None, :, None], self.id_columns.shape)
        return super().pull_back(z, agents) | {"id_columns": columns}

    def coupling_forms(self) -> CouplingForms:
        """See `Generator.coupling_forms`: the first bias is in part an agent's own."""
        sizes, factors = self._factors()
        own = torch.eye(self.agents, dtype=torch.float64) * self.id_columns.requires_grad
        factors[f"{self._first}.bias"] = factors[f"{self._first}.bias"] + own
        if not self.observed:
            weight = f"{self._first}.weight"
            sizes = {weight: self.get_buffer("_withheld").numel()} | sizes
            factors = {weight: torch.zeros_like(own)} | factors
        return CouplingForms.multiples_of_identity(sizes, factors)

    def layer_of(self, parameter: str) -> str:
        """See `Generator.layer_of`."""
        return self._first if parameter == "id_columns" else super().layer_of(parameter)

    def jacobian(self) -> str:
        """See `Generator.jacobian`."""
        said = f"{super().jacobian()}; {self._first}.bias also selects the agent's own ID column"
        return said if self.observed else f"{said}; 0 for {self._first}.weight, which is fixed at 0"


def _log_std(theta: Theta, agents: int, own: bool) -> tuple[Theta, set[str]]:
    """Give each agent a `log_std` of its own, if wanted and there is one."""
    if not (own and LOG_STD in theta):
        return theta, set()
    return theta | {LOG_STD: theta[LOG_STD].repeat(agents, 1)}, {LOG_STD}

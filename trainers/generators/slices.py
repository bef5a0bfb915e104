"""Sharing schemes that train the policy parameters as they are: for all agents, or for each."""

from collections.abc import Collection

import torch
from jaxtyping import Int
from torch import Tensor, nn

from gradlab.engine.per_sample import Lookup, PerSample, Rows
from gradlab.metrics.coupling_forms import CouplingForms
from trainers.generators.generator import Generator
from trainers.networks import MLP, Theta


class Slices(Generator):
    """theta_i selects from psi: of each policy parameter the one of all agents, or one of several.

    Attributes:
        theta: Trained tensors by policy parameter, "/" for the dot, which torch reserves for
            submodules; [slice, ...] of what not all agents share.
        own: Names of the policy parameters that each agent has of its own.
    """

    def __init__(self, mlp: MLP, agents: int, theta: Theta, own: Collection[str]) -> None:
        """Train from initial values.

        Args:
            mlp: The network.
            agents: Number of agents.
            theta: Initial values by policy parameter; with a leading axis where agents select.
            own: Names of the policy parameters that each agent has of its own.
        """
        super().__init__(mlp, agents)
        self.theta = nn.ParameterDict([(_of_psi(n), nn.Parameter(t)) for n, t in theta.items()])
        self.own = frozenset(own)

    def selected(self, name: str, agents: Int[Tensor, " agent"]) -> Int[Tensor, " agent"] | None:
        """Say which slice of a policy parameter agents have: their own, by number.

        Args:
            name: The policy parameter.
            agents: Numbers of the agents.

        Returns:
            Numbers of the slices; None if all agents share the parameter, which has none.
        """
        return agents if name in self.own else None

    def forward(self, agents: Int[Tensor, " agent"]) -> Theta:
        """See `Generator.forward`."""
        theta: Theta = {}
        for name, tensor in self._by_name().items():
            slices = self.selected(name, agents)
            theta[name] = tensor[None] if slices is None else tensor[slices]
        return theta

    def pull_back(self, z: Theta, agents: Int[Tensor, " row"]) -> dict[str, PerSample]:
        """See `Generator.pull_back`: a row goes to its agent's slice, or to that of all."""
        found: dict[str, PerSample] = {}
        for name, tensor in self._by_name().items():
            rows, slices = z[name], self.selected(name, agents)
            found[f"theta.{_of_psi(name)}"] = (
                Rows(rows[None])
                if slices is None
                else Lookup(slices[None, :, None], rows[None, :, None], tensor.shape)
            )
        return found

    def coupling_forms(self) -> CouplingForms:
        """See `Generator.coupling_forms`: J_i J_k^T is 1 in the same slice, 0 in different ones."""
        sizes, factors = self._factors()
        return CouplingForms.multiples_of_identity(sizes, factors)

    def layer_of(self, parameter: str) -> str:
        """See `Generator.layer_of`."""
        return parameter.removeprefix("theta.").partition("/")[0]

    def jacobian(self) -> str:
        """See `Generator.jacobian`."""
        shared = sorted(self._by_name().keys() - self.own)
        if not self.own:
            return "identity, the same for every agent"
        if len(self.own) < len(shared):
            own = ", ".join(sorted(self.own))
            return f"identity, the same for every agent, but selects the agent's own {own}"
        said = "selects the agent's own slice: J_i J_k^T = 0 for two agents"
        return f"{said}; identity for the shared {', '.join(shared)}" if shared else said

    def _by_name(self) -> Theta:
        return {name.replace("/", "."): tensor for name, tensor in self.theta.items()}

    def _factors(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        """Size of each policy parameter, and the multiples of the identity that its blocks are."""
        agents = torch.arange(self.agents)
        sizes: dict[str, int] = {}
        factors: dict[str, Tensor] = {}
        for name, tensor in self._by_name().items():
            slices = self.selected(name, agents)
            sizes[name] = tensor.numel() // (1 if slices is None else len(tensor))
            of = torch.zeros_like(agents) if slices is None else slices
            factors[name] = (of[:, None] == of).double() * tensor.requires_grad
        return sizes, factors


def _of_psi(name: str) -> str:
    return name.replace(".", "/")

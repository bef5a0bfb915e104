"""No parameter sharing: every agent has a network of its own."""

import torch
from jaxtyping import Float, Int
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from gradlab.engine.per_sample import Lookup, PerSample
from gradlab.metrics.coupling_forms import CouplingForms
from trainers.generators.generator import Generator, initial_theta
from trainers.networks import MLP, Theta


class NoPS(Generator):
    """theta_i = psi_i: a slice of the trained parameters for each agent."""

    def __init__(self, mlp: MLP, agents: int, random: RandomGenerator) -> None:
        super().__init__(mlp, agents)
        own = [initial_theta(mlp, random) for _ in range(agents)]
        self.theta = nn.ParameterDict([
            (name.replace(".", "/"), nn.Parameter(torch.stack([theta[name] for theta in own])))
            for name in own[0]
        ])

    def forward(self, agents: Int[Tensor, " agent"]) -> Theta:
        """See `Generator.forward`."""
        return {name.replace("/", "."): tensor[agents] for name, tensor in self.theta.items()}

    def representation(self) -> tuple[Float[Tensor, "agent feature"], str]:
        """See `Generator.representation`."""
        rows = torch.cat([tensor.detach().flatten(1) for tensor in self.theta.values()], dim=1)
        return rows, "each agent's own weights"

    def pull_back(self, z: Theta, agents: Int[Tensor, " row"]) -> dict[str, PerSample]:
        """See `Generator.pull_back`: each row goes to its agent's slice."""
        found: dict[str, PerSample] = {}
        for name, rows in z.items():
            of_psi = name.replace(".", "/")
            shape = self.theta[of_psi].shape
            found[f"theta.{of_psi}"] = Lookup(agents[None, :, None], rows[None, :, None], shape)
        return found

    def coupling_forms(self) -> CouplingForms:
        """See `Generator.coupling_forms`: J_i J_k^T = 0 for two agents, 1 for one."""
        own = torch.eye(self.agents, dtype=torch.float64)
        return CouplingForms.multiples_of_identity(
            {name.replace("/", "."): t[0].numel() for name, t in self.theta.items()},
            {name.replace("/", "."): own * t.requires_grad for name, t in self.theta.items()},
        )

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Clip each agent's gradient by its own norm, as if it were trained alone.

        The loss is a mean over all agents' samples, 1 / agents of an agent's own mean.

        Args:
            max_norm: The largest norm left of the gradient of an agent's own mean loss.

        Returns:
            Each agent's norm before.
        """
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norms: Tensor = self.agents * torch.cat([g.flatten(1) for g in gradients], dim=1).norm(
            dim=1
        )
        scale = (max_norm / (norms + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))
        return norms

    def layer_of(self, parameter: str) -> str:
        """See `Generator.layer_of`."""
        return parameter.removeprefix("theta.").partition("/")[0]

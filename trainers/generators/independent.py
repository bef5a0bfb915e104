"""No parameter sharing: a network for each agent."""

import torch
from jaxtyping import Float
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from trainers.generators.generator import LOG_STD, initial_theta
from trainers.generators.slices import Slices
from trainers.networks import MLP


class NoPS(Slices):
    """theta_i = psi_i: a slice of the trained parameters for each agent."""

    def __init__(
        self, mlp: MLP, agents: int, random: RandomGenerator, *, own_log_std: bool = True
    ) -> None:
        """Draw the initial parameters.

        Args:
            mlp: The network.
            agents: Number of agents.
            random: Source of randomness.
            own_log_std: Whether each agent has its own `log_std`, too, or all share one.
        """
        drawn = [initial_theta(mlp, random) for _ in range(agents)]
        own = {name for name in drawn[0] if own_log_std or name != LOG_STD}
        theta = {
            name: torch.stack([of_agent[name] for of_agent in drawn]) if name in own else tensor
            for name, tensor in drawn[0].items()
        }
        super().__init__(mlp, agents, theta, own)

    @classmethod
    def count(cls, mlp: MLP, agents: int, own_log_std: bool = True) -> int:
        """Number of trained parameters.

        Args:
            mlp: The network.
            agents: Number of agents.
            own_log_std: As for the constructor.

        Returns:
            N P, and the log standard deviations.
        """
        return agents * mlp.size + mlp.log_std_size * (agents if own_log_std else 1)

    def representation(self) -> tuple[Float[Tensor, "agent feature"], str]:
        """See `Generator.representation`."""
        own = [tensor for name, tensor in self._by_name().items() if name in self.own]
        rows = torch.cat([tensor.detach().flatten(1) for tensor in own], dim=1)
        return rows, "each agent's own weights"

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Clip each agent's gradient by its own norm, as if it were trained alone.

        The loss is a mean over all agents' samples, 1 / agents of an agent's own mean. A `log_std`
        that agents share is clipped by its own norm.

        Args:
            max_norm: The largest norm left of the gradient of an agent's own mean loss.

        Returns:
            Each agent's norm before.
        """
        named = self._by_name()
        shared = [parameter for name, parameter in named.items() if name not in self.own]
        nn.utils.clip_grad_norm_(shared, max_norm)
        gradients = [p.grad for n, p in named.items() if n in self.own and p.grad is not None]
        norms: Tensor = self.agents * torch.cat([g.flatten(1) for g in gradients], dim=1).norm(
            dim=1
        )
        scale = (max_norm / (norms + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))
        return norms


class AgentSlice(NoPS):
    """One agent's network of `NoPS` as a scheme of one agent: whoever trains it trains that.

    The parameters lie in the memory of those that they are a slice of, which must stay where it is.
    """

    def __init__(self, whole: NoPS, agent: int) -> None:
        """Take hold of the slice.

        Args:
            whole: All agents' networks; nothing of them is shared.
            agent: Whose.
        """
        theta = {n: t.detach()[agent : agent + 1] for n, t in whole._by_name().items()}
        Slices.__init__(self, whole.mlp, 1, theta, whole.own)

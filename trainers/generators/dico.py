r"""DiCo: a policy for all agents, and each agent's deviation from it, scaled to a wanted diversity.

Bettini, Kortvelesy & Prorok, "Controlling behavioral diversity in multi-agent reinforcement
learning" (ICML 2024), with the shared :math:`\pi_h` and the deviations :math:`\pi_{h,i}`:

.. math:: \pi_i(o) = \pi_h(o) + \frac{SND_{wanted}}{\widehat{SND}} \pi_{h,i}(o)
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.checks import check
from gradlab.engine.per_sample import PerSample
from gradlab.metrics.coupling_forms import CouplingForms
from trainers.config import DiCoConfig
from trainers.generators.generator import LOG_STD, initial_theta
from trainers.generators.slices import Slices
from trainers.networks import DEVIATION, MLP, Deviating, Theta

OBSERVATIONS = 4096
"""Observations on which the deviations' diversity is measured, at most."""

_SCALED = (f"{DEVIATION}head.weight", f"{DEVIATION}head.bias")


class DiCo(Slices):
    """theta_i selects the shared network and agent i's own deviation, whose last layer is scaled.

    The scale is not trained: between updates it is set so that the policies' diversity on what was
    seen is the wanted one (`adapt`), and in an update it is a constant.

    Attributes:
        ratio: The scale: wanted diversity over that of the deviations as they are; a buffer.
        snd: The wanted diversity, None if it is left as it is.
    """

    ratio: Tensor

    def __init__(
        self,
        mlp: MLP,
        agents: int,
        random: RandomGenerator,
        config: DiCoConfig,
        *,
        own_log_std: bool = False,
    ) -> None:
        """Draw the initial parameters.

        Args:
            mlp: The network; each agent's deviation has the same form.
            agents: Number of agents.
            random: Source of randomness.
            config: The wanted diversity.
            own_log_std: Whether each agent has its own `log_std`.

        Raises:
            UsageError: If so many agents can't be that different.
        """
        if config.snd:
            _check_reachable(config.snd, agents, mlp)
        form = Deviating.of(mlp)
        drawn = [initial_theta(form, random) for _ in range(agents)]
        own = {n for n in drawn[0] if n.startswith(DEVIATION) or (own_log_std and n == LOG_STD)}
        theta = {
            name: torch.stack([of_agent[name] for of_agent in drawn]) if name in own else tensor
            for name, tensor in drawn[0].items()
        }
        super().__init__(form, agents, theta, own)
        self.snd = config.snd
        self.register_buffer("ratio", torch.tensor(0.0 if self.snd == 0 else 1.0))

    @classmethod
    def count(cls, mlp: MLP, agents: int, own_log_std: bool = False) -> int:
        """Number of trained parameters.

        Args:
            mlp: The network.
            agents: Number of agents.
            own_log_std: As for the constructor.

        Returns:
            P for all agents and P without a memory for each, and the log standard deviations.
        """
        own = mlp.log_std_size * (agents if own_log_std else 1)
        return mlp.size + agents * mlp.size_of_layers + own

    def forward(self, agents: Int[Tensor, " agent"]) -> Theta:
        """See `Generator.forward`."""
        return self._scaled(super().forward(agents))

    @torch.no_grad()
    def adapt(self, samples: Mapping[str, Tensor]) -> None:
        r"""See `Generator.adapt`: scale the deviations to the wanted diversity.

        :math:`\widehat{SND}` is the mean, over pairs of agents and observations of all agents, of
        the distance between the deviations' outputs. Deviations that are all the same can't be
        scaled apart, and keep their scale.
        """
        if not self.snd:
            return
        theta = super().forward(torch.arange(self.agents))
        read = self.mlp.read(theta, samples)
        active = samples.get("active")
        rows = read.flatten(0, -2) if active is None else read[active]
        if not len(rows):
            return
        rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), OBSERVATIONS)).long()]
        made = self.mlp.along(self.mlp.paths[1], theta, rows.expand(self.agents, *rows.shape))
        distances = torch.cdist(*2 * (made.transpose(0, 1).double(),))
        measured = distances.mean(0).sum() / (self.agents * (self.agents - 1))
        if measured > 0:
            self.ratio.copy_(self.snd / measured)

    def pull_back(self, z: Theta, agents: Int[Tensor, " row"]) -> dict[str, PerSample]:
        """See `Generator.pull_back`."""
        return super().pull_back(self._scaled(z), agents)

    def representation(self) -> tuple[Float[Tensor, "agent feature"], str]:
        """See `Generator.representation`."""
        theta = self.all_agents()
        own = [theta[name].detach().flatten(1) for name in theta if name in self.own]
        return torch.cat(own, dim=1), "each agent's own deviation from the shared policy, scaled"

    def coupling_forms(self) -> CouplingForms:
        """See `Generator.coupling_forms`: of a scaled layer the square of the scale."""
        sizes, factors = self._factors()
        squared = self.ratio.double().square()
        for name in _SCALED:
            factors[name] = factors[name] * squared
        return CouplingForms.multiples_of_identity(sizes, factors)

    def jacobian(self) -> str:
        """See `Generator.jacobian`."""
        said = "identity for the shared policy; selects the agent's own deviation from it"
        if self.snd is not None:
            said += f", its last layer scaled to SND {self.snd:g}"
        return f"{said}; selects the agent's own log_std" if LOG_STD in self.own else said

    def _scaled(self, theta: Theta) -> Theta:
        return theta | {name: self.ratio * theta[name] for name in _SCALED}


def _check_reachable(snd: float, agents: int, mlp: MLP) -> None:
    """Raise unless so many agents can differ so much in mean.

    Means of continuous actions lie in a range from -1 to 1 where they have an effect. Squared
    distances of N points there add up to at most floor(N^2 / 4) times 4 in each dimension, and a
    mean of distances is at most the root of that of their squares.
    """
    check(agents >= 2, "dico.snd", f"be 0 or left out with {agents} agent: it has no pair", snd)
    if mlp.log_std_size:
        pairs = agents * (agents - 1) / 2
        most = math.sqrt(4 * mlp.log_std_size * (agents**2 // 4) / pairs)
        rule = (
            f"be at most {most:.3f}: {agents} agents with {mlp.log_std_size} action components "
            "from -1 to 1 can't differ more"
        )
        check(snd <= most, "dico.snd", rule, snd)

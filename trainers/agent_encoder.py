r"""What tells agents apart in what they go through: a variational autoencoder of their numbers.

Christianos et al., "Scaling multi-agent reinforcement learning with selective parameter sharing"
(ICML 2021), section 3: an encoder reads the agent's one-hot number alone,
:math:`q(z | i) = N(\mu_i, \sigma_i^2)`; a decoder makes the next observation and the reward of z,
the observation and the action. Agents whose surroundings answer alike get the same z.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Generator as RandomGenerator
from torch import Tensor, nn

from trainers.config import SePSConfig
from trainers.generators.seps import LATENT

_HIDDEN = 64
_KL_WEIGHT = 1e-4  # the authors'


class AgentEncoder(nn.Module):
    """Encoder and decoder.

    Attributes:
        encoder: From one-hot numbers to means and logarithms of variances.
        decoder: From z, observation and action to what is to be reconstructed.
    """

    def __init__(self, agents: int, read: int, made: int, random: RandomGenerator) -> None:
        """Draw the initial parameters.

        Args:
            agents: Number of agents.
            read: Length of observation and action.
            made: Length of next observation and reward.
            random: Source of randomness.
        """
        super().__init__()
        self.encoder = nn.Sequential(
            _dense(agents, _HIDDEN, random), nn.ReLU(), _dense(_HIDDEN, 2 * LATENT, random)
        )
        self.decoder = nn.Sequential(
            _dense(LATENT + read, _HIDDEN, random),
            nn.ReLU(),
            _dense(_HIDDEN, _HIDDEN, random),
            nn.ReLU(),
            _dense(_HIDDEN, made, random),
        )

    def encode(self) -> tuple[Float[Tensor, "agent latent"], Float[Tensor, "agent latent"]]:
        """Encode every agent.

        Returns:
            Means, and logarithms of the variances.
        """
        first = self.encoder[0]
        assert isinstance(first, nn.Linear)
        mean, log_variance = self.encoder(torch.eye(first.in_features)).chunk(2, dim=1)
        return mean, log_variance


def encode_agents(
    experience: Mapping[str, Tensor], config: SePSConfig, random: RandomGenerator
) -> tuple[Float[Tensor, "agent latent"], float]:
    """Train an encoder of the agents on what they went through.

    The loss is the squared error of the reconstruction plus 1e-4 times the KL divergence from a
    standard normal z, both sums over components. Each component of what is read and reconstructed
    is standardised, so that none of them counts more for the unit that it is in. Where nothing
    follows a step, its reward alone is reconstructed.

    Args:
        experience: Tensors [frame, agent, ...] by name: `observation` and `following` [obs],
            `action` [action] (numbered ones one-hot), `reward`, `left`, whether nothing follows,
            and `active`, whether the agent acted at all.
        config: Epochs, batch size and step size.
        random: Source of the networks' first parameters and of all that is drawn.

    Returns:
        The agents' means, and the last epoch's mean loss of a sample.
    """
    there = experience["active"].flatten().nonzero()[:, 0]
    agents = experience["active"].shape[1]
    read = _standardised(there, experience["observation"], experience["action"])
    made = _standardised(there, experience["following"], experience["reward"][..., None])
    counts = torch.ones_like(made)
    counts[:, :-1] = (~experience["left"].flatten()[there, None]).to(made.dtype)
    numbers = there % agents
    network = AgentEncoder(agents, read.shape[1], made.shape[1], random)
    optimiser = torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=True)
    total = 0.0
    for _ in range(config.epochs):
        total = 0.0
        for batch in torch.randperm(len(there), generator=random).split(config.batch_size):
            number, seen, wanted, counted = (
                tensor.index_select(0, batch) for tensor in (numbers, read, made, counts)
            )
            mean, log_variance = (rows.index_select(0, number) for rows in network.encode())
            noise = torch.randn(mean.shape, generator=random)
            z = mean + (log_variance / 2).exp() * noise
            found = network.decoder(torch.cat([z, seen], dim=1))
            error = (counted * (found - wanted)).square().sum()
            divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
            loss = error + _KL_WEIGHT * divergence
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            total += loss.item()
    with torch.no_grad():
        return network.encode()[0], total / len(there)


def _standardised(there: Tensor, *parts: Tensor) -> Float[Tensor, "sample component"]:
    """Parts [frame, agent, ...] side by side, with mean 0 and deviation 1; 0 where it has none."""
    rows = torch.cat(parts, dim=-1).flatten(0, 1)[there]
    rows = rows - rows.mean(0)
    deviation = rows.square().mean(0).sqrt()
    return torch.where(deviation > 0, rows / deviation, 0.0)


def _dense(inputs: int, outputs: int, random: RandomGenerator) -> nn.Linear:
    """A dense layer as torch starts it, from a source of randomness of one's own."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    bound = 1 / math.sqrt(inputs)
    for parameter in (layer.weight, layer.bias):
        nn.init.uniform_(parameter, -bound, bound, generator=random)
    return layer

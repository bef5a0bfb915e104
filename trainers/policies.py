"""Action distributions on top of a network's output, as functions per sample or batched."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from trainers.envs.vector_env import Box, Discrete
from trainers.finite import check_finite
from trainers.networks import MLP, Theta, per_agent


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """A stochastic policy pi(action | observation; theta).

    Attributes:
        network: What the distribution's parameters come from.
        usual_entropy_coefficient: Weight of the entropy bonus that PPO usually has with it.
    """

    network: MLP
    usual_entropy_coefficient: ClassVar[float]

    @abstractmethod
    def sample(
        self, theta: Theta, observation: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw actions.

        Args:
            theta: Policy parameters with an agent axis.
            observation: Observations [agent, sample, obs].
            generator: Source of randomness.

        Returns:
            Actions and their log-probabilities [agent, sample].

        Raises:
            NotFinite: If the network's output, or an action, is not finite.
        """

    @abstractmethod
    def mode(self, theta: Theta, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Take the likeliest actions: the largest logit, or the mean.

        Args:
            theta: Policy parameters with an agent axis.
            observation: Observations [agent, sample, obs].

        Returns:
            Actions, of equal logits the first, and their log-probabilities [agent, sample].
        """

    @abstractmethod
    def evaluate(self, theta: Theta, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of given actions, and the entropy.

        Args:
            theta: Policy parameters, with or without an agent axis.
            observation: Observations [*batch, obs].
            action: Actions [*batch] or [*batch, action].

        Returns:
            Both, of shape [*batch], in nats.
        """

    @abstractmethod
    def distribution(self, theta: Theta, observation: Tensor) -> dict[str, Tensor]:
        """Parameters of the action distributions.

        Args:
            theta: Policy parameters with an agent axis.
            observation: Observations [agent, sample, obs].

        Returns:
            Tensors [agent, sample, ...] by name, as `gradlab.diversity` takes them: `logits` of
            numbered actions; or `mean` and `std` of what the environment is given before it is
            clipped to the action range, in the environment's units.
        """

    def to_env(self, action: Tensor) -> Tensor:
        """Turn an action into one that the environment takes.

        Args:
            action: What `sample` returned.

        Returns:
            The action for the environment.
        """
        return action


@dataclass(frozen=True, kw_only=True)
class Categorical(Policy):
    """A distribution over numbered actions; the network's outputs are logits."""

    usual_entropy_coefficient: ClassVar[float] = 0.01

    def sample(
        self, theta: Theta, observation: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw actions; see `Policy.sample`."""
        logits = self.network.forward(theta, observation)
        check_finite("the actor's output", logits, ("agent", "copy", "action"))
        log_p = logits.log_softmax(-1)
        flat = torch.multinomial(log_p.exp().flatten(0, -2), 1, generator=generator)
        action = flat.view(log_p.shape[:-1])
        return action, log_p.gather(-1, action[..., None]).squeeze(-1)

    def mode(self, theta: Theta, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Take the likeliest actions; see `Policy.mode`."""
        log_prob, action = self.network.forward(theta, observation).log_softmax(-1).max(-1)
        return action, log_prob

    def evaluate(self, theta: Theta, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy; see `Policy.evaluate`."""
        log_p = self.network.forward(theta, observation).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(-1, action[..., None]).squeeze(-1), entropy

    def distribution(self, theta: Theta, observation: Tensor) -> dict[str, Tensor]:
        """Logits of the actions; see `Policy.distribution`."""
        return {"logits": self.network.forward(theta, observation)}


@dataclass(frozen=True, kw_only=True)
class Gaussian(Policy):
    """A diagonal Gaussian with a state-independent log standard deviation.

    The network's outputs are means in units of half the action range from its middle; what the
    environment gets is clipped to its box, the log-probability is that of the unclipped action.
    """

    box: Box
    usual_entropy_coefficient: ClassVar[float] = 0.0

    def sample(
        self, theta: Theta, observation: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw actions; see `Policy.sample`."""
        mean = self.network.forward(theta, observation)
        log_std = per_agent(theta["log_std"], mean)
        noise = torch.randn(mean.shape, generator=generator)
        action = mean + log_std.exp() * noise
        check_finite("the actor's action", action, ("agent", "copy", "component"))
        return action, _log_density(noise, log_std)

    def mode(self, theta: Theta, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Take the means; see `Policy.mode`."""
        mean = self.network.forward(theta, observation)
        return mean, _log_density(torch.zeros_like(mean), per_agent(theta["log_std"], mean))

    def evaluate(self, theta: Theta, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy; see `Policy.evaluate`."""
        mean = self.network.forward(theta, observation)
        log_std = per_agent(theta["log_std"], mean)
        noise = (action - mean) * torch.exp(-log_std)
        entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
        return _log_density(noise, log_std), entropy

    def distribution(self, theta: Theta, observation: Tensor) -> dict[str, Tensor]:
        """Mean and standard deviation of the action; see `Policy.distribution`."""
        mean = self.network.forward(theta, observation)
        std = per_agent(theta["log_std"], mean).exp().expand_as(mean)
        return {"mean": self._middle + self._half * mean, "std": self._half * std}

    def to_env(self, action: Tensor) -> Tensor:
        """Scale to the action range and clip to it; see `Policy.to_env`."""
        return torch.clamp(self._middle + self._half * action, self.box.low, self.box.high)

    @property
    def _middle(self) -> Tensor:
        return (self.box.high + self.box.low) / 2

    @property
    def _half(self) -> Tensor:
        return (self.box.high - self.box.low) / 2


def _log_density(noise: Tensor, log_std: Tensor) -> Tensor:
    return (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def make_policy(
    observation_size: int,
    action_space: Discrete | Box,
    *,
    hidden: tuple[int, ...],
    activation: str,
) -> Policy:
    """Make the policy that fits an action space.

    Args:
        observation_size: Length of an observation.
        action_space: What the environment takes.
        hidden: Widths of the hidden layers.
        activation: "tanh" or "relu".

    Returns:
        The policy; its head starts with gain 0.01, so that first actions hardly depend on it.
    """
    discrete = isinstance(action_space, Discrete)
    outputs = action_space.n if isinstance(action_space, Discrete) else len(action_space.low)
    network = MLP(
        sizes=(observation_size, *hidden, outputs),
        activation=activation,
        head_gain=0.01,
        log_std_size=0 if discrete else outputs,
    )
    if isinstance(action_space, Box):
        return Gaussian(network=network, box=action_space)
    return Categorical(network=network)

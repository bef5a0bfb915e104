"""Action distributions on top of a network's output, as functions per sample or batched."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from trainers.envs.vector_env import Box, Discrete
from trainers.finite import check_finite
from trainers.networks import MLP, Theta, make_network, per_agent
from trainers.processes import Share


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """A stochastic policy pi(action | observation; theta).

    A `mask` is True for what an agent may do: numbered actions, whose others have probability 0; or
    components of an action that have an effect, whose others count for nothing in log-probability
    and entropy.

    Attributes:
        network: What the distribution's parameters come from.
        action_mask: What each agent can do at all [agent, action]; None: everything.
        usual_entropy_coefficient: Weight of the entropy bonus that PPO usually has with it.
    """

    network: MLP
    action_mask: Tensor | None = None
    usual_entropy_coefficient: ClassVar[float]

    @abstractmethod
    def sample(
        self,
        theta: Theta,
        observation: Tensor,
        generator: Generator,
        mask: Tensor | None = None,
        share: Share | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw actions.

        Args:
            theta: Policy parameters with an agent axis.
            observation: What the network's layers read [agent, sample, inputs], see `MLP.read`.
            generator: Source of randomness.
            mask: What may be done [agent, sample, action]; None: everything.
            share: Of which copies the samples are, one of each; None: of all.

        Returns:
            Actions and their log-probabilities [agent, sample].

        Raises:
            NotFinite: If the network's output, or an action, is not finite.
        """

    @abstractmethod
    def mode(
        self, theta: Theta, observation: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take the likeliest actions: the largest logit, or the mean.

        Args:
            theta: Policy parameters with an agent axis.
            observation: What the network's layers read [agent, sample, inputs], see `MLP.read`.
            mask: What may be done [agent, sample, action]; None: everything.

        Returns:
            Actions, of equal logits the first, and their log-probabilities [agent, sample].

        Raises:
            NotFinite: If the network's output is not finite.
        """

    @abstractmethod
    def evaluate(
        self, theta: Theta, observation: Tensor, action: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of given actions, and the entropy.

        Args:
            theta: Policy parameters, with or without an agent axis.
            observation: What the network's layers read [*batch, inputs], see `MLP.read`.
            action: Actions [*batch] or [*batch, action].
            mask: What could be done [*batch, action]; None: everything.

        Returns:
            Both, of shape [*batch], in nats.
        """

    @abstractmethod
    def entropy(self, theta: Theta, made: Tensor, mask: Tensor | None = None) -> Tensor:
        """The entropy of action distributions.

        Args:
            theta: Policy parameters, with or without an agent axis.
            made: What the network made of them [*batch, output].
            mask: What may be done [*batch, action]; None: everything.

        Returns:
            [*batch], in nats.
        """

    @abstractmethod
    def distribution(self, theta: Theta, observation: Tensor) -> dict[str, Tensor]:
        """Parameters of the action distributions.

        Args:
            theta: Policy parameters with an agent axis.
            observation: What the network's layers read [agent, *sample, inputs], see `MLP.read`.

        Returns:
            Tensors [agent, sample, ...] by name, as `gradlab.diversity` takes them: `logits` of
            numbered actions; or `mean` and `std` of what the environment is given before it is
            clipped to the action range, in the environment's units. By `action_mask`, logits of
            actions that an agent does not have are minus infinity, mean and standard deviation of
            components 0.
        """

    def to_env(self, action: Tensor) -> Tensor:
        """Turn an action into one that the environment takes.

        Args:
            action: What `sample` returned.

        Returns:
            The action for the environment.
        """
        return action

    def _own(self, axes: int) -> Tensor | None:
        """The agents' own mask, ready to be broadcast against a tensor [agent, ..., action]."""
        mask = self.action_mask
        return None if mask is None else _along_agents(mask, axes)


@dataclass(frozen=True, kw_only=True)
class Categorical(Policy):
    """A distribution over numbered actions; the network's outputs are logits."""

    usual_entropy_coefficient: ClassVar[float] = 0.01

    def sample(
        self,
        theta: Theta,
        observation: Tensor,
        generator: Generator,
        mask: Tensor | None = None,
        share: Share | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw actions; see `Policy.sample`."""
        log_p = self._log_p(theta, observation, mask)
        # The action whose exponential waiting time is shortest, drawn as torch.multinomial does.
        waiting = _drawn(Tensor.exponential_, log_p.shape, generator, share)
        action = (log_p.exp() / waiting).argmax(-1)
        return action, log_p.gather(-1, action[..., None]).squeeze(-1)

    def mode(
        self, theta: Theta, observation: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take the likeliest actions; see `Policy.mode`."""
        log_prob, action = self._log_p(theta, observation, mask).max(-1)
        return action, log_prob

    def _log_p(self, theta: Theta, observation: Tensor, mask: Tensor | None) -> Tensor:
        """Log-probabilities of all actions, to act by."""
        logits = self.network.forward(theta, observation)
        check_finite("the actor's output", logits, ("agent", "copy", "action"))
        return _masked(logits, mask).log_softmax(-1)

    def evaluate(
        self, theta: Theta, observation: Tensor, action: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy; see `Policy.evaluate`."""
        log_p = _masked(self.network.forward(theta, observation), mask).log_softmax(-1)
        return log_p.gather(-1, action[..., None]).squeeze(-1), _entropy(log_p)

    def entropy(
        self,
        theta: Theta,  # noqa: ARG002 -- logits are all there is to it
        made: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """See `Policy.entropy`."""
        return _entropy(_masked(made, mask).log_softmax(-1))

    def distribution(self, theta: Theta, observation: Tensor) -> dict[str, Tensor]:
        """Logits of the actions; see `Policy.distribution`."""
        logits = self.network.forward(theta, observation)
        mask = self._own(logits.dim())
        return {"logits": logits if mask is None else logits.masked_fill(~mask, -torch.inf)}


@dataclass(frozen=True, kw_only=True)
class Gaussian(Policy):
    """A diagonal Gaussian with a state-independent log standard deviation.

    The network's outputs are means in units of half the action range from its middle; what the
    environment gets is clipped to its box, the log-probability is that of the unclipped action.
    """

    box: Box
    usual_entropy_coefficient: ClassVar[float] = 0.0

    def sample(
        self,
        theta: Theta,
        observation: Tensor,
        generator: Generator,
        mask: Tensor | None = None,
        share: Share | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw actions; see `Policy.sample`."""
        mean, log_std = self._moments(theta, observation)
        noise = _drawn(Tensor.normal_, mean.shape, generator, share)
        action = mean + log_std.exp() * noise
        check_finite("the actor's action", action, ("agent", "copy", "component"))
        return action, _log_density(noise, log_std, mask)

    def mode(
        self, theta: Theta, observation: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take the means; see `Policy.mode`."""
        mean, log_std = self._moments(theta, observation)
        check_finite("the actor's action", mean, ("agent", "copy", "component"))
        return mean, _log_density(torch.zeros_like(mean), log_std, mask)

    def evaluate(
        self, theta: Theta, observation: Tensor, action: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy; see `Policy.evaluate`."""
        mean, log_std = self._moments(theta, observation)
        noise = (action - mean) * torch.exp(-log_std)
        return _log_density(noise, log_std, mask), _spread(log_std, mask)

    def entropy(self, theta: Theta, made: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Policy.entropy`."""
        return _spread(self._log_std(theta, made), mask)

    def distribution(self, theta: Theta, observation: Tensor) -> dict[str, Tensor]:
        """Mean and standard deviation of the action; see `Policy.distribution`."""
        mean, log_std = self._moments(theta, observation)
        std = log_std.exp().expand_as(mean)
        low, high = self._bounds(mean.dim())
        half = (high - low) / 2
        mask = self._own(mean.dim())
        found = {"mean": (high + low) / 2 + half * mean, "std": half * std}
        if mask is None:
            return found
        return {name: values.masked_fill(~mask, 0.0) for name, values in found.items()}

    def _moments(self, theta: Theta, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Means, and logarithms of the standard deviations, in units of half the range."""
        mean = self.network.forward(theta, observation)
        return mean, self._log_std(theta, mean)

    def _log_std(self, theta: Theta, made: Tensor) -> Tensor:
        return per_agent(theta["log_std"], made)

    def to_env(self, action: Tensor) -> Tensor:
        """Scale to the action range and clip to it; see `Policy.to_env`."""
        low, high = self._bounds(action.dim())
        return torch.clamp((high + low) / 2 + (high - low) / 2 * action, low, high)

    def _bounds(self, axes: int) -> tuple[Tensor, Tensor]:
        """The action range, ready to be broadcast against a tensor [agent, ..., action]."""
        low, high = self.box.low, self.box.high
        return (
            (low, high) if low.dim() == 1 else (_along_agents(low, axes), _along_agents(high, axes))
        )


@dataclass(frozen=True, kw_only=True)
class Squashed(Gaussian):
    """Tanh of the network's outputs, and normal noise.

    Actions that are drawn are clipped to the range, and 0 where a mask says that a component has
    no effect; log-probability and entropy are those of the noise before.

    Attributes:
        noise: Standard deviation of the noise, in units of half the action range, above 0: what a
            deterministic policy explores with; None: it is learned, as a Gaussian policy's.
    """

    noise: float | None = None

    def sample(
        self,
        theta: Theta,
        observation: Tensor,
        generator: Generator,
        mask: Tensor | None = None,
        share: Share | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw actions; see `Policy.sample`."""
        action, log_prob = super().sample(theta, observation, generator, mask, share)
        action = action.clamp(-1, 1)
        return action if mask is None else torch.where(mask, action, 0.0), log_prob

    def _moments(self, theta: Theta, observation: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = super()._moments(theta, observation)
        return mean.tanh(), log_std

    def _log_std(self, theta: Theta, made: Tensor) -> Tensor:
        if self.noise is None:
            return super()._log_std(theta, made)
        return torch.full_like(made, math.log(self.noise))


def _drawn(
    fill: Callable[..., Tensor], shape: torch.Size, generator: Generator, share: Share | None
) -> Tensor:
    """Draw what makes an action of a distribution, [agent, sample, action]."""

    def draw(shape: torch.Size) -> Tensor:
        return fill(torch.empty(shape), generator=generator)

    return draw(shape) if share is None else share.drawn(draw, shape)


def _along_agents(parameter: Tensor, axes: int) -> Tensor:
    """[agent, action] -> [agent, 1, ..., 1, action]."""
    return parameter.view(len(parameter), *[1] * (axes - 2), -1)


def _masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Leave no probability, but an entropy that has a gradient, to what may not be done."""
    return logits if mask is None else logits.masked_fill(~mask, torch.finfo(logits.dtype).min)


def _sum(components: Tensor, mask: Tensor | None) -> Tensor:
    return (components if mask is None else torch.where(mask, components, 0.0)).sum(-1)


def _entropy(log_p: Tensor) -> Tensor:
    """Of numbered actions."""
    return -(log_p.exp() * log_p).sum(-1)


def _spread(log_std: Tensor, mask: Tensor | None) -> Tensor:
    """The entropy of a diagonal Gaussian."""
    return _sum(log_std + 0.5 * math.log(2 * math.pi * math.e), mask)


def _log_density(noise: Tensor, log_std: Tensor, mask: Tensor | None) -> Tensor:
    return _sum(-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi), mask)


def make_policy(
    observation_size: int,
    action_space: Discrete | Box,
    *,
    hidden: tuple[int, ...],
    activation: str,
    action_mask: Tensor | None = None,
    memory_size: int | None = None,
    squashed: bool = False,
    noise: float | None = None,
) -> Policy:
    """Make the policy that fits an action space.

    Args:
        observation_size: Length of an observation.
        action_space: What the environment takes.
        hidden: Widths of the hidden layers.
        activation: "tanh" or "relu".
        action_mask: What each agent may do [agent, action], if not all of them everything.
        memory_size: Size of a recurrent policy's memory; None: it has none.
        squashed: Whether means of continuous actions are squashed into their range, see `Squashed`.
        noise: Make those policies deterministic but for noise of this size; None: standard
            deviations are learned.

    Returns:
        The policy; its head starts with gain 0.01, so that first actions hardly depend on it.
    """
    discrete = isinstance(action_space, Discrete)
    outputs = action_space.n if isinstance(action_space, Discrete) else action_space.size
    network = make_network(
        observation_size,
        outputs,
        hidden=hidden,
        activation=activation,
        memory_size=memory_size,
        head_gain=0.01,
        log_std_size=0 if discrete or noise is not None else outputs,
    )
    if isinstance(action_space, Box) and squashed:
        return Squashed(network=network, box=action_space, action_mask=action_mask, noise=noise)
    if isinstance(action_space, Box):
        return Gaussian(network=network, box=action_space, action_mask=action_mask)
    return Categorical(network=network, action_mask=action_mask)

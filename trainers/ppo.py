"""On-policy losses, per sample: the same functions are trained on and taken apart."""

from collections.abc import Callable

import torch
from torch import Tensor

from trainers.config import A2CConfig, PPOConfig
from trainers.networks import MLP, Theta
from trainers.policies import Policy
from trainers.processes import Share
from trainers.samples import of_samples

Surrogate = Callable[[Theta, dict[str, Tensor]], Tensor]


class PolicyLoss:
    """The clipped policy loss with its entropy bonus (Schulman et al., 2017, eq. 7 and 9).

    Without a clip range, minus advantage times log-probability, with the same bonus: A2C's (Mnih et
    al., 2016).

    Attributes:
        entropy_coefficient: Weight of the entropy bonus; it may be changed between updates.
        clip: Clip range of the ratio; None: there is none.
    """

    def __init__(self, policy: Policy, clip: float | None, entropy_coefficient: float) -> None:
        self.entropy_coefficient = entropy_coefficient
        self.clip = clip
        self._policy = policy

    def __call__(self, theta: Theta, sample: dict[str, Tensor]) -> Tensor:
        """Each sample's loss.

        Args:
            theta: Policy parameters.
            sample: Samples by name: `observation`, `action`, `log_prob`, `advantage`, and where not
                everything could be done `action_mask`; see `trainers.samples` for those of a
                recurrent policy, whose loss is the mean over its steps.

        Returns:
            The losses.
        """
        return self.with_log_ratio(theta, sample)[0]

    def with_log_ratio(self, theta: Theta, sample: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Each sample's loss, and how far the policy has moved.

        Args:
            theta: Policy parameters.
            sample: Samples by name, as above.

        Returns:
            The losses, and for each step the logarithm of the action's probability over that with
            which it was drawn.
        """
        log_prob, entropy = evaluated(self._policy, theta, sample)
        log_ratio = log_prob - sample["log_prob"]
        if self.clip is None:
            gain = log_prob * sample["advantage"]
        else:
            ratio = torch.exp(log_ratio)
            clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
            gain = torch.minimum(ratio * sample["advantage"], clipped * sample["advantage"])
        loss = -gain - self.entropy_coefficient * entropy
        return of_samples(loss, sample), log_ratio


def evaluated(policy: Policy, theta: Theta, sample: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the actions of samples, and the entropies there.

    Args:
        policy: The policy.
        theta: Its parameters.
        sample: Samples by name, as for `PolicyLoss`.

    Returns:
        Both, one for each step (nats).
    """
    read = policy.network.read(theta, sample)
    return policy.evaluate(theta, read, sample["action"], sample.get("action_mask"))


def policy_loss(policy: Policy, config: PPOConfig | A2CConfig) -> PolicyLoss:
    """Make the policy loss that is configured.

    Args:
        policy: The policy.
        config: Clip range, where there is one, and entropy coefficient (None: the policy's usual
            one).

    Returns:
        A function of policy parameters and samples (`observation`, `action`, `log_prob`,
        `advantage`) that returns each sample's loss.
    """
    weight = config.entropy_coefficient
    return PolicyLoss(
        policy,
        config.clip if isinstance(config, PPOConfig) else None,
        policy.usual_entropy_coefficient if weight is None else weight,
    )


def policy_gradient_loss(policy: Policy, entropy_coefficient: float = 0.0) -> Surrogate:
    """Minus advantage times log-probability (Williams, "REINFORCE", 1992).

    Args:
        policy: The policy.
        entropy_coefficient: Weight of an entropy bonus.

    Returns:
        A function of policy parameters and samples (`observation`, `action`, `advantage`) that
        returns each sample's loss.
    """

    def loss(theta: Theta, sample: dict[str, Tensor]) -> Tensor:
        log_prob, entropy = evaluated(policy, theta, sample)
        return of_samples(-sample["advantage"] * log_prob - entropy_coefficient * entropy, sample)

    return loss


def value_loss(network: MLP, config: PPOConfig | A2CConfig) -> Surrogate:
    """Half the squared error of the value, clipped around the old value if so configured.

    Args:
        network: The value network.
        config: The loss's weight; of PPO, clip range and whether to clip.

    Returns:
        A function of the network's parameters and samples (`observation`, `value`, `target`) that
        returns each sample's weighted loss.
    """

    def loss(theta: Theta, sample: dict[str, Tensor]) -> Tensor:
        value = network.forward(theta, network.read(theta, sample)).squeeze(-1)
        error = (value - sample["target"]).square()
        if isinstance(config, PPOConfig) and config.clip_value:
            step = (value - sample["value"]).clamp(-config.clip, config.clip)
            error = torch.maximum(error, (sample["value"] + step - sample["target"]).square())
        return of_samples(0.5 * config.value_coefficient * error, sample)

    return loss


def normalise(advantage: Tensor, active: Tensor | None = None) -> Tensor:
    """Shift and scale advantages to mean 0 and standard deviation 1.

    Args:
        advantage: Advantages of all agents and samples.
        active: Which of them are of agents that acted; all by default.

    Returns:
        A tensor of the same shape; all 0 if they are all equal, and 0 where nobody acted.
    """
    if active is None:
        return (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    count = active.sum()
    total = torch.where(active, advantage, 0.0).sum()
    centred = torch.where(active, advantage - total / count.clamp(min=1), 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-8)


def normalised(advantage: Tensor, active: Tensor | None, share: Share) -> Tensor:
    """Normalise a rollout's advantages over the copies of all processes.

    Args:
        advantage: Advantages of this process's samples.
        active: As for `normalise`.
        share: Of which copies they are.

    Returns:
        What `normalise` makes of all, of these samples.
    """
    everyone = None if active is None else share.whole(active)
    return share.part(normalise(share.whole(advantage), everyone))

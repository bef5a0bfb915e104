"""One update of PPO: passes over a rollout in minibatches."""

from collections.abc import Mapping

import torch
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.checks import check
from gradlab.quantity import Quantity
from trainers.config import PPOConfig
from trainers.critic_input import CriticInput
from trainers.finite import check_gradient, finite_mean
from trainers.generators.generator import Generator
from trainers.ppo import PolicyLoss, Surrogate, normalise

_OF_LAST_PASS = "mean over agents and samples of the last pass, each before its minibatch's step"


class Updater:
    """Trains actor and critic on what was collected (Schulman et al., 2017, algorithm 1).

    Advantages are normalised over each minibatch; actor and critic are clipped apart.
    """

    def __init__(
        self,
        config: PPOConfig,
        networks: tuple[Generator, Generator],
        losses: tuple[PolicyLoss, Surrogate],
        critic_input: CriticInput,
        optimiser: torch.optim.Optimizer,
    ) -> None:
        """Train nothing yet.

        Args:
            config: Epochs, minibatches and the like.
            networks: Generators of the policies and of the value functions.
            losses: What they minimise.
            critic_input: What the value functions read of the observations.
            optimiser: Of the parameters of both.
        """
        self._config = config
        self._actor, self._critic = networks
        self._policy_loss, self._value_loss = losses
        self._critic_input = critic_input
        self._optimiser = optimiser

    def __call__(
        self, samples: Mapping[str, Tensor], random: RandomGenerator
    ) -> dict[str, Quantity]:
        """Train.

        Args:
            samples: Tensors [agent, sample, ...] by name: `observation`, `action`, `log_prob`,
                `value`, `advantage`, `target`.
            random: Shuffles the samples, those of all agents alike.

        Returns:
            `policy_loss` and `value_loss`, means over minibatches; `approximate_kl` from the policy
            that collected, as Schulman's estimator k3 ("Approximating KL divergence", 2020), and
            `clip_fraction`, the share of samples whose ratio is out of the clip range, both of the
            last pass; `epochs_done`.

        Raises:
            NotFinite: If a loss or a gradient is not finite. No step was made with it.
        """
        config = self._config
        sums = {"policy_loss": 0.0, "value_loss": 0.0}
        kl, clipped, epochs = 0.0, 0.0, 0
        while epochs < config.epochs:
            kl, clipped = 0.0, 0.0
            order = torch.randperm(samples["advantage"].shape[1], generator=random)
            for part in order.tensor_split(config.minibatches):
                batch = {name: tensor[:, part] for name, tensor in samples.items()}
                policy, value, log_ratio = self._step(batch)
                sums["policy_loss"] += policy
                sums["value_loss"] += value
                change = log_ratio.expm1()  # r - 1
                kl += (change - log_ratio).mean().item() / config.minibatches
                out = (change.abs() > config.clip).sum().item() / change.numel()
                clipped += out / config.minibatches
            epochs += 1
            if config.target_kl is not None and kl > config.target_kl:
                break
        steps = epochs * config.minibatches
        found = {
            name: Quantity.scalar(total / steps, "loss", "mean over the minibatches of all passes")
            for name, total in sums.items()
        }
        return found | {
            "approximate_kl": Quantity.scalar(kl, "nats", f"(r - 1) - log r; {_OF_LAST_PASS}"),
            "clip_fraction": Quantity.scalar(clipped, "1", f"|r - 1| > clip; {_OF_LAST_PASS}"),
            "epochs_done": Quantity.scalar(float(epochs), "passes", "exact"),
        }

    def _step(self, batch: dict[str, Tensor]) -> tuple[float, float, Tensor]:
        """Make one step; returns both losses and the samples' log-ratios before it."""
        limit = self._config.max_gradient_norm
        batch["advantage"] = normalise(batch["advantage"])
        theta = self._actor.policy_for(batch["observation"])
        losses, log_ratio = self._policy_loss.with_log_ratio(theta, batch)
        policy = finite_mean("policy_loss", losses)
        batch["observation"] = self._critic_input(batch["observation"])
        theta = self._critic.policy_for(batch["observation"])
        value = finite_mean("value_loss", self._value_loss(theta, batch))
        self._optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward([policy, value])
        check_gradient("actor", self._actor.clip_gradients(limit))
        check_gradient("critic", self._critic.clip_gradients(limit))
        self._optimiser.step()
        return policy.item(), value.item(), log_ratio.detach()


def check_minibatches(minibatches: int, samples: int, agents: int) -> None:
    """Raise unless every minibatch has samples enough.

    Args:
        minibatches: Parts that a rollout is cut into.
        samples: Its samples of each agent.
        agents: Number of agents.

    Raises:
        UsageError: If a minibatch would have no sample, or one in all, over which advantages can't
            be normalised.
    """
    most = max(1, samples if agents > 1 else samples // 2)
    rule = f"be at most {most}: a rollout has {samples} samples of each agent (copies * steps)"
    check(minibatches <= most, "ppo.minibatches", rule, minibatches)

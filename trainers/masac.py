"""Multi-agent soft actor-critic: policies that are rewarded for their entropy."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.quantity import Quantity
from trainers.checkpoints import Checkpoint
from trainers.config import MASACConfig, TrainConfig
from trainers.critic_input import CriticInput
from trainers.generators.generator import Generator
from trainers.networks import Theta
from trainers.off_policy import entropy_target, soft_actor_loss
from trainers.policies import Categorical, Policy
from trainers.ppo import Surrogate
from trainers.replay_learner import BatchView, ReplayLearner, gumbel
from trainers.samples import Weights


class MASAC(ReplayLearner):
    """Soft actor-critic (Haarnoja et al., 2018) with critics of what all agents see and do.

    Attributes:
        log_alpha: Logarithm of the weight of each agent's entropy [agent].
    """

    slow = "critics"
    log_alpha: Tensor
    _settings: MASACConfig

    def prepare(self) -> None:
        """See `ReplayLearner.prepare`."""
        self.judges = self.critics
        agents = self.networks["actor"].agents
        start = math.log(self._settings.alpha)
        self.log_alpha = torch.full((agents,), start, requires_grad=True)
        self.optimiser.add_param_group({
            "params": [self.log_alpha],
            "lr": self._settings.alpha_learning_rate,
        })

    def update(self, samples: Mapping[str, Tensor], random: RandomGenerator) -> dict[str, Quantity]:
        """See `Learner.update`."""
        found = super().update(samples, random)
        alpha = self.log_alpha.detach().exp().double().numpy()
        return found | {
            "alpha": Quantity(
                values=alpha,
                dims=("agent",),
                coords={"agent": range(len(alpha))},
                unit="1",
                estimator="weight of the agent's entropy, after the update",
            )
        }

    def state(self) -> dict[str, Tensor]:
        """See `Learner.state`."""
        return super().state() | {"log_alpha": self.log_alpha}

    def load_state(self, checkpoint: Checkpoint) -> None:
        """See `Learner.load_state`."""
        super().load_state(checkpoint)
        with torch.no_grad():
            self.log_alpha.copy_(checkpoint.tensors["log_alpha"])

    def _exploration(self) -> None:
        return None

    def _make_view(self, critic_input: CriticInput) -> "SoftView":
        critics = [self.targets[name] for name in self.critics]
        actor = self.networks["actor"]
        return SoftView(
            self._config, self.policy, actor, critics, critic_input, log_alpha=self.log_alpha
        )

    def _make_actor_loss(self) -> Surrogate:
        return soft_actor_loss(
            self.policy,
            self.networks["critic"].mlp,
            self.judges,
            temperature=self._settings.temperature,
        )

    def _beside_actor(self, theta: Theta, batch: dict[str, Tensor]) -> None:
        """Move each alpha by how far its agent's entropy is above its target (eq. 18)."""
        policy, mask = self.policy, batch.get("action_mask")
        with torch.no_grad():
            made = policy.network.forward(theta, batch["observation"])
            above = policy.entropy(theta, made, mask) - entropy_target(
                policy,
                made,
                mask,
                per_component=self._settings.target_entropy,
                share=self._settings.target_share,
            )
            above = Weights.of(batch.get("active"))(above).mean(1)
        (self.log_alpha.exp() * above).sum().backward()


class SoftView(BatchView):
    """Targets are of what the policies do, and of the entropy that they do it with."""

    def __init__(
        self,
        config: TrainConfig,
        policy: Policy,
        actor: Generator,
        critics: Sequence[Generator],
        critic_input: CriticInput,
        *,
        log_alpha: Tensor,
    ) -> None:
        """Know where to look.

        Args:
            config: As for `BatchView`.
            policy: The same.
            actor: The same.
            critics: The same.
            critic_input: The same.
            log_alpha: Logarithm of the weight of each agent's entropy [agent].
        """
        super().__init__(config, policy, actor, critics, critic_input)
        self._log_alpha = log_alpha

    def _noise(
        self,
        shape: tuple[int, ...],
        random: RandomGenerator,
        *,
        following: bool,  # noqa: ARG002 -- the same for both
    ) -> Tensor:
        if isinstance(self._policy, Categorical):
            return gumbel(shape, random)
        return torch.randn(shape, generator=random)

    def _beside(self, samples: int) -> dict[str, Tensor]:
        return {"alpha": self._log_alpha.exp()[:, None].expand(-1, samples)}

    def _worth(self, theta: Theta, made: Tensor, mask: Tensor | None) -> Tensor:
        return self._log_alpha.exp()[:, None] * self._policy.entropy(theta, made, mask)

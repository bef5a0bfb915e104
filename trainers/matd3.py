"""Multi-agent TD3: deterministic policies learned from a replay, judged by twin critics."""

import torch
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.checks import check
from trainers.config import MATD3Config
from trainers.critic_input import CriticInput
from trainers.off_policy import joint_actor_loss
from trainers.policies import Categorical
from trainers.ppo import Surrogate
from trainers.replay_learner import BatchView, ReplayLearner, gumbel


class MATD3(ReplayLearner):
    """MATD3 (Ackermann et al., 2019), which is TD3 (Fujimoto et al., 2018) with joint critics."""

    slow = "all"
    _settings: MATD3Config

    def prepare(self) -> None:
        """See `ReplayLearner.prepare`.

        Raises:
            UsageError: If something is asked of standard deviations, which are not learned.
        """
        log_std = self._config.network.log_std
        check(
            log_std == "default",
            "network.log_std",
            "be default with --algorithm matd3, whose policies have none",
            log_std,
        )
        self.judges = ("critic",)

    def _exploration(self) -> float:
        return self._settings.exploration_noise

    def _make_view(self, critic_input: CriticInput) -> "SmoothedView":
        critics = [self.targets[name] for name in self.critics]
        return SmoothedView(self._config, self.policy, self.targets["actor"], critics, critic_input)

    def _make_actor_loss(self) -> Surrogate:
        return joint_actor_loss(
            self.policy,
            self.networks["critic"].mlp,
            temperature=self._settings.temperature,
            logit_penalty=self._settings.logit_penalty,
        )


class SmoothedView(BatchView):
    """Targets are of what the target policies do, with noise that is cut off."""

    _settings: MATD3Config

    def _noise(
        self, shape: tuple[int, ...], random: RandomGenerator, *, following: bool
    ) -> Tensor | None:
        if isinstance(self._policy, Categorical):
            return gumbel(shape, random)
        if not following:
            return None
        noise = self._settings.target_noise * torch.randn(shape, generator=random)
        return noise.clamp(-self._settings.noise_clip, self._settings.noise_clip)

"""Collecting experience: every copy stepped by the current policies."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.checks import check
from trainers.acting import act
from trainers.config import PPOConfig, TrainConfig
from trainers.critic_input import CRITIC_INPUTS, CriticInput, own_observation
from trainers.envs.vector_env import VectorEnv
from trainers.finite import check_finite
from trainers.gae import advantages
from trainers.networks import MLP, Theta
from trainers.normalisers import ObservationNormaliser, RewardNormaliser
from trainers.policies import Policy


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Samples of one rollout, and what its episodes brought.

    Attributes:
        samples: Tensors [agent, sample, ...] by name; sample = time * copies + copy.
        episode_returns: Undiscounted return, mean over agents, of each episode that ended, of the
            environment's rewards as they are.
        episode_lengths: Steps of each episode that ended.
        reward_per_step: Mean of the environment's rewards over agents, copies and time.
    """

    samples: dict[str, Tensor]
    episode_returns: list[float]
    episode_lengths: list[int]
    reward_per_step: float


class Collector:
    """Steps an environment and remembers where its episodes stand.

    Attributes:
        env: The environment.
        observation: What the agents act on next [agent, copy, obs], normalised if that is asked
            for.
        running_return: Return so far of each copy's episode, mean over agents.
        running_length: Steps so far of each copy's episode.
        normalisers: What learns from every step how to scale "observation" and "reward", if
            anything does.
    """

    def __init__(
        self,
        env: VectorEnv,
        *,
        critic_input: CriticInput = own_observation,
        team_reward: bool = False,
        observations: ObservationNormaliser | None = None,
        rewards: RewardNormaliser | None = None,
    ) -> None:
        """Start every copy.

        Args:
            env: The environment.
            critic_input: What critics read of the observations.
            team_reward: Let every agent learn from the mean of all agents' rewards.
            observations: Scales observations.
            rewards: Scales the rewards that are learned from.
        """
        self.env = env
        self.normalisers: dict[str, ObservationNormaliser | RewardNormaliser] = {}
        if observations is not None:
            self.normalisers["observation"] = observations
        if rewards is not None:
            self.normalisers["reward"] = rewards
        self._critic_input = critic_input
        self._team_reward = team_reward
        self._observations = observations
        self._rewards = rewards
        self.observation = self._read(env.reset())
        self.running_return = torch.zeros(env.copies, dtype=torch.float64)
        self.running_length = torch.zeros(env.copies, dtype=torch.int64)

    @torch.no_grad()
    def collect(
        self,
        steps: int,
        policy: Policy,
        theta: Callable[[Tensor], Theta],
        critic: MLP,
        critic_theta: Callable[[Tensor], Theta],
        config: PPOConfig,
        random: RandomGenerator,
    ) -> Rollout:
        """Step all copies and estimate advantages.

        Args:
            steps: Number of steps of every copy.
            policy: Draws actions.
            theta: Policy parameters of all agents, given what they see.
            critic: Value network.
            critic_theta: Its parameters for all agents, given what they see.
            config: Discount and lambda.
            random: Source of the actions' randomness.

        Returns:
            The rollout.

        Raises:
            NotFinite: If an observation, a value, an action or a reward is not finite.
        """
        columns: dict[str, list[Tensor]] = {}
        terminated, truncated = [], []
        returns: list[float] = []
        lengths: list[int] = []

        def value_of(observation: Tensor) -> Tensor:
            read = self._critic_input(observation)
            value = critic.forward(critic_theta(read), read).squeeze(-1)
            if not math.isfinite(value.sum().item()):
                # Told before anyone acts on it: samplers and simulators would raise errors that
                # don't say what is wrong.
                check_finite("observation", observation, ("agent", "copy"))
                check_finite("value", value, ("agent", "copy"))
            return value

        value = value_of(self.observation)
        for _ in range(steps):
            mask = self.env.action_mask()
            action, log_prob = act(policy, theta, self.observation, mask, random)
            step = self.env.step(policy.to_env(action))
            observation = self._read(step.observation)
            next_value = following = value_of(observation)
            if step.truncated.any():
                next_value = torch.where(
                    step.truncated, value_of(self.scaled(step.final_observation)), following
                )
            ended = step.terminated | step.truncated
            row = {
                "observation": self.observation,
                "action": action,
                "log_prob": log_prob,
                "value": value,
                "reward": step.reward,
                "paid": self._paid(step.reward, ended),
                "next_value": next_value,
            }
            if mask is not None:
                row["action_mask"] = mask
            for name, tensor in row.items():
                columns.setdefault(name, []).append(tensor)
            terminated.append(step.terminated)
            truncated.append(step.truncated)
            self.running_return += step.reward.mean(0)
            self.running_length += 1
            if ended.any():
                returns += self.running_return[ended].tolist()
                lengths += self.running_length[ended].tolist()
                self.running_return[ended] = 0
                self.running_length[ended] = 0
            self.observation, value = observation, following
        stacked = {name: torch.stack(rows, dim=1) for name, rows in columns.items()}
        reward = stacked.pop("reward")
        for name, tensor in (("observation", stacked["observation"]), ("reward", reward)):
            check_finite(name, tensor, ("agent", "step", "copy"))
        advantage = advantages(
            stacked.pop("paid"),
            stacked["value"],
            stacked.pop("next_value"),
            torch.stack(terminated),
            torch.stack(truncated),
            discount=config.discount,
            gae_lambda=config.gae_lambda,
        )
        stacked |= {"advantage": advantage, "target": advantage + stacked["value"]}
        return Rollout(
            samples={name: tensor.flatten(1, 2) for name, tensor in stacked.items()},
            episode_returns=returns,
            episode_lengths=lengths,
            reward_per_step=reward.mean().item(),
        )

    def _read(self, observation: Tensor) -> Tensor:
        """What the networks read of an observation that is acted on."""
        if self._observations is not None:
            # What is not finite would spread to all agents through the moments.
            check_finite("observation", observation, ("agent", "copy"))
            self._observations.learn(observation)
        return self.scaled(observation)

    def scaled(self, observation: Tensor) -> Tensor:
        """Scale an observation as the normaliser stands, which learns nothing from it.

        Args:
            observation: What the environment gave [agent, copy, obs].

        Returns:
            What the networks read.
        """
        return observation if self._observations is None else self._observations(observation)

    def _paid(self, reward: Tensor, ended: Tensor) -> Tensor:
        """What the agents learn from."""
        if self._team_reward:
            reward = reward.mean(0).expand_as(reward)
        return reward if self._rewards is None else self._rewards(reward, ended)


def make_collector(config: TrainConfig, env: VectorEnv) -> Collector:
    """Make what collects the experience that is asked for.

    Args:
        config: Algorithm, reward and normalisation.
        env: The environment.

    Returns:
        The collector.

    Raises:
        UsageError: If padded observations are to be normalised.
    """
    scales = config.normalise
    observations = rewards = None
    if scales.observations:
        check(
            env.spec.observation_sizes is None,
            "normalise.observations",
            "be false where observations are padded, as their scale is one for all agents",
            True,
        )
        observations = ObservationNormaliser(env.spec.observation_size, scales.clip)
    if scales.rewards:
        rewards = RewardNormaliser(
            env.spec.agents, env.copies, discount=config.ppo.discount, clip=scales.clip
        )
    return Collector(
        env,
        critic_input=CRITIC_INPUTS[config.algorithm],
        team_reward=config.reward == "team",
        observations=observations,
        rewards=rewards,
    )

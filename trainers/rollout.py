"""Collecting experience: every copy stepped by the current policies."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator as RandomGenerator
from torch import Tensor

from trainers.config import PPOConfig
from trainers.envs.vector_env import VectorEnv
from trainers.gae import advantages
from trainers.networks import MLP, Theta
from trainers.policies import Policy


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Samples of one rollout, and what its episodes brought.

    Attributes:
        samples: Tensors [agent, sample, ...] by name; sample = time * copies + copy.
        episode_returns: Undiscounted return, mean over agents, of each episode that ended.
        episode_lengths: Steps of each episode that ended.
        reward_per_step: Mean reward over agents, copies and time.
    """

    samples: dict[str, Tensor]
    episode_returns: list[float]
    episode_lengths: list[int]
    reward_per_step: float


class Collector:
    """Steps an environment and remembers where its episodes stand.

    Attributes:
        env: The environment.
        observation: What the agents act on next [agent, copy, obs].
        running_return: Return so far of each copy's episode, mean over agents.
        running_length: Steps so far of each copy's episode.
    """

    def __init__(self, env: VectorEnv) -> None:
        self.env = env
        self.observation = env.reset()
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
        """
        columns: dict[str, list[Tensor]] = {}
        terminated, truncated = [], []
        returns: list[float] = []
        lengths: list[int] = []

        def value_of(observation: Tensor) -> Tensor:
            return critic.forward(critic_theta(observation), observation).squeeze(-1)

        value = value_of(self.observation)
        for _ in range(steps):
            action, log_prob = policy.sample(theta(self.observation), self.observation, random)
            step = self.env.step(policy.to_env(action))
            next_value = following = value_of(step.observation)
            if step.truncated.any():
                next_value = torch.where(
                    step.truncated, value_of(step.final_observation), following
                )
            row = {
                "observation": self.observation,
                "action": action,
                "log_prob": log_prob,
                "value": value,
                "reward": step.reward,
                "next_value": next_value,
            }
            for name, tensor in row.items():
                columns.setdefault(name, []).append(tensor)
            terminated.append(step.terminated)
            truncated.append(step.truncated)
            self.running_return += step.reward.mean(0)
            self.running_length += 1
            ended = step.terminated | step.truncated
            if ended.any():
                returns += self.running_return[ended].tolist()
                lengths += self.running_length[ended].tolist()
                self.running_return[ended] = 0
                self.running_length[ended] = 0
            self.observation, value = step.observation, following
        stacked = {name: torch.stack(rows, dim=1) for name, rows in columns.items()}
        reward = stacked.pop("reward")
        advantage = advantages(
            reward,
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

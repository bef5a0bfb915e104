"""Collecting experience: every copy stepped by the current policies."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.checks import check
from trainers.acting import act
from trainers.checkpoints import Checkpoint
from trainers.config import OnPolicyConfig, TrainConfig
from trainers.critic_input import critic_source
from trainers.envs.vector_env import Step, VectorEnv, kept
from trainers.finite import check_finite
from trainers.gae import advantages
from trainers.memory import forgotten
from trainers.networks import Theta
from trainers.normalisers import ObservationNormaliser, RewardNormaliser
from trainers.policies import Policy
from trainers.processes import ALONE, Share
from trainers.values import Critics


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Samples of one rollout, and what its episodes brought.

    Attributes:
        played: The steps that it is made of.
        samples: Tensors by name, see `trainers.samples`: [agent, sample, ...] with sample = time *
            copies + copy, or of recurrent networks [agent, copy, time, ...]. Where agents had left
            their episode, the steps that `active` leaves out hold nothing that the environment
            gave.
        episode_returns: Undiscounted return, mean over agents, of each episode that ended, of the
            environment's rewards as they are. Agents that have left earn nothing.
        episode_lengths: Steps of each episode that ended.
        reward_per_step: Mean of the environment's rewards over agents, copies and time.
        outcomes: Whether each episode that ended came to what the environment names, by name.
    """

    played: "Played"
    samples: dict[str, Tensor]

    @property
    def episode_returns(self) -> list[float]:  # noqa: D102 -- with the attributes, as the others
        return self.played.episode_returns

    @property
    def episode_lengths(self) -> list[int]:  # noqa: D102
        return self.played.episode_lengths

    @property
    def reward_per_step(self) -> float:  # noqa: D102
        return self.played.reward_per_step

    @property
    def outcomes(self) -> Mapping[str, list[bool]]:  # noqa: D102
        return self.played.outcomes


@dataclass(frozen=True, kw_only=True)
class Played:
    """Some steps of every copy.

    Attributes:
        columns: Tensors [agent, time, copy, ...] by name: what was seen (`observation`, and
            `world_state` [1, time, copy, state] if critics read it), `action`, `log_prob`,
            `action_mask` if not everything could be done, `reward`, `paid`, what is learned from of
            it; `active`, who acted, `left`, for whom nothing follows, and `starts`, where an
            episode began.
        final: By step what the networks would have read after it, before any reset, by name; of the
            steps that cut an episode off.
        truncated: Where an episode was cut off [time, copy].
        ended: Where an episode ended [time, copy].
        episode_returns: As of a `Rollout`.
        episode_lengths: As of a `Rollout`.
        reward_per_step: As of a `Rollout`.
        outcomes: As of a `Rollout`.
    """

    columns: dict[str, Tensor]
    final: dict[int, dict[str, Tensor]]
    truncated: Tensor
    ended: Tensor
    episode_returns: list[float]
    episode_lengths: list[int]
    reward_per_step: float
    outcomes: Mapping[str, list[bool]]


class Collector:
    """Steps an environment and remembers where its episodes stand.

    Attributes:
        env: The environment.
        share: Which of the training's copies it has.
        observation: What the agents act on next [agent, copy, obs], normalised if that is asked
            for; 0 for agents that have left their episode.
        world_state: How the world stands then [1, copy, state], normalised likewise, if critics
            are to read it; else None.
        active: Which agents act on it [agent, copy].
        memory: What each recurrent network's memory holds before it reads "observation", [agent,
            copy, size] by name, "actor" and "critic".
        running_return: Return so far of each copy's episode, mean over agents.
        running_length: Steps so far of each copy's episode.
        normalisers: What learns from every step how to scale "observation", "world_state" and
            "reward", if anything does.
    """

    def __init__(
        self,
        env: VectorEnv,
        *,
        team_reward: bool = False,
        observations: ObservationNormaliser | None = None,
        world_states: ObservationNormaliser | None = None,
        rewards: RewardNormaliser | None = None,
        memory_size: int | None = None,
        reads_world_state: bool = False,
    ) -> None:
        """Start every copy.

        Args:
            env: The environment.
            team_reward: Let every agent learn from the mean of all agents' rewards.
            observations: Scales observations.
            world_states: Scales world states.
            rewards: Scales the rewards that are learned from.
            memory_size: Size of the networks' memory; None: they are feed-forward.
            reads_world_state: Whether critics are to read the environment's world state.
        """
        self.env = env
        self.share = env.share or Share(group=ALONE, of=env.copies)
        self.normalisers: dict[str, ObservationNormaliser | RewardNormaliser] = {}
        if observations is not None:
            self.normalisers["observation"] = observations
        if world_states is not None:
            self.normalisers["world_state"] = world_states
        if rewards is not None:
            self.normalisers["reward"] = rewards
        self._team_reward = team_reward
        self._observations = observations
        self._world_states = world_states
        self._rewards = rewards
        self.active = torch.ones(env.spec.agents, env.copies, dtype=torch.bool)
        self.observation = self._read(env.reset(), self.active)
        self.world_state = self._read_world_state() if reads_world_state else None
        self.memory: dict[str, Tensor] = {}
        if memory_size is not None:
            shape = (env.spec.agents, env.copies, memory_size)
            self.memory = {network: torch.zeros(shape) for network in ("actor", "critic")}
        self.running_return = torch.zeros(env.copies, dtype=torch.float64)
        self.running_length = torch.zeros(env.copies, dtype=torch.int64)

    @property
    def seen(self) -> dict[str, Tensor]:
        """What the networks read next: `observation`, and `world_state` if critics are to."""
        found = {"observation": self.observation}
        return found if self.world_state is None else found | {"world_state": self.world_state}

    @torch.no_grad()
    def play(
        self,
        steps: int,
        policy: Policy,
        theta: Callable[[Tensor], Theta],
        random: RandomGenerator,
    ) -> Played:
        """Step all copies.

        Args:
            steps: Number of steps of every copy.
            policy: Draws actions.
            theta: Policy parameters of all agents, given what they see.
            random: Source of the actions' randomness.

        Returns:
            What they brought.

        Raises:
            NotFinite: If an observation, an action or a reward is not finite.
        """
        columns: dict[str, list[Tensor]] = {}
        truncated, over, final = [], [], {}
        starts = torch.zeros_like(self.active)  # a memory is already empty at the first step
        returns: list[float] = []
        lengths: list[int] = []
        outcomes: dict[str, list[bool]] = {name: [] for name in self.env.spec.outcomes}

        for time in range(steps):
            mask = self.env.action_mask()
            if mask is not None:
                mask = mask | ~self.active[..., None]
            action, log_prob, of_actor = act(
                policy, theta, self.observation, mask, random, self.memory.get("actor"), self.share
            )
            step = self.env.step(policy.to_env(action)).of_active(self.active)
            ended, active = step.ended, step.act_next
            observation = self._read(step.observation, active)
            if of_actor is not None:
                self.memory["actor"] = forgotten(of_actor, ended)
            if step.truncated.any():
                final[time] = self._final(step)
            row = {
                **self.seen,
                "action": action,
                "log_prob": log_prob,
                "reward": step.reward,
                "paid": self._paid(step.reward, ended, self.active),
                "active": self.active,
                "left": step.left,
                "starts": starts,
            }
            if mask is not None:
                row["action_mask"] = mask
            for name, tensor in row.items():
                columns.setdefault(name, []).append(tensor)
            truncated.append(step.truncated)
            over.append(ended)
            self.running_return += step.reward.mean(0)
            self.running_length += 1
            if ended.any():
                returns += self.running_return[ended].tolist()
                lengths += self.running_length[ended].tolist()
                for name, happened in outcomes.items():
                    happened += step.outcomes[name][ended].tolist()
                self.running_return[ended] = 0
                self.running_length[ended] = 0
            self.observation, self.active = observation, active
            if self.world_state is not None:
                self.world_state = self._read_world_state()
            starts = ended.expand_as(self.active)
        stacked = {name: torch.stack(rows, dim=1) for name, rows in columns.items()}
        check_finite("reward", stacked["reward"], ("agent", "step", "copy"))
        everywhere = self.share.group.gather((
            returns,
            lengths,
            outcomes,
            stacked["reward"].mean().item(),
        ))
        return Played(
            columns=stacked,
            final=final,
            truncated=torch.stack(truncated),
            ended=torch.stack(over),
            episode_returns=[each for of, _, _, _ in everywhere for each in of],
            episode_lengths=[each for _, of, _, _ in everywhere for each in of],
            reward_per_step=fmean(mean for _, _, _, mean in everywhere),
            outcomes={
                name: [each for _, _, of, _ in everywhere for each in of[name]] for name in outcomes
            },
        )

    @torch.no_grad()
    def collect(
        self,
        steps: int,
        policy: Policy,
        theta: Callable[[Tensor], Theta],
        critics: Critics,
        config: OnPolicyConfig,
        random: RandomGenerator,
    ) -> Rollout:
        """Step all copies and estimate advantages.

        Args:
            steps: Number of steps of every copy.
            policy: Draws actions.
            theta: Policy parameters of all agents, given what they see.
            critics: The value functions.
            config: Discount and lambda.
            random: Source of the actions' randomness.

        Returns:
            The rollout.

        Raises:
            NotFinite: If an observation, a value, an action or a reward is not finite.
        """
        began_with = {f"{network}_memory": held for network, held in self.memory.items()}
        played = self.play(steps, policy, theta, random)
        stacked, source = dict(played.columns), critic_source(self.seen)
        del stacked["reward"]
        seen = torch.cat([stacked[source], self.seen[source][:, None]], dim=1)
        final = {time: last[source] for time, last in played.final.items()}
        value, following, memory = critics.values(
            seen, final, played.ended, self.memory.get("critic")
        )
        check_finite("value", value, ("agent", "step", "copy"))
        check_finite("value", following, ("agent", "step", "copy"))
        if memory is not None:
            self.memory["critic"] = memory
        stacked["value"] = value
        advantage = advantages(
            stacked.pop("paid"),
            value,
            following,
            stacked.pop("left"),
            played.truncated,
            discount=config.discount,
            gae_lambda=config.gae_lambda,
        )
        stacked |= {"advantage": advantage, "target": advantage + value}
        if self.share.all(stacked["active"]):
            del stacked["active"]
        if self.memory:
            samples = {name: t.transpose(1, 2).contiguous() for name, t in stacked.items()}
            samples |= began_with
        else:
            del stacked["starts"]
            samples = {name: tensor.flatten(1, 2) for name, tensor in stacked.items()}
        return Rollout(played=played, samples=samples)

    def state(self) -> dict[str, Tensor]:
        """Copy where the episodes of all copies stand, but for the environment itself.

        Returns:
            Tensors by name: attributes, memories and what the normalisers have learned.
        """
        whole = self.share.group.whole
        tensors = {
            **{f"collector.{name}": whole(seen, 1) for name, seen in self.seen.items()},
            "collector.active": whole(self.active, 1),
            "collector.running_return": whole(self.running_return, 0),
            "collector.running_length": whole(self.running_length, 0),
        }
        for network, held in self.memory.items():
            tensors[f"memory.{network}"] = whole(held, 1)
        for kind, normaliser in self.normalisers.items():
            for name, tensor in normaliser.state().items():
                tensors[f"normaliser.{kind}.{name}"] = tensor
        return tensors

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Go on from what `state` returned.

        Args:
            checkpoint: Holds it.
        """
        own = self.share.own
        for network, held in checkpoint.under("memory.").items():
            self.memory[network] = held[:, own]
        for name, tensor in checkpoint.under("collector.").items():
            setattr(self, name, tensor[own] if name.startswith("running") else tensor[:, own])

    def _final(self, step: Step) -> dict[str, Tensor]:
        """What the networks would have read after a step, before any reset."""
        found = {"observation": self.scaled(step.final_observation, step.active)}
        if self.world_state is not None:
            found["world_state"] = self._scaled_world_state(step.final_world_state)
        return found

    def _read(self, observation: Tensor, active: Tensor) -> Tensor:
        """What the networks read of an observation that is acted on."""
        # Told before anyone acts on it, or learns how to scale it: samplers and simulators would
        # raise errors that don't say what is wrong.
        if not math.isfinite(observation.sum().item()):
            check_finite("observation", observation, ("agent", "copy"))
        if self._observations is not None:
            self._observations.learn(observation[active])
        return self.scaled(observation, active)

    def scaled(self, observation: Tensor, active: Tensor | None = None) -> Tensor:
        """Scale an observation as the normaliser stands, which learns nothing from it.

        Args:
            observation: What the environment gave [agent, copy, obs].
            active: Which agents are to act on it; None: all.

        Returns:
            What the networks read; 0 for agents that have left their episode.
        """
        if self._observations is None:
            return observation
        scaled = self._observations(observation)
        return scaled if active is None else kept(scaled, active)

    def _read_world_state(self) -> Tensor:
        """What critics read of how the world stands, [1, copy, state]."""
        state = self.env.world_state()
        assert state is not None
        if not math.isfinite(state.sum().item()):
            check_finite("world state", state, ("copy",))
        if self._world_states is not None:
            self._world_states.learn(state)
        return self._scaled_world_state(state)

    def _scaled_world_state(self, state: Tensor | None) -> Tensor:
        assert state is not None
        state = state[None]
        return state if self._world_states is None else self._world_states(state)

    def _paid(self, reward: Tensor, ended: Tensor, acted: Tensor) -> Tensor:
        """What the agents learn from."""
        if self._team_reward:
            reward = reward.mean(0).expand_as(reward)
        return reward if self._rewards is None else self._rewards(reward, ended, acted)


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
    reads_world_state = config.critic_input == "state"
    observations = world_states = rewards = None
    group = env.share.group if env.share else ALONE
    if scales.observations:
        check(
            env.spec.observation_sizes is None,
            "normalise.observations",
            "be false where observations are padded, as their scale is one for all agents",
            True,
        )
        observations = ObservationNormaliser(env.spec.observation_size, scales.clip, group)
        if reads_world_state:
            assert env.spec.world_state_size is not None
            world_states = ObservationNormaliser(env.spec.world_state_size, scales.clip, group)
    if scales.rewards:
        rewards = RewardNormaliser(
            env.spec.agents,
            env.copies,
            discount=config.discount,
            clip=scales.clip,
            group=group,
        )
    return Collector(
        env,
        team_reward=config.reward == "team",
        observations=observations,
        world_states=world_states,
        rewards=rewards,
        memory_size=config.recurrent_size,
        reads_world_state=reads_world_state,
    )

"""PPO and A2C: each rollout is learned from, and forgotten."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator as RandomGenerator
from torch import Tensor

from gradlab.probe import Network
from gradlab.quantity import Quantity
from trainers.acting import fixed_parameters
from trainers.checkpoints import Checkpoint
from trainers.config import OnPolicyConfig, TrainConfig
from trainers.critic_input import critic_source, make_critic_input
from trainers.diagnosis import Diagnosis
from trainers.envs.vector_env import VectorEnv
from trainers.generators.seps import SePS
from trainers.grouping import Grouping, said
from trainers.learner import Learner, aggregations_of, generator_of
from trainers.networks import make_network
from trainers.policies import make_policy
from trainers.ppo import policy_loss, value_loss
from trainers.rollout import Rollout, make_collector
from trainers.update import Actor, Critic, Updater, check_minibatches
from trainers.values import Critics


class OnPolicy(Learner):
    """PPO (Schulman et al., 2017) and A2C (Mnih et al., 2016), for every sharing scheme.

    Attributes:
        policy_loss: What the policies minimise.
        value_loss: What the value functions minimise.
        actor: The policies, as they are trained.
        critic: The value functions, as they are trained.
        updater: Trains both.
    """

    updater: Updater

    def __init__(self, config: TrainConfig, env: VectorEnv, random: RandomGenerator) -> None:
        """Draw networks, and start every copy of the environment.

        Args:
            config: All settings.
            env: The environment.
            random: Source of the networks' first parameters.

        Raises:
            UsageError: If settings don't go together, or not with the environment.
        """
        spec, recurrent = env.spec, config.recurrent_size is not None
        samples = config.copies * (1 if recurrent else config.steps)
        check_minibatches(config.on_policy.minibatches, samples, spec.agents, recurrent=recurrent)
        self._config = config
        self._critic_input = make_critic_input(config, spec)
        self.collector = make_collector(config, env)
        seen = self._critic_input(self.collector.seen[critic_source(self.collector.seen)])
        form: dict[str, Any] = {
            "hidden": config.network.hidden,
            "activation": config.network.activation,
            "memory_size": config.recurrent_size,
        }
        policy = make_policy(
            spec.observation_size, spec.action_space, action_mask=spec.action_mask, **form
        )
        value = make_network(seen.shape[-1], 1, head_gain=1.0, **form)
        actor = generator_of(config, "actor", policy.network, spec, random)
        critic = generator_of(config, "critic", value, spec, random)
        self.networks = {"actor": actor, "critic": critic}
        self.policy = replace(policy, network=actor.mlp)
        self.policy_loss = policy_loss(self.policy, config.on_policy)
        self.value_loss = value_loss(critic.mlp, config.on_policy)
        self._entropy_coefficient = self.policy_loss.entropy_coefficient
        self.aggregations = aggregations_of(config, self.networks)
        self.actor = Actor(generator=actor, loss=self.policy_loss)
        self.critic = Critic(generator=critic, loss=self.value_loss, input=self._critic_input)
        self.prepare()
        diagnosed = {
            "actor": Network(generator=actor, surrogate=self.policy_loss),
            "critic": Network(generator=critic, surrogate=self.value_loss),
        }
        self.diagnosis = Diagnosis(
            config,
            diagnosed,
            self.policy,
            self._critic_input,
            self.optimiser,
            self.collector.share,
        )
        self.findings = []
        grouped = [network for network in self.networks.values() if isinstance(network, SePS)]
        self._grouping = Grouping(config, grouped, self.policy, self.optimiser) if grouped else None

    def prepare(self) -> None:
        """Make what trains the networks, and its optimiser, which has seen nothing yet."""
        trained = (self.actor, self.critic)
        self.optimiser = adam(
            [p for part in trained for p in part.generator.parameters()], self._config.on_policy
        )
        self.updater = Updater(
            self._config.on_policy,
            trained,
            self.optimiser,
            self.collector.share,
            self.aggregations,
            normalises=self._config.on_policy.normalises_advantages,
        )

    def begin(self, left: float) -> None:
        """See `Learner.begin`."""
        settings = self._config.on_policy
        if settings.anneal_learning_rate:
            for group in self.optimiser.param_groups:
                group["lr"] = settings.learning_rate * left
        if settings.anneal_entropy:
            self.policy_loss.entropy_coefficient = self._entropy_coefficient * left

    def collect(self, random: RandomGenerator) -> Rollout:
        """See `Learner.collect`."""
        actor, critic = self.networks["actor"], self.networks["critic"]
        with torch.no_grad():
            return self.collector.collect(
                self._config.steps,
                self.policy,
                fixed_parameters(actor),
                Critics(
                    network=critic.mlp, theta=fixed_parameters(critic), reads=self._critic_input
                ),
                self._config.on_policy,
                random,
            )

    def update(self, samples: Mapping[str, Tensor], random: RandomGenerator) -> dict[str, Quantity]:
        """See `Learner.update`."""
        found = self.updater(samples, random)
        self.findings = self.updater.findings
        return found

    def adapt(self, rollout: Rollout, random: RandomGenerator) -> dict[str, Quantity]:
        """See `Learner.adapt`; groups agents when it is time to."""
        found = super().adapt(rollout, random)
        if self._grouping is None:
            return found
        found |= self._grouping.watch(rollout.played, self.collector.seen, random)
        if "group" in found:
            groups = said(found["group"].values.astype(int).tolist())
            self.findings = [*self.findings, f"agents are grouped: {groups}"]
            for name, held in self.collector.memory.items():
                if isinstance(self.networks[name], SePS):  # what an older network remembered
                    self.collector.memory[name] = torch.zeros_like(held)
        return found

    def state(self) -> dict[str, Tensor]:
        """See `Learner.state`."""
        watched = {} if self._grouping is None else self._grouping.state()
        return super().state() | {f"experience.{name}": t for name, t in watched.items()}

    def load_state(self, checkpoint: Checkpoint) -> None:
        """See `Learner.load_state`."""
        super().load_state(checkpoint)
        if self._grouping is not None:
            self._grouping.load_state(checkpoint.under("experience."))


def adam(parameters: Sequence[Tensor], config: OnPolicyConfig) -> torch.optim.Adam:
    """Make the optimiser that is configured.

    Args:
        parameters: What it trains.
        config: Step size and epsilon.

    Returns:
        The optimiser.
    """
    return torch.optim.Adam(
        parameters, lr=config.learning_rate, eps=config.adam_epsilon, fused=True
    )

"""The only training loop: collect, diagnose, update, record."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from gradlab.probe import Network
from gradlab.quantity import Quantity
from gradlab.run_writer import RunWriter
from trainers.checkpoints import Checkpoint, Saver
from trainers.config import TrainConfig
from trainers.diagnosis import Diagnosis
from trainers.envs import make_env
from trainers.envs.vector_env import EnvSpec
from trainers.generators import make_generator
from trainers.generators.generator import Generator
from trainers.networks import MLP, Theta
from trainers.policies import make_policy
from trainers.ppo import normalise, policy_loss, value_loss
from trainers.rollout import Collector, Rollout

Progress = Callable[[int, float], None]
"""Called after each update with frames done and the last mean episode return."""


class Trainer:
    """One training run of independent PPO, for every sharing scheme.

    Attributes:
        config: Its settings.
        spec: What the environment looks like.
        actor: Generator of the policies.
        critic: Generator of the value functions.
        updates_done: Number of updates done so far.
        last_return: Mean return of the episodes that ended last, NaN before any did.
    """

    def __init__(self, config: TrainConfig) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        self.random = torch.Generator().manual_seed(config.seed)
        env = make_env(
            config.env,
            copies=config.copies,
            agents=config.agents,
            seed=config.seed,
            args=config.env_args,
        )
        self.spec: EnvSpec = env.spec
        hidden, activation = config.network.hidden, config.network.activation
        policy = make_policy(
            env.spec.observation_size, env.spec.action_space, hidden=hidden, activation=activation
        )
        value = MLP(
            sizes=(env.spec.observation_size, *hidden, 1), activation=activation, head_gain=1.0
        )
        self.actor = self._generator("actor", policy.network)
        self.critic = self._generator("critic", value)
        self.policy = replace(policy, network=self.actor.mlp)
        self.value = self.critic.mlp
        self.optimiser = torch.optim.Adam(
            [*self.actor.parameters(), *self.critic.parameters()],
            lr=config.ppo.learning_rate,
            eps=config.ppo.adam_epsilon,
        )
        self.collector = Collector(env)
        self.updates_done = 0
        self.last_return = math.nan
        self._saver = Saver()
        self._told: set[str] = set()
        self._engines_written = False
        self.policy_loss = policy_loss(self.policy, config.ppo)
        self.value_loss = value_loss(self.value, config.ppo)
        networks = {
            "actor": Network(generator=self.actor, surrogate=self.policy_loss),
            "critic": Network(generator=self.critic, surrogate=self.value_loss),
        }
        self.diagnosis = Diagnosis(config, networks, self.policy, self.optimiser)

    def _generator(self, network: str, mlp: MLP) -> Generator:
        config = self.config
        return make_generator(
            config.methods[network],
            mlp,
            self.spec.agents,
            self.random,
            config.network,
            config.hypernetwork,
        )

    @property
    def frames_done(self) -> int:
        """Environment steps done so far, summed over copies."""
        return self.updates_done * self.config.copies * self.config.steps

    def run(
        self,
        writer: RunWriter,
        progress: Progress,
        stop: Callable[[], bool] = lambda: False,
        tell: Callable[[str], None] = lambda _: None,
    ) -> bool:
        """Train from where this trainer stands to the configured frames, recording every update.

        Args:
            writer: The run folder.
            progress: Told of every update.
            stop: Asked after each update whether to stop there.
            tell: Given what the diagnostics find wrong, once for each network, agent and layer.

        Returns:
            Whether all frames are done. Either way the last update is checkpointed.
        """
        config = self.config
        for update in range(self.updates_done, config.updates):
            began = time.perf_counter()
            rollout = self._collect()
            quantities = self.diagnosis.of(update, rollout)
            for finding in self.diagnosis.findings:
                place = finding.partition(":")[0]
                if place not in self._told:
                    self._told.add(place)
                    tell(f"update {update}: {finding}")
            if quantities and not self._engines_written:
                writer.describe(engines=self.diagnosis.probe.engines)
                self._engines_written = True
            losses = self._update(rollout.samples)
            self.updates_done = update + 1
            if rollout.episode_returns:
                self.last_return = fmean(rollout.episode_returns)
            scalars: dict[str, tuple[float, str]] = {
                "frames": (self.frames_done, "frames"),
                "episode_return": (_mean(rollout.episode_returns), "reward"),
                "episode_length": (_mean(rollout.episode_lengths), "steps"),
                "reward_per_step": (rollout.reward_per_step, "reward"),
                "seconds": (time.perf_counter() - began, "s"),
                **{name: (value, "loss") for name, value in losses.items()},
            }
            quantities |= {
                name: Quantity.scalar(float(value), unit) for name, (value, unit) in scalars.items()
            }
            writer.write(update, quantities)
            progress(self.frames_done, self.last_return)
            self._saver.save(writer.path, self.state)
            if stop():
                break
        self._saver.save(writer.path, self.state, at_once=True)
        return self.updates_done >= config.updates

    def state(self) -> Checkpoint:
        """Copy all that the rest of the training depends on.

        Returns:
            A checkpoint of the last update that is done.
        """
        env_tensors, env_values = self.collector.env.state()
        tensors = {
            "random": self.random.get_state(),
            "collector.observation": self.collector.observation,
            "collector.running_return": self.collector.running_return,
            "collector.running_length": self.collector.running_length,
            **{f"env{path}": tensor for path, tensor in env_tensors.items()},
        }
        for network in ("actor", "critic"):
            for name, tensor in getattr(self, network).state_dict().items():
                tensors[f"{network}.{name}"] = tensor
        for number, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": value for name, value in moments.items()}
        return Checkpoint(
            update=self.updates_done - 1,
            tensors={name: tensor.detach().clone() for name, tensor in tensors.items()},
            values={
                "env": env_values,
                "last_return": None if math.isnan(self.last_return) else self.last_return,
            },
        )

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint as if the training had never stopped.

        Args:
            checkpoint: What `state` returned, from a trainer of the same settings.
        """

        def under(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): tensor
                for name, tensor in checkpoint.tensors.items()
                if name.startswith(prefix)
            }

        self.updates_done = checkpoint.update + 1
        last = checkpoint.values["last_return"]
        self.last_return = math.nan if last is None else last
        self.random.set_state(checkpoint.tensors["random"])
        self.actor.load_state_dict(under("actor."))
        self.critic.load_state_dict(under("critic."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in under("adam.").items():
            number, _, kind = name.partition(".")
            moments.setdefault(int(number), {})[kind] = tensor
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": moments})
        self.collector.env.load_state(under("env"), checkpoint.values["env"])
        for name, tensor in under("collector.").items():
            setattr(self.collector, name, tensor)

    def _collect(self) -> Rollout:
        with torch.no_grad():
            return self.collector.collect(
                self.config.steps,
                self.policy,
                fixed_parameters(self.actor),
                self.value,
                fixed_parameters(self.critic),
                self.config.ppo,
                self.random,
            )

    def _update(self, samples: dict[str, Tensor]) -> dict[str, float]:
        ppo = self.config.ppo
        count = samples["advantage"].shape[1]
        sums = {"policy_loss": 0.0, "value_loss": 0.0}
        for _ in range(ppo.epochs):
            order = torch.randperm(count, generator=self.random)
            for part in order.tensor_split(ppo.minibatches):
                batch = {name: tensor[:, part] for name, tensor in samples.items()}
                batch["advantage"] = normalise(batch["advantage"])
                policy = self.policy_loss(self.actor.policy_for(batch["observation"]), batch).mean()
                value = self.value_loss(self.critic.policy_for(batch["observation"]), batch).mean()
                self.optimiser.zero_grad(set_to_none=True)
                torch.autograd.backward([policy, value])
                self.actor.clip_gradients(ppo.max_gradient_norm)
                self.critic.clip_gradients(ppo.max_gradient_norm)
                self.optimiser.step()
                sums["policy_loss"] += policy.item()
                sums["value_loss"] += value.item()
        return {name: total / (ppo.epochs * ppo.minibatches) for name, total in sums.items()}


def describe(trainer: Trainer) -> dict[str, Any]:
    """What run.json says about a trainer before its first update.

    Args:
        trainer: The trainer.

    Returns:
        Entries that JSON can hold.
    """
    config = trainer.config
    return {
        "method": config.scheme,
        "methods": config.methods,
        "algorithm": config.algorithm,
        "environment": config.env,
        "agents": trainer.spec.agents,
        "agent_names": list(trainer.spec.agent_names),
        "seed": config.seed,
        "updates": config.updates,
        "config": config.model_dump(mode="json"),
    }


def fixed_parameters(generator: Generator) -> Callable[[Tensor], Theta]:
    """What agents act with while nothing is trained, generated as seldom as can be.

    Args:
        generator: Makes their parameters.

    Returns:
        A function of observations [agent, sample, obs].
    """
    if generator.reads_observation:
        return generator.policy_for
    theta = generator.all_agents()
    return lambda _: theta


def _mean(values: list[float] | list[int]) -> float:
    return fmean(values) if values else math.nan

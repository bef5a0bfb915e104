"""The only training loop: collect, diagnose, update, record."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradlab.checks import TrainingFailed, UsageError
from gradlab.probe import Network
from gradlab.quantity import Quantity
from gradlab.run_writer import RunWriter
from trainers.acting import fixed_parameters
from trainers.aggregation import Aggregation
from trainers.aggregators import make_aggregator
from trainers.checkpoints import Checkpoint, Saver, newest_checkpoint
from trainers.config import (
    CRITICS,
    MAY_DIFFER,
    EvaluationConfig,
    TrainConfig,
    differing_settings,
)
from trainers.critic_input import critic_source, make_critic_input
from trainers.diagnosis import Diagnosis
from trainers.envs import make_env
from trainers.envs.vector_env import (
    EnvironmentFailed,
    EnvSpec,
    VectorEnv,
    check_equal_spaces,
)
from trainers.episodes import Episodes, Watch, play_episodes
from trainers.finite import NotFinite
from trainers.generators import make_generator
from trainers.generators.generator import Generator
from trainers.networks import MLP, make_network
from trainers.policies import make_policy
from trainers.ppo import policy_loss, value_loss
from trainers.rollout import Rollout, make_collector
from trainers.samples import of_network
from trainers.update import Updater, check_minibatches
from trainers.values import Critics

Progress = Callable[[int, float], None]
"""Called before the first update and after each, with frames done and the last mean return."""


class Trainer:
    """One training run of PPO or A2C, for every sharing scheme.

    Attributes:
        config: Its settings.
        spec: What the environment looks like.
        actor: Generator of the policies.
        critic: Generator of the value functions.
        aggregations: By network what makes one gradient of the agents'; empty: their sum.
        updates_done: Number of updates done so far.
        last_return: Mean return of the episodes that ended last, NaN before any did.
    """

    def __init__(self, config: TrainConfig) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        self.random = torch.Generator().manual_seed(config.seed)
        env = self._make_env(config.copies, config.seed)
        self.spec: EnvSpec = env.spec
        if not config.pad:
            check_equal_spaces(self.spec)
        recurrent = config.recurrent_size is not None
        samples = config.copies * (1 if recurrent else config.steps)
        check_minibatches(
            config.on_policy.minibatches, samples, env.spec.agents, recurrent=recurrent
        )
        critic_input = make_critic_input(config, env.spec)
        self.collector = make_collector(config, env)
        seen = critic_input(self.collector.seen[critic_source(self.collector.seen)])
        form: dict[str, Any] = {
            "hidden": config.network.hidden,
            "activation": config.network.activation,
            "memory_size": config.recurrent_size,
        }
        policy = make_policy(
            env.spec.observation_size,
            env.spec.action_space,
            action_mask=env.spec.action_mask,
            **form,
        )
        value = make_network(seen.shape[-1], 1, head_gain=1.0, **form)
        self.actor = self._generator("actor", policy.network)
        self.critic = self._generator("critic", value)
        self.policy = replace(policy, network=self.actor.mlp)
        self.value = self.critic.mlp
        self.optimiser = torch.optim.Adam(
            [*self.actor.parameters(), *self.critic.parameters()],
            lr=config.on_policy.learning_rate,
            eps=config.on_policy.adam_epsilon,
            fused=True,
        )
        self.updates_done = 0
        self.last_return = math.nan
        self._saver = Saver()
        self._told: set[str] = set()
        self._engines_written = False
        self.policy_loss = policy_loss(self.policy, config.on_policy)
        self.value_loss = value_loss(self.value, config.on_policy)
        networks = {
            "actor": Network(generator=self.actor, surrogate=self.policy_loss),
            "critic": Network(generator=self.critic, surrogate=self.value_loss),
        }
        self.diagnosis = Diagnosis(config, networks, self.policy, critic_input, self.optimiser)
        self.aggregations = self._aggregate()
        self._updater = Updater(
            config.on_policy,
            (self.actor, self.critic),
            (self.policy_loss, self.value_loss),
            critic_input,
            self.optimiser,
            self.aggregations,
        )
        self._critic_input = critic_input
        self._entropy_coefficient = self.policy_loss.entropy_coefficient

    def _make_env(self, copies: int, seed: int, *, info: bool = False) -> VectorEnv:
        config = self.config
        return make_env(
            config.env,
            copies=copies,
            agents=config.agents,
            seed=seed,
            args=config.env_args,
            info=info,
        )

    def _generator(self, network: str, mlp: MLP) -> Generator:
        config = self.config
        method = config.methods[network]
        if network == "critic" and method in CRITICS:
            raise UsageError(
                f"`critic_method` must be a sharing scheme of value functions: {method} shapes "
                f"policies; with it critics have {CRITICS[method]!r} unless told otherwise. Got "
                f"critic_method={method!r}."
            )
        return make_generator(
            method,
            mlp,
            self.spec.agents,
            self.random,
            config.network,
            config,
        )

    def _aggregate(self) -> dict[str, Aggregation]:
        config, found = self.config, {}
        for network, generator in (("actor", self.actor), ("critic", self.critic)):
            size = sum(p.numel() for p in generator.parameters() if p.requires_grad)
            shape = (self.spec.agents, size)
            made = make_aggregator(config.aggregate, config.aggregate_args, shape)
            if made is not None:
                found[network] = Aggregation(made)
        return found

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
            tell: Given what the diagnostics find wrong, once for each network, agent and layer,
                and what an aggregator could not do, once for each network.

        Returns:
            Whether all frames are done. Either way the last update is checkpointed.

        Raises:
            TrainingFailed: If an observation, value, action, reward, loss or gradient is not
                finite, or the environment fails. The state before that update is checkpointed.
        """
        look = partial(self._diagnose, writer, tell)
        update = self.updates_done
        try:
            for update in range(self.updates_done, self.config.updates):
                began = time.perf_counter()
                rollout, quantities = self._next_update(look)
                self._tell(update, self._updater.findings, tell)
                seconds = time.perf_counter() - began
                if self._evaluation_is_due():
                    quantities |= self.evaluate().quantities()
                scalars: dict[str, tuple[float, str]] = {
                    "frames": (self.frames_done, "frames"),
                    "episode_return": (_mean(rollout.episode_returns), "reward"),
                    "episode_length": (_mean(rollout.episode_lengths), "steps"),
                    "reward_per_step": (rollout.reward_per_step, "reward"),
                    "seconds": (seconds, "s"),
                }
                quantities |= {
                    name: Quantity.scalar(float(value), unit)
                    for name, (value, unit) in scalars.items()
                }
                quantities |= _outcome_rate(rollout)
                writer.write(update, quantities)
                progress(self.frames_done, self.last_return)
                self._saver.save(writer.path, self.state)
                if stop():
                    break
            self._saver.save(writer.path, self.state, at_once=True)
        except (NotFinite, EnvironmentFailed) as error:
            saved = self._save_last_good(writer.path, update)
            raise TrainingFailed(f"update {update}: {error}. {saved}") from None
        return self.updates_done >= self.config.updates

    def evaluate(
        self, asked: EvaluationConfig | None = None, watch: Watch = lambda _: None
    ) -> Episodes:
        """Play whole episodes with the policies as they stand, in an environment made for it.

        Nothing that the training depends on changes. The environment's and the actions' randomness
        follows from the seed and the number of updates done: other episodes at every evaluation,
        the same ones whenever it is repeated.

        Args:
            asked: How many episodes, of which seed, and how to act; by default as configured.
            watch: Shown the first episode.

        Returns:
            What the episodes brought.

        Raises:
            NotFinite: If an observation or a reward is not finite.
            EnvironmentFailed: If the environment fails.
        """
        asked = asked or self.config.evaluation
        seed = self.config.seed if asked.seed is None else asked.seed
        of_env, of_actions = np.random.SeedSequence((seed, self.updates_done)).generate_state(2)
        return play_episodes(
            self._make_env(asked.episodes, int(of_env), info=True),
            self.policy,
            fixed_parameters(self.actor),
            scaled=self.collector.scaled,
            random=None if asked.deterministic else torch.Generator().manual_seed(int(of_actions)),
            watch=watch,
        )

    def state(self) -> Checkpoint:
        """Copy all that the rest of the training depends on.

        Returns:
            A checkpoint of the last update that is done.
        """
        env_tensors, env_values = self.collector.env.state()
        tensors = {
            "random": self.random.get_state(),
            **{f"collector.{name}": seen for name, seen in self.collector.seen.items()},
            "collector.active": self.collector.active,
            "collector.running_return": self.collector.running_return,
            "collector.running_length": self.collector.running_length,
            **{f"env{path}": tensor for path, tensor in env_tensors.items()},
        }
        for network, held in self.collector.memory.items():
            tensors[f"memory.{network}"] = held
        for kind, normaliser in self.collector.normalisers.items():
            for name, tensor in normaliser.state().items():
                tensors[f"normaliser.{kind}.{name}"] = tensor
        for network in ("actor", "critic"):
            for name, tensor in getattr(self, network).state_dict().items():
                tensors[f"{network}.{name}"] = tensor
        for network, aggregation in self.aggregations.items():
            for name, tensor in aggregation.aggregator.state().items():
                tensors[f"aggregator.{network}.{name}"] = tensor
        for number, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": value for name, value in moments.items()}
        return Checkpoint(
            update=self.updates_done - 1,
            tensors={name: tensor.detach().clone() for name, tensor in tensors.items()},
            values={
                "env": env_values,
                "last_return": None if math.isnan(self.last_return) else self.last_return,
                "config": self.config.model_dump(mode="json"),
            },
        )

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint as if the training had never stopped.

        Args:
            checkpoint: What `state` returned, from a trainer of the same settings.

        Raises:
            UsageError: If its settings are others.
        """
        self.load_networks(checkpoint)
        last = checkpoint.values["last_return"]
        self.last_return = math.nan if last is None else last
        self.random.set_state(checkpoint.tensors["random"])
        moments: dict[int, dict[str, Tensor]] = {}
        parameters = self.optimiser.param_groups[0]["params"]
        for name, tensor in checkpoint.under("adam.").items():
            number, _, kind = name.partition(".")
            if tensor.dim():  # fused Adam takes all to lie in memory as the parameter does
                tensor = torch.empty_like(parameters[int(number)]).copy_(tensor)
            moments.setdefault(int(number), {})[kind] = tensor
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": moments})
        for network, aggregation in self.aggregations.items():
            aggregation.aggregator.load_state(checkpoint.under(f"aggregator.{network}."))
        self.collector.env.load_state(checkpoint.under("env"), checkpoint.values["env"])
        self.collector.memory |= checkpoint.under("memory.")
        for name, tensor in checkpoint.under("collector.").items():
            setattr(self.collector, name, tensor)

    def load_networks(self, checkpoint: Checkpoint) -> None:
        """Take over what agents act with, and the number of updates done; not to train on.

        Args:
            checkpoint: What `state` returned, from a trainer of the same settings.

        Raises:
            UsageError: If its settings are others.
        """
        kept = checkpoint.values.get("config")  # older checkpoints have none
        differing = kept and differing_settings(kept, self.config, but=MAY_DIFFER)
        if differing:
            raise UsageError(
                f"the checkpoint of update {checkpoint.update} is of a training with {differing}. "
                "Go on with it with the settings that it was made with."
            )
        self.updates_done = checkpoint.update + 1
        self.actor.load_state_dict(checkpoint.under("actor."))
        self.critic.load_state_dict(checkpoint.under("critic."))
        for kind, normaliser in self.collector.normalisers.items():
            normaliser.load_state(checkpoint.under(f"normaliser.{kind}."))

    def _evaluation_is_due(self) -> bool:
        every, done = self.config.evaluation.every, self.updates_done
        return every > 0 and (done % every == 0 or done >= self.config.updates)

    def _collect(self) -> Rollout:
        with torch.no_grad():
            return self.collector.collect(
                self.config.steps,
                self.policy,
                fixed_parameters(self.actor),
                Critics(
                    network=self.value,
                    theta=fixed_parameters(self.critic),
                    reads=self._critic_input,
                ),
                self.config.on_policy,
                self.random,
            )

    def _update(self, samples: dict[str, Tensor]) -> dict[str, Quantity]:
        return self._updater(samples, self.random)

    def _next_update(
        self, look: Callable[[Rollout], dict[str, Quantity]] = lambda _: {}
    ) -> tuple[Rollout, dict[str, Quantity]]:
        """Collect, look at what was collected, and train on it."""
        self._anneal()
        rollout = self._collect()
        quantities = look(rollout) | self._update(rollout.samples)
        self.actor.adapt(of_network(rollout.samples, "actor"))
        self.updates_done += 1
        if rollout.episode_returns:
            self.last_return = fmean(rollout.episode_returns)
        return rollout, quantities

    def _anneal(self) -> None:
        """Let fall what falls over the run: linearly, from all of it to 1 / updates of it."""
        settings, left = self.config.on_policy, 1 - self.updates_done / self.config.updates
        if settings.anneal_learning_rate:
            for group in self.optimiser.param_groups:
                group["lr"] = settings.learning_rate * left
        if settings.anneal_entropy:
            self.policy_loss.entropy_coefficient = self._entropy_coefficient * left

    def _diagnose(
        self, writer: RunWriter, tell: Callable[[str], None], rollout: Rollout
    ) -> dict[str, Quantity]:
        update = self.updates_done
        quantities = self.diagnosis.of(update, rollout)
        self._tell(update, self.diagnosis.findings, tell)
        if quantities and not self._engines_written:
            writer.describe(engines=self.diagnosis.probe.engines)
            self._engines_written = True
        return quantities

    def _tell(self, update: int, findings: list[str], tell: Callable[[str], None]) -> None:
        """Tell what is wrong with an update, of each place once."""
        for finding in findings:
            place = finding.partition(":")[0]
            if place not in self._told:
                self._told.add(place)
                tell(f"update {update}: {finding}")

    def _save_last_good(self, run: Path, wanted: int) -> str:
        """Save the state with `wanted` updates done; returns a sentence that says what is saved.

        A training goes on from a checkpoint to the bit, so the newest one leads there. To keep
        that state in memory as well would cost a copy of it in every update.
        """
        checkpoint, _ = newest_checkpoint(run)
        if checkpoint is None:
            return "There is no earlier state to go on from."
        try:
            self.load_state(checkpoint)
            while self.updates_done < wanted:
                self._next_update()
            self._saver.save(run, self.state, at_once=True)
        except (
            NotFinite,
            EnvironmentFailed,
            UsageError,
        ):  # not even the updates that went well can be repeated
            self.updates_done = checkpoint.update + 1
        return (
            f"Saved is the state after update {self.updates_done - 1}; to go on from there: "
            f"gradlab train --resume --out {run}"
        )


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
        "padding": trainer.spec.padding,
        "resuming": trainer.spec.resuming,
        "seed": config.seed,
        "updates": config.updates,
        "config": config.model_dump(mode="json"),
    }


def _outcome_rate(rollout: Rollout) -> dict[str, Quantity]:
    """How often the episodes that ended came to what the environment names; none if it does not."""
    if not rollout.outcomes:
        return {}
    rates = Quantity(
        values=np.array([_mean(happened) for happened in rollout.outcomes.values()]),
        dims=("outcome",),
        coords={"outcome": list(rollout.outcomes)},
        unit="1",
        estimator="share of the episodes that ended in the rollout",
    )
    return {"outcome_rate": rates}


def _mean(values: list[float] | list[int] | list[bool]) -> float:
    return fmean(values) if values else math.nan

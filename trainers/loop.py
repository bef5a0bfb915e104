"""The only training loop: collect, diagnose, update, record."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradlab.checks import TrainingFailed, UsageError
from gradlab.quantity import Quantity
from gradlab.run_writer import NotWritten, RunWriter
from trainers.acting import fixed_parameters
from trainers.checkpoints import Checkpoint, Saver, newest_checkpoint
from trainers.config import MAY_DIFFER, EvaluationConfig, TrainConfig, differing_settings
from trainers.envs import make_env
from trainers.envs.vector_env import (
    EnvironmentFailed,
    EnvSpec,
    VectorEnv,
    check_equal_spaces,
)
from trainers.episodes import Episodes, Watch, play_episodes
from trainers.finite import NotFinite
from trainers.happo import HAPPO
from trainers.learner import Learner
from trainers.masac import MASAC
from trainers.matd3 import MATD3
from trainers.on_policy import OnPolicy
from trainers.rollout import Rollout

Progress = Callable[[int, float], None]
"""Called before the first update and after each, with frames done and the last mean return."""

LEARNERS: dict[str, Callable[[TrainConfig, VectorEnv, torch.Generator], Learner]] = {
    "ippo": OnPolicy,
    "mappo": OnPolicy,
    "happo": HAPPO,
    "a2c": OnPolicy,
    "matd3": MATD3,
    "masac": MASAC,
}
"""What makes each algorithm."""


class Trainer:
    """One training run: of any algorithm, for every sharing scheme.

    Attributes:
        config: Its settings.
        random: Source of the networks' first parameters and of all that is drawn.
        spec: What the environment looks like.
        learner: The algorithm. What follows is part of it.
        collector: Steps the environment.
        policy: The policies' form.
        actor: Generator of the policies.
        critic: Generator of the value functions.
        diagnosis: What is measured of them.
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
        self.learner: Learner = LEARNERS[config.algorithm](config, env, self.random)
        self.collector, self.policy = self.learner.collector, self.learner.policy
        self.actor, self.critic = (self.learner.networks[name] for name in ("actor", "critic"))
        self.diagnosis = self.learner.diagnosis
        self.updates_done = 0
        self.last_return = math.nan
        self._saver = Saver()
        self._told: set[str] = set()
        self._engines_written = False

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
                self._tell(update, self.learner.findings, tell)
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
                self._saver.save(writer, self.state)
                if stop():
                    break
            self._saver.save(writer, self.state, at_once=True)
        except (NotFinite, EnvironmentFailed) as error:
            saved = self._save_last_good(writer, update)
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
            **self.learner.state(),
            **{f"env{path}": tensor for path, tensor in env_tensors.items()},
        }
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
            UsageError: If its settings are others, or it is none of such a training.
        """
        self.load_networks(checkpoint)
        with _fitting(checkpoint):
            last = checkpoint.values["last_return"]
            self.last_return = math.nan if last is None else float(last)
            self.random.set_state(checkpoint.tensors["random"])
            self.learner.load_state(checkpoint)
            self.collector.env.load_state(checkpoint.under("env"), checkpoint.values["env"])

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
        with _fitting(checkpoint):
            self.learner.load_networks(checkpoint)

    def _evaluation_is_due(self) -> bool:
        every, done = self.config.evaluation.every, self.updates_done
        return every > 0 and (done % every == 0 or done >= self.config.updates)

    def _collect(self) -> Rollout:
        return self.learner.collect(self.random)

    def _update(self, samples: Mapping[str, Tensor]) -> dict[str, Quantity]:
        return self.learner.update(samples, self.random)

    def _next_update(
        self, look: Callable[[Rollout], dict[str, Quantity]] = lambda _: {}
    ) -> tuple[Rollout, dict[str, Quantity]]:
        """Collect, look at what was collected, and train on it."""
        self.learner.begin(1 - self.updates_done / self.config.updates)
        rollout = self._collect()
        quantities = look(rollout) | self._update(rollout.samples)
        quantities |= self.learner.adapt(rollout, self.random)
        before = self.frames_done
        self.updates_done += 1
        for generator in self.learner.networks.values():
            generator.renew(before, self.frames_done, self.config.frames, self.random)
        quantities |= self.actor.account()
        if rollout.episode_returns:
            self.last_return = fmean(rollout.episode_returns)
        return rollout, quantities

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

    def _save_last_good(self, run: RunWriter, wanted: int) -> str:
        """Save the state with `wanted` updates done; returns a sentence that says what is saved.

        A training goes on from a checkpoint to the bit, so the newest one leads there. To keep
        that state in memory as well would cost a copy of it in every update.
        """
        checkpoint, _ = newest_checkpoint(run.path)
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
            NotWritten,
            UsageError,
        ):  # not even the updates that went well can be repeated
            self.updates_done = checkpoint.update + 1
        return (
            f"Saved is the state after update {self.updates_done - 1}; to go on from there: "
            f"gradlab train --resume --out {run.path}"
        )


@contextmanager
def _fitting(checkpoint: Checkpoint) -> Iterator[None]:
    """Say in a line that a checkpoint is not of the training that is to go on from it."""
    try:
        yield
    except (UsageError, EnvironmentFailed):
        raise
    # Names, shapes and types of tensors and values are whatever the file says.
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(
            f"the checkpoint of update {checkpoint.update} is not of a training with these "
            f"settings ({cause}). Take another run, or train anew."
        ) from error


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

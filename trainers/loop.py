"""The only training loop: collect, diagnose, update, record."""

import hashlib
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

from gradlab.checks import TrainingFailed, UsageError, check
from gradlab.quantity import Quantity
from gradlab.run_writer import NotWritten, RunWriter
from trainers.acting import fixed_parameters
from trainers.checkpoints import Checkpoint, Saver, newest_checkpoint, read_for_all
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
from trainers.processes import ALONE, Group, Share, command
from trainers.replay_learner import ReplayLearner
from trainers.rollout import Rollout

Progress = Callable[[int, float], None]
"""Called before the first update and after each, with frames done and the last mean return."""

LEARNERS: dict[str, type[OnPolicy] | type[ReplayLearner]] = {
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
        group: The processes that train together, each with some of the environment copies.
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

    def __init__(self, config: TrainConfig, group: Group = ALONE) -> None:
        torch.set_num_threads(config.threads)
        _check_processes(config, group)
        self.config = config
        self.group = group
        self.random = torch.Generator().manual_seed(config.seed)
        share = None if group.size == 1 else Share(group=group, of=config.copies)
        env = self._make_env(config.copies // group.size, config.seed, share=share)
        self.spec: EnvSpec = env.spec
        if not config.pad:
            check_equal_spaces(self.spec)
        self.learner: Learner = LEARNERS[config.algorithm](config, env, self.random)
        self.collector, self.policy = self.learner.collector, self.learner.policy
        self.actor, self.critic = (self.learner.networks[name] for name in ("actor", "critic"))
        self.diagnosis = self.learner.diagnosis
        self.updates_done = 0
        self.last_return = math.nan
        self._saver = Saver(group)
        self._told: set[str] = set()
        self._engines_written = False

    def _make_env(
        self, copies: int, seed: int, *, info: bool = False, share: Share | None = None
    ) -> VectorEnv:
        config = self.config
        return make_env(
            config.env,
            copies=copies,
            agents=config.agents,
            seed=seed,
            args=config.env_args,
            info=info,
            share=share,
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
                with self.group.together():
                    self._one_update(update, writer, progress, look, tell)
                if any(self.group.gather(stop())):
                    break
            with self.group.together():
                self._saver.save(writer, self.state, at_once=True)
        except (NotFinite, EnvironmentFailed) as error:
            saved = self._save_last_good(writer, update)
            raise TrainingFailed(f"update {update}: {error}. {saved}") from None
        return self.updates_done >= self.config.updates

    def _one_update(
        self,
        update: int,
        writer: RunWriter,
        progress: Progress,
        look: Callable[[Rollout], dict[str, Quantity]],
        tell: Callable[[str], None],
    ) -> None:
        """Make one update, record it, and save it if it is time to."""
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
            name: Quantity.scalar(float(value), unit) for name, (value, unit) in scalars.items()
        }
        quantities |= _outcome_rate(rollout)
        writer.write(update, quantities)
        progress(self.frames_done, self.last_return)
        self._saver.save(writer, self.state)

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
            A checkpoint of the last update that is done; the same in all processes.

        Raises:
            TrainingFailed: If not all processes have the same weights.
        """
        self._check_equal()
        of_env = self.group.gather(self.collector.env.state())
        tensors = {
            "random": self.random.get_state(),
            **self.learner.state(),
            **{
                f"{self._env_name(rank)}{path}": tensor
                for rank, (env_tensors, _) in enumerate(of_env)
                for path, tensor in env_tensors.items()
            },
        }
        return Checkpoint(
            update=self.updates_done - 1,
            tensors={name: tensor.detach().clone() for name, tensor in tensors.items()},
            values={
                "env": of_env[0][1] if self.group.size == 1 else [values for _, values in of_env],
                "processes": self.group.size,
                "last_return": None if math.isnan(self.last_return) else self.last_return,
                "config": self.config.model_dump(mode="json"),
            },
        )

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint as if the training had never stopped.

        Args:
            checkpoint: What `state` returned, from a trainer of the same settings.

        Raises:
            UsageError: If its settings are others, it was saved by more or fewer processes, or it
                is none of such a training.
        """
        processes = checkpoint.values.get("processes", 1)  # older checkpoints were made by one
        if processes != self.group.size:
            raise UsageError(
                f"the checkpoint of update {checkpoint.update} is of a training by {processes} "
                f"process{'' if processes == 1 else 'es'}, which have its environments. Go on with "
                f"as many: {command(processes)} --resume. Got {self.group.size}."
            )
        self.load_networks(checkpoint)
        with _fitting(checkpoint):
            last = checkpoint.values["last_return"]
            self.last_return = math.nan if last is None else float(last)
            self.random.set_state(checkpoint.tensors["random"])
            self.learner.load_state(checkpoint)
            values, rank = checkpoint.values["env"], self.group.rank
            self.collector.env.load_state(
                checkpoint.under(self._env_name(rank)), values if processes == 1 else values[rank]
            )

    def _env_name(self, rank: int) -> str:
        """What a checkpoint calls the environment of a process."""
        return "env" if self.group.size == 1 else f"env:{rank}"

    def _check_equal(self) -> None:
        """Raise unless all processes have the same weights, to the bit."""
        if self.group.size == 1:
            return
        digest = hashlib.sha256()
        for generator in self.learner.networks.values():
            for parameter in generator.parameters():
                digest.update(parameter.detach().contiguous().numpy().tobytes())
        digests = self.group.gather(digest.hexdigest())
        if other := [rank for rank, each in enumerate(digests) if each != digests[0]]:
            raise TrainingFailed(
                f"process {other[0]} has other weights than process 0 after update "
                f"{self.updates_done - 1}. All must run the same gradlab and torch on processors "
                "of the same kind."
            )

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
        checkpoint, _ = read_for_all(self.group, lambda: newest_checkpoint(run.path))
        if checkpoint is None:
            return "There is no earlier state to go on from."
        try:
            with self.group.together():
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
            f"{command(self.group.size)} --resume --out {run.path}"
        )


def _check_processes(config: TrainConfig, group: Group) -> None:
    """Raise unless so many processes can share the training."""
    if group.size == 1:
        return
    of = f"with {group.size} processes"
    check(
        config.copies % group.size == 0,
        "copies",
        f"be a multiple of {group.size} {of}: each has as many",
        config.copies,
    )
    on_policy = [name for name, make in LEARNERS.items() if issubclass(make, OnPolicy)]
    check(
        config.algorithm in on_policy,
        "algorithm",
        f"be one of {', '.join(on_policy)} {of}: others learn from a replay of all copies",
        config.algorithm,
    )
    for network, method in config.methods.items():
        check(
            method not in {"seps", "dico"},
            "method",
            f"be one whose {network} hangs on what is trained alone {of}: {method} looks at what "
            "agents of all copies saw",
            method,
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

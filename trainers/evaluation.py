"""How well the policies of a training, or of a run in a folder, do in whole episodes."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr
from pydantic import ValidationError

from gradlab.checks import Failed, UsageError, check
from gradlab.quantity import dataset
from gradlab.run import Run, open_run
from gradlab.run_writer import write_atomically
from trainers.checkpoints import Checkpoint, checkpoint_of, newest_checkpoint
from trainers.config import EvaluationConfig, TrainConfig
from trainers.episodes import Episodes, Watch
from trainers.finite import NotFinite
from trainers.loop import Trainer

SCHEMA = 1
FOLDER = "evaluations"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Episodes, and of what they are.

    Attributes:
        episodes: What they brought.
        update: The last update that the policies have done, -1 if none.
        frames: Environment frames that they have learned from.
        planned: Updates that are planned.
        deterministic: Whether they acted by their modes.
        seed: Seed of the episodes.
        agent_names: The agents' names.
        notes: Sentences that the user should read.
    """

    episodes: Episodes
    update: int
    frames: int
    planned: int
    deterministic: bool
    seed: int
    agent_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def metrics(self) -> xr.Dataset:
        """Means and intervals: what `Episodes.quantities` says."""
        return dataset(self.episodes.quantities())

    def document(self) -> dict[str, Any]:
        """Put all of it into what JSON can hold.

        Returns:
            Settings, agents, the numbers of every episode, and under `quantities` their means and
            intervals, with axes, unit and estimator; null for NaN.
        """
        episodes = self.episodes
        return {
            "schema": SCHEMA,
            "update": self.update,
            "frames": self.frames,
            "planned_updates": self.planned,
            "episodes": len(episodes.lengths),
            "deterministic": self.deterministic,
            "seed": self.seed,
            "agent_names": list(self.agent_names),
            "quantities": {
                name: {
                    "dims": list(quantity.dims),
                    "coordinates": {axis: list(quantity.coords[axis]) for axis in quantity.dims},
                    "unit": quantity.unit,
                    "estimator": quantity.estimator,
                    "values": _finite(quantity.values.tolist()),
                }
                for name, quantity in episodes.quantities().items()
            },
            "returns": _finite(episodes.returns.tolist()),
            "lengths": episodes.lengths.tolist(),
            "metrics": {
                name: _finite(values.tolist()) for name, values in episodes.metrics.items()
            },
            "outcomes": {name: happened.tolist() for name, happened in episodes.outcomes.items()},
        }

    def save(self, run: Path) -> Path:
        """Write the document into a run folder, beside what its training writes.

        Args:
            run: The run folder.

        Returns:
            The file, named by update, kind, number of episodes and seed: the same evaluation
            replaces itself.

        Raises:
            OSError: If it can't be written.
        """
        folder = run / FOLDER
        folder.mkdir(exist_ok=True)
        kind = "deterministic" if self.deterministic else "sampled"
        count = len(self.episodes.lengths)
        file = folder / f"{self.update:09d}-{kind}-{count}-seed{self.seed}.json"
        write_atomically(file, (json.dumps(self.document(), indent=2) + "\n").encode())
        return file


def evaluate(
    source: Trainer | Run | Path | str,
    *,
    episodes: int | None = None,
    deterministic: bool | None = None,
    seed: int | None = None,
    update: int | None = None,
    watch: Watch = lambda _: None,
) -> Evaluation:
    """Play whole episodes with a training's policies as they stand, or as a run has saved them.

    Observations are normalised as in the training, by moments that stay as they are. Nothing is
    written. A run may be going on meanwhile.

    Args:
        source: A trainer, a run, or a run's folder.
        episodes: How many; by default what the training was configured with, as is what follows.
        deterministic: Act by each policy's mode (argmax, mean) instead of drawing actions.
        seed: Seed of environments and actions, of at least 0. Together with the number of updates
            done it says which episodes are played.
        update: Of a run, the update whose checkpoint to take; by default the newest that is whole.
        watch: Shown the first episode, e.g. a `trainers.animation.Animation`.

    Returns:
        The evaluation.

    Raises:
        UsageError: If there is no such run, checkpoint, or number.
        Failed: If an observation or a reward is not finite.

    >>> from trainers.config import TrainConfig
    >>> trainer = Trainer(TrainConfig(method="fups", agents=4))
    >>> found = evaluate(trainer, episodes=2)  # all agents take the same action
    >>> found.metrics.evaluation_return.item(), found.episodes.lengths.tolist()
    (0.25, [1, 1])
    """
    check(episodes is None or episodes >= 1, "episodes", "be at least 1", episodes)
    check(seed is None or 0 <= seed < 2**31, "seed", "be at least 0 and below 2^31", seed)
    notes: list[str] = []
    if isinstance(source, Trainer):
        check(update is None, "update", "be left out with a trainer, which stands at one", update)
        trainer = source
    else:
        run = source if isinstance(source, Run) else open_run(source)
        trainer = saved_trainer(run, update, notes)
    given = {"episodes": episodes, "deterministic": deterministic, "seed": seed}
    settings = {
        "seed": trainer.config.seed,
        **trainer.config.evaluation.model_dump(exclude_none=True),
    }
    settings |= {name: value for name, value in given.items() if value is not None}
    asked = EvaluationConfig.model_validate(settings)
    try:
        played = trainer.evaluate(asked, watch)
    except NotFinite as error:
        raise Failed(f"after update {trainer.updates_done - 1}: {error}") from None
    assert asked.seed is not None
    return Evaluation(
        episodes=played,
        update=trainer.updates_done - 1,
        frames=trainer.frames_done,
        planned=trainer.config.updates,
        deterministic=asked.deterministic,
        seed=asked.seed,
        agent_names=trainer.spec.agent_names,
        notes=tuple(notes),
    )


def saved_trainer(run: Run, update: int | None, notes: list[str]) -> Trainer:
    """Make a trainer with the networks that a run has saved; not to train on.

    Args:
        run: The run.
        update: The update whose checkpoint to take; by default the newest that is whole.
        notes: Gets a sentence for each damaged checkpoint that is passed over.

    Returns:
        The trainer.

    Raises:
        UsageError: If there is no such checkpoint, or the settings are lost.
    """
    trainer = Trainer(_settings(run))
    trainer.load_networks(_checkpoint(run, update, notes))
    return trainer


def _settings(run: Run) -> TrainConfig:
    if run.info.get("attached"):
        raise UsageError(
            f"{run.path} must be a training of gradlab's own. Got what a probe recorded of another "
            "program's; the policies are that program's to save and load."
        )
    if not run.config:
        raise UsageError(f"{run.path} has lost its settings (run.json), and can't be evaluated.")
    try:
        return TrainConfig.model_validate(run.config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{run.path}/run.json: `{where}`: {first['msg']}. Evaluate it with the gradlab that "
            "wrote it."
        ) from None


def _checkpoint(run: Run, update: int | None, notes: list[str]) -> Checkpoint:
    if update is not None:
        return checkpoint_of(run.path, update)
    checkpoint, problems = newest_checkpoint(run.path)
    if checkpoint is None:
        damaged = f" ({'; '.join(problems)})" if problems else ""
        raise UsageError(
            f"{run.path} has no checkpoint that is whole{damaged}. Go on with its training: "
            f"gradlab train --resume --out {run.path}"
        )
    notes += problems
    return checkpoint


def _finite(values: Any) -> Any:  # noqa: ANN401 -- nested lists
    """Lists with None for what is not finite, which JSON has no word for."""
    if isinstance(values, list):
        return [_finite(value) for value in values]
    return values if math.isfinite(values) else None

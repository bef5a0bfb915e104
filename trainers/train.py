"""One training into one run folder: new, or going on with what is there."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradlab.checks import TrainingFailed, UsageError, check
from gradlab.run import open_run
from gradlab.run_writer import NotWritten, RunWriter, is_run
from gradlab.sinks.known import make_sinks
from trainers.checkpoints import Checkpoint, newest_checkpoint, read_for_all
from trainers.config import MAY_DIFFER, TrainConfig, differing_settings
from trainers.envs import packages_of
from trainers.loop import Progress, Trainer, describe
from trainers.processes import ALONE, Group, command


def train_run(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress = lambda *_: None,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda _: None,
    group: Group = ALONE,
) -> bool:
    """Train, recording into a run folder.

    Args:
        config: All settings.
        out: The run folder.
        resume: Go on from the newest checkpoint that is whole (from the start if there is none)
            with a run that was started with the same settings.
        progress: Told of where the training starts, and of every update.
        stop: Asked after each update whether to stop there.
        tell: Given sentences that the user should read.
        group: The processes that train together. Process 0 writes the folder, and reads it for all.

    Returns:
        Whether all frames are done; otherwise the run can be resumed.

    Raises:
        UsageError: If the folder or a setting can't be used.
        TrainingFailed: If an observation, reward, loss or gradient is not finite, or the
            environment fails. The last good state is saved. Or if the disk refuses what is
            written; what was written before stays.
    """
    if resume and is_run(out):
        check_same_settings(config, out, but=MAY_DIFFER)
    sinks = make_sinks(config.log)
    trainer = Trainer(config, group)
    try:
        with _writer(config, out, group, resume=resume) as writer:
            checkpoint, problems = read_for_all(
                group, lambda: _onwards_from(out, writer.newest_update())
            )
            onwards = f"after update {checkpoint.update}" if checkpoint else "from the beginning"
            if trainer.spec.padding:
                tell(f"{config.env} is padded: {trainer.spec.padding}")
            if trainer.spec.resuming:
                tell(f"{config.env} has no state to save; on resuming, {trainer.spec.resuming}")
            for sentence in [*writer.notes, *(f"{p}; going on {onwards}" for p in problems)]:
                tell(sentence)
            if checkpoint:
                check_frames(config, out, checkpoint)
                trainer.load_state(checkpoint)
            progress(trainer.frames_done, trainer.last_return)
            writer.discard_after(trainer.updates_done - 1)
            writer.describe(**describe(trainer), state="running")
            writer.forward(sinks, trainer.updates_done, tell)
            finished = trainer.run(writer, progress, stop, tell)
            writer.describe(state="done" if finished else "stopped")
    except NotWritten as error:
        raise TrainingFailed(
            f"{error}. What was recorded before is whole; once that is mended: "
            f"{command(group.size)} --resume --out {out}"
        ) from None
    return finished


def _writer(config: TrainConfig, out: Path, group: Group, *, resume: bool) -> RunWriter:
    if group.rank:
        return _Unwritten(out)
    return RunWriter(out, resume=resume, packages=packages_of(config.env))


class _Unwritten(RunWriter):
    """Takes what a run folder does and writes nothing: another process does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes = []

    def __exit__(self, *_: object) -> None:
        pass

    def describe(self, **_: Any) -> None:  # noqa: ANN401 -- as RunWriter
        pass

    def forward(self, *_: object) -> None:
        pass

    def write(self, *_: object) -> None:
        pass

    def discard_after(self, update: int) -> None:
        pass


def _onwards_from(out: Path, recorded: int) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from, with all records before it if there is such a one.

    Records end before the newest checkpoint only if their file is damaged.
    """
    newest, problems = newest_checkpoint(out)
    if newest is None or newest.update <= recorded:
        return newest, problems
    lost = f"records of updates {recorded + 1} to {newest.update} are lost"
    older, _ = newest_checkpoint(out, until=recorded)
    if older is None:
        return newest, [*problems, lost]
    return older, [*problems, f"{lost} and made again"]


def check_frames(config: TrainConfig, out: Path, checkpoint: Checkpoint) -> None:
    """Raise if a run has done more than is asked for: what it has learned is not undone.

    Args:
        config: The settings that are asked for.
        out: The run folder.
        checkpoint: Its newest checkpoint.

    Raises:
        UsageError: If fewer frames are asked for than are done.
    """
    done = (checkpoint.update + 1) * config.copies * config.steps
    check(
        checkpoint.update < config.updates,
        "frames",
        f"be at least the {done:,} that {out} has done",
        config.frames,
    )


def check_same_settings(config: TrainConfig, out: Path, *, but: Sequence[str] = ()) -> None:
    """Raise if a run was started with other settings: going on with it would mix the two.

    Args:
        config: The settings that are asked for.
        out: A run folder.
        but: Names of settings that may differ.

    Raises:
        UsageError: If a setting differs, or what the run has learned has unknown settings.
    """
    kept = open_run(out).config
    if not kept:
        if newest_checkpoint(out)[0]:
            raise UsageError(f"{out} has lost its settings (run.json). Choose another --out.")
        return
    differing = differing_settings(kept, config, but=but)
    if differing:
        raise UsageError(
            f"{out} was trained with {differing}. Choose another --out, or remove that folder."
        )


def train_settings(settings: Mapping[str, Any], out: Path) -> None:
    """Train from plain settings, as a worker process is handed them; resumes what was cut off.

    Args:
        settings: What `TrainConfig` takes.
        out: The run folder.
    """
    train_run(TrainConfig.model_validate(settings), out, resume=True)

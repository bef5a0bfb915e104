"""One run of a sweep, as the process that trains it sees it."""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

from gradlab.checks import Failed, UsageError
from gradlab.run_writer import check_no_links, make_folder
from trainers.config import TrainConfig
from trainers.train import train_run

OUTPUT = "output.txt"
"""The file in a run's folder for what its training says, and whatever its libraries print."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A training to be done somewhere.

    Attributes:
        name: The run's name.
        settings: What `TrainConfig` takes.
        folder: The run's folder, absolute.
        threads: Threads that it computes with.
    """

    name: str
    settings: Mapping[str, Any]
    folder: Path
    threads: int


@dataclass(frozen=True, kw_only=True)
class State:
    """How a run of a sweep stands.

    Attributes:
        kind: "kept": it was done before; "died": its process ended without a word.
        cause: Why it failed or died, in a line.
    """

    kind: Literal["waiting", "running", "kept", "done", "stopped", "failed", "died"]
    cause: str = ""


def open_output(folder: Path) -> TextIO:
    """Open the file for what a run's training says, to add to it.

    Args:
        folder: The run's folder; need not exist.

    Returns:
        The file.

    Raises:
        UsageError: If the folder can't be made, or a name in it leads elsewhere, where nothing is
            to be written.
    """
    make_folder(folder)
    check_no_links(folder)
    return (folder / OUTPUT).open("a", encoding="utf-8", buffering=1)


def train_task(task: Task, stop: Callable[[], bool] = lambda: False) -> State:
    """Train, or go on where it was cut off.

    Args:
        task: The training.
        stop: Asked after each update whether to stop there.

    Returns:
        "done", "stopped" or "failed"; what goes wrong is no exception but a cause.
    """
    said = task.folder / OUTPUT
    try:
        opened = open_output(task.folder)
    except UsageError as error:
        return State(kind="failed", cause=str(error))
    with opened as output:
        try:
            finished = train_run(
                TrainConfig.model_validate(task.settings),
                task.folder,
                resume=True,
                stop=stop,
                tell=partial(_write_line, output),
            )
        except (UsageError, Failed) as error:
            return State(kind="failed", cause=str(error))
        except Exception as error:  # whatever it is, the other runs go on
            traceback.print_exc(file=output)
            message = " ".join(str(error).split())[:300]
            cause = f"{type(error).__name__}: {message}; see {said}"
            return State(kind="failed", cause=cause)
    if not said.stat().st_size:
        said.unlink()
    return State(kind="done" if finished else "stopped")


def _write_line(output: TextIO, sentence: str) -> None:
    output.write(f"{sentence}\n")

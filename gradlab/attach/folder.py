"""The run folder of somebody else's loop: found, opened, and closed however the loop ends."""

import itertools
import sys
import warnings
from pathlib import Path

from gradlab.checks import UsageError
from gradlab.run import open_run
from gradlab.run_writer import NotWritten, RunWriter, is_run


def next_update(folder: Path) -> int:
    """Find out where a run goes on.

    Args:
        folder: The run's, or one that holds none yet.

    Returns:
        The number that follows its last update; 0 if it has none.
    """
    if not is_run(folder):
        return 0
    run = open_run(folder)
    updates = itertools.chain.from_iterable(run.updates(name) for name in run.quantities)
    return 1 + max(updates, default=-1)


def new_folder() -> Path:
    """Find a folder that is not there yet.

    Returns:
        One in runs/.
    """
    return next(
        folder for i in itertools.count() if not (folder := Path("runs", f"probe-{i}")).exists()
    )


def opened(folder: Path, *, resume: bool) -> RunWriter:
    """Open a run to write to it.

    Args:
        folder: Where.
        resume: Whether to go on with one that is there.

    Returns:
        The writer.

    Raises:
        UsageError: If the folder can't be used, in the words of the library.
    """
    try:
        return RunWriter(folder, resume=resume)
    except UsageError as error:
        said = str(error).replace("another --out", "another `out`")
        raise UsageError(said.replace("add --resume", "pass resume=True")) from None


def close(writer: RunWriter, state: str) -> None:
    """Say how a run ended, and leave it.

    Args:
        writer: Its writer.
        state: "done" or "stopped".
    """
    try:
        writer.describe(state=state)
    except NotWritten as error:  # a loop is not to fail after its last step
        warnings.warn(f"gradlab: {error}: the run will be shown as died.", stacklevel=2)
    writer.__exit__(None, None, None)


def fail(writer: RunWriter, error: BaseException) -> None:
    """Say that a run failed, and leave it.

    Args:
        writer: Its writer.
        error: What it failed with.
    """
    writer.__exit__(type(error), error, error.__traceback__)


def finish(writer: RunWriter) -> None:
    """Leave a run whose loop has ended, or whose probe nobody holds any more.

    Args:
        writer: Its writer.
    """
    error = getattr(sys, "last_value", None)
    if isinstance(error, BaseException):
        fail(writer, error)
    else:
        close(writer, "done")

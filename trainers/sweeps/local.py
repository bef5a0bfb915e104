"""Trainings side by side on this machine, each in a process of its own."""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from gradlab.checks import UsageError
from trainers.sweeps.engine import Engine
from trainers.sweeps.task import State, Task, open_output, train_task

_PRELOADED = ["__main__", "gradlab.__main__", "trainers.sweeps.local", "torch._dynamo"]
_POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def cores() -> int:
    """Count the cores that this process may use.

    Returns:
        Their number.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalEngine(Engine):
    """Processes on this machine, forked from one that has everything imported."""

    def __init__(self, *, slots: int) -> None:
        self._slots = slots
        methods = multiprocessing.get_all_start_methods()
        # Forked copies of a process that has used torch's threads can hang.
        self._context = multiprocessing.get_context(
            "forkserver" if "forkserver" in methods else "spawn"
        )
        self._context.set_forkserver_preload(_PRELOADED)
        self._running: dict[str, tuple[BaseProcess, Connection]] = {}

    @property
    def slots(self) -> int:
        """Trainings at once."""
        return self._slots

    def start(self, task: Task) -> None:
        """Begin a training.

        Args:
            task: The training.
        """
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(  # type: ignore[attr-defined]
            target=_train, args=(task, sender), name=task.name, daemon=True
        )
        with _environment(dict.fromkeys(_POOLS, str(task.threads))):
            process.start()
        sender.close()
        self._running[task.name] = process, receiver

    def ended(self, seconds: float) -> Iterator[tuple[str, State]]:
        """Wait for trainings to end.

        Args:
            seconds: How long to wait at most.

        Yields:
            Names of those that have ended, and how.
        """
        ready = set(wait([process.sentinel for process, _ in self._running.values()], seconds))
        for name, (process, receiver) in list(self._running.items()):
            if process.sentinel not in ready:
                continue
            process.join()
            del self._running[name]
            try:
                state = receiver.recv()
            except (EOFError, OSError):
                state = State(kind="died", cause=_cause(process.exitcode))
            receiver.close()
            process.close()
            yield name, state

    def stop(self) -> None:
        """Ask all trainings to stop after the update in flight."""
        for process, _ in self._running.values():
            process.terminate()

    def close(self) -> None:
        """End what still runs, at once."""
        for process, _ in self._running.values():
            process.kill()


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    return f"its process ended with status {code}"


def _train(task: Task, sender: Connection) -> None:
    """What a worker process does; it ends by itself when its parent is gone."""
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True

    # A terminal sends Ctrl-C to all its processes; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, ask)
    parent = multiprocessing.parent_process()
    try:
        with open_output(task.folder) as output:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
    except UsageError as error:
        sender.send(State(kind="failed", cause=str(error)))
        return

    def stop() -> bool:
        return asked or (parent is not None and not parent.is_alive())

    sender.send(train_task(task, stop))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables that processes made meanwhile inherit, but for those that the user has set."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]

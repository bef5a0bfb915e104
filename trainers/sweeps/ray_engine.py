"""Trainings on a Ray cluster, or on this machine by Ray; all nodes see the same folders."""

import importlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

from gradlab.checks import UsageError
from gradlab.extras import require
from trainers.sweeps.engine import Engine
from trainers.sweeps.task import State, Task, train_task

_PORT = 10001  # of Ray clients
_PATIENCE = 5.0  # seconds


class RayEngine(Engine):
    """Ray tasks, each with as many cores as it has threads.

    A task whose process or node is lost is not tried again by Ray but by the sweep, which knows
    whether it came further. To be asked to stop, a task is killed: what it did since its newest
    checkpoint is done again, to the same bits.
    """

    def __init__(self, *, threads: int, jobs: int | None, address: str | None) -> None:
        require("ray", "ray", needs="`--engine ray` needs")
        if address is not None:
            _check_reachable(address)
        self._ray: Any = importlib.import_module("ray")
        here = {} if address else {"num_cpus": jobs and jobs * threads, "include_dashboard": False}
        try:
            self._ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **here,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            cause = " ".join(str(error).split())
            raise UsageError(f"the Ray cluster at {address} can't be used: {cause}.") from None
        self._threads, self._jobs = threads, jobs
        self._running: dict[Any, str] = {}

    @property
    def slots(self) -> int:
        """Trainings at once: as many as the cluster has cores for at the moment."""
        found = self._ray.cluster_resources().get("CPU", 1)
        return self._jobs or max(1, int(found) // self._threads)

    def start(self, task: Task) -> None:
        """Begin a training.

        Args:
            task: The training.
        """
        train = self._ray.remote(num_cpus=task.threads, max_retries=0, max_calls=1)(train_task)
        self._running[train.remote(task)] = task.name

    def ended(self, seconds: float) -> Iterator[tuple[str, State]]:
        """Wait for trainings to end.

        Args:
            seconds: How long to wait at most.

        Yields:
            Names of those that have ended, and how.
        """
        if not self._running:
            return
        ready, _ = self._ray.wait(list(self._running), timeout=seconds)
        for reference in ready:
            name = self._running.pop(reference)
            try:
                state = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                cause = f"Ray lost it: {str(error).strip().splitlines()[0]}"
                state = State(kind="died", cause=cause)
            yield name, state

    def stop(self) -> None:
        """End all trainings."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)

    def close(self) -> None:
        """End what still runs, and leave the cluster."""
        if self._ray.is_initialized():
            self.stop()
            self._ray.shutdown()
        self._running.clear()


def _check_reachable(address: str) -> None:
    """Ray itself waits long, and ends the process rather than say so."""
    if address in {"auto", "local"}:
        return
    host, _, port = address.removeprefix("ray://").partition(":")
    if not host or not (port or str(_PORT)).isdecimal():
        raise UsageError(f"`address` must be HOST:PORT. Got address={address!r}.")
    try:
        socket.create_connection((host, int(port or _PORT)), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"no Ray cluster can be reached at {address}: {error}. Start one there (`ray start "
            "--head`), or leave out --address."
        ) from None

"""Processes that step an environment's copies, each some of them, and the memory they share."""

import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from trainers.envs.vector_env import EnvironmentFailed

_PATIENCE = 5.0
"""Seconds that a worker is given to end when it has been told to."""

# The script is run by its path: to import it as a part of its package would import torch as well,
# which takes longer than the simulator and far more memory.
_START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
)


@dataclass(frozen=True, kw_only=True)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    errors: IO[bytes]  # what it says on standard error
    name: str


class Workers:
    """Worker processes, each with its own share of an environment's copies.

    A worker reads requests, JSON lists of a command and its arguments, from the connection whose
    file descriptor is its first argument, and answers each with JSON. Its first request is
    `["make", settings, first, last]`, with the first of its copies and the one after its last. The
    second argument is the descriptor of the memory that all share, whose layout comes with
    `["attach", layout]`: a name, type, shape and offset for each array. It ends when its
    connection is closed, as it is when this process dies, however that happens.

    Workers are in a session of their own, so that Ctrl-C in the terminal reaches this process
    alone.
    """

    def __init__(
        self, script: Path, *, environment: str, copies: int, number: int, patience: float
    ) -> None:
        """Start nothing yet.

        Args:
            script: What a worker runs.
            environment: Name of the environment, for messages.
            copies: Number of copies.
            number: Number of workers, at most one for each copy.
            patience: Seconds that an answer is waited for.
        """
        self._patience = patience
        self._script = script
        self._environment = environment
        self._parts = [
            (int(part[0]), int(part[-1]) + 1)
            for part in np.array_split(np.arange(copies), min(number, copies))
        ]
        self._workers: list[_Worker] = []
        self._file: IO[bytes] | None = None
        self._stop: weakref.finalize[..., Workers] | None = None

    @property
    def running(self) -> bool:
        """Whether there are workers to be asked."""
        return bool(self._workers)

    def start(self, settings: Mapping[str, Any]) -> list[Any]:
        """Start all workers anew.

        Args:
            settings: What they make their copies of, as JSON can hold it.

        Returns:
            What each worker says of what it has made.

        Raises:
            EnvironmentFailed: If one ends before it has said anything, or says nothing.
        """
        self.stop()
        self._file = _nameless_file()
        for number, (first, last) in enumerate(self._parts):
            copies = f"copy {first}" if last - first == 1 else f"copies {first} to {last - 1}"
            name = f"worker {number} of {len(self._parts)} ({copies})"
            self._workers.append(_start(self._script, self._file, name))
        self._stop = weakref.finalize(self, _end, list(self._workers), self._file)
        try:
            for worker, part in zip(self._workers, self._parts, strict=True):
                self._send(worker, ["make", settings, *part])
            return [self._receive(worker) for worker in self._workers]
        except BaseException:
            self.stop()
            raise

    def share(self, arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
        """Lay out the memory that all processes share.

        Args:
            arrays: Type (NumPy's name) and shape of each array, by name.

        Returns:
            The arrays as tensors that write through to all.
        """
        assert self._file is not None
        layout, size = [], 0
        for name, (kind, shape) in arrays.items():
            layout.append((name, kind, shape, size))
            size += -(-np.dtype(kind).itemsize * int(np.prod(shape)) // 64) * 64
        os.ftruncate(self._file.fileno(), max(size, 1))
        memory = mmap.mmap(self._file.fileno(), max(size, 1))
        self.ask("attach", layout)
        return {
            name: torch.from_numpy(np.ndarray(shape, kind, memory, offset))
            for name, kind, shape, offset in layout
        }

    def ask(self, command: str, *arguments: Any) -> list[Any]:  # noqa: ANN401 -- JSON
        """Let all workers do something at once, and wait for them.

        Args:
            command: What they are to do.
            *arguments: The same for all, as JSON can hold it.

        Returns:
            Each worker's answer.

        Raises:
            EnvironmentFailed: If a worker has died, or does not answer: its name, copies and cause.
                All are stopped. Or if they have been stopped before.
        """
        if not self._workers:
            raise EnvironmentFailed(f"{self._environment}: its workers have ended. Reset it first")
        request = [command, *arguments]
        try:
            for worker in self._workers:
                self._send(worker, request)
            return [self._receive(worker) for worker in self._workers]
        except BaseException:  # an answer that was not waited for would be taken for the next one
            self.stop()
            raise

    def ask_of(self, copy: int, command: str) -> tuple[Any, bytes]:
        """Ask the worker that has a copy for something large.

        Args:
            copy: The copy's number.
            command: What it is to do with it.

        Returns:
            Its answer, and the bytes that it sends with it, if the answer is not null.

        Raises:
            EnvironmentFailed: If the worker has died, or does not answer.
        """
        number = next(i for i, (_, last) in enumerate(self._parts) if copy < last)
        worker = self._workers[number]
        try:
            self._send(worker, [command, copy])
            answer = self._receive(worker)
            return answer, self._receive_bytes(worker)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all workers; they can be started again."""
        if self._stop is not None:
            self._stop()
        self._workers = []
        self._stop = None

    def _send(self, worker: _Worker, request: list[Any]) -> None:
        try:
            worker.connection.send_bytes(json.dumps(request).encode())
        except OSError:
            raise self._death(worker) from None

    def _receive(self, worker: _Worker) -> Any:  # noqa: ANN401 -- JSON
        return json.loads(self._receive_bytes(worker))

    def _receive_bytes(self, worker: _Worker) -> bytes:
        try:
            if worker.connection.poll(self._patience):
                return worker.connection.recv_bytes()
        except (EOFError, OSError):
            raise self._death(worker) from None
        worker.process.kill()  # it would not end when told to, either
        raise EnvironmentFailed(
            f"{self._environment}: {worker.name} has not answered for {self._patience:g} s: it "
            "hangs, or was stopped. If it is only slow, give more with --env-arg patience=SECONDS"
        )

    def _death(self, worker: _Worker) -> EnvironmentFailed:
        """Find out of what a worker died."""
        try:
            status = worker.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            status = worker.process.wait()
        worker.errors.seek(0)
        said = worker.errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "")
        if status == -signal.SIGKILL:
            cause = "was killed by SIGKILL (by someone, or by the system for want of memory)"
        elif status < 0:
            cause = f"was killed by {signal.Signals(-status).name}"
        else:
            cause = f"failed: {last}" if last else f"left with status {status}"
        return EnvironmentFailed(f"{self._environment}: {worker.name} {cause}")


def processor_cores() -> int:
    """Count the cores that this process may use.

    Returns:
        Their number.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _nameless_file() -> IO[bytes]:
    """A file that has no name, so that nothing is left of it whatever happens."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("gradlab"), "w+b")
    return tempfile.TemporaryFile()


def _start(script: Path, memory: IO[bytes], name: str) -> _Worker:
    ours, theirs = Pipe()
    errors = _nameless_file()
    descriptors = theirs.fileno(), memory.fileno()
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _START,
            json.dumps([os.path.abspath(path) for path in sys.path]),
            str(script),
            *map(str, descriptors),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        pass_fds=descriptors,
        start_new_session=True,
        # Copies are what is shared out among the cores, not the arithmetic of one.
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ},
    )
    theirs.close()
    return _Worker(process=process, connection=ours, errors=errors, name=name)


def _end(workers: list[_Worker], memory: IO[bytes]) -> None:
    memory.close()
    for worker in workers:
        worker.connection.close()
    for worker in workers:
        try:
            worker.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
        worker.errors.close()

"""What takes a run's records elsewhere, and how one that fails leaves the training alone."""

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from gradlab.sinks.record import Record


@dataclass(frozen=True, kw_only=True)
class About:
    """The run that a sink is opened for.

    Attributes:
        folder: Its folder.
        info: What its run.json says: method, environment, agent_names, config, and so on.
        first: The update that is recorded first. An earlier life of the run may have recorded it,
            and later ones, before it was killed; these are made again.
    """

    folder: Path
    info: Mapping[str, Any]
    first: int = 0

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def id(self) -> str:
        """What tells the run from all others and stays when it is resumed."""
        return str(self.info.get("id", self.name))

    @property
    def agents(self) -> list[str]:
        """The agents' names; none if the run does not say them."""
        return [str(name) for name in self.info.get("agent_names", ())]

    @property
    def settings(self) -> dict[str, Any]:
        """Method, environment, seed and so on, and the whole configuration by dotted names."""
        kept = ("method", "algorithm", "environment", "agents", "seed", "updates")
        about = {name: self.info[name] for name in kept if name in self.info}
        return about | _flat(self.info.get("config", {}))


@runtime_checkable
class Sink(Protocol):
    """Takes a run's records elsewhere.

    Whatever a sink raises ends only that sink: the training goes on, and its user is told once.
    Random states are put back after each call.
    """

    def open(self, about: About) -> None:
        """Begin, or go on with, a run.

        Args:
            about: The run.
        """

    def write(self, record: Record) -> None:
        """Take what one update recorded; called after the run folder has it.

        Args:
            record: Labelled arrays, single numbers by tag, embeddings.
        """

    def close(self, state: str) -> None:
        """End.

        Args:
            state: The run's: "done", "stopped" or "failed".
        """


class Forwarding:
    """Hands records to sinks, and lets go of a sink that fails."""

    def __init__(
        self, sinks: Sequence[Sink], about: About, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        """Open the sinks.

        Args:
            sinks: The sinks.
            about: The run.
            tell: Given a sentence for each sink that fails.
        """
        self._sinks = list(sinks)
        self._tell = tell
        self._each(lambda sink: sink.open(about))

    def write(self, record: Record) -> None:
        """Hand on what one update recorded.

        Args:
            record: The record.
        """
        self._each(lambda sink: sink.write(record))

    def close(self, state: str) -> None:
        """Close the sinks.

        Args:
            state: The run's.
        """
        self._each(lambda sink: sink.close(state))
        self._sinks = []

    def _each(self, call: Callable[[Sink], None]) -> None:
        self._sinks = [sink for sink in self._sinks if self._works(sink, call)]

    def _works(self, sink: Sink, call: Callable[[Sink], None]) -> bool:
        try:
            with _same_random_states():
                call(sink)
        except Exception as error:
            said = " ".join(str(error).split())
            self._tell(
                f"{type(sink).__name__} failed, and gets nothing more of this run, which goes on "
                f"and is whole in its own folder: {type(error).__name__}: {said}"
            )
            return False
        return True


@contextmanager
def _same_random_states() -> Iterator[None]:
    """Leave random states as they were, whatever a tool draws to name its runs."""
    torch = sys.modules.get("torch")  # what reads runs does without it
    of_python, of_numpy = random.getstate(), np.random.get_state()
    of_torch = torch.get_rng_state() if torch else None
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        if torch:
            torch.set_rng_state(of_torch)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inside = isinstance(value, Mapping)
        found |= _flat(value, f"{prefix}{name}.") if inside else {prefix + name: value}
    return found

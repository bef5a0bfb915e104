"""What an engine is to a sweep: it trains, and says how that ended."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from trainers.sweeps.task import State, Task


class Engine(ABC):
    """What trains."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """Trainings at once."""

    @abstractmethod
    def start(self, task: Task) -> None:
        """Begin a training.

        Args:
            task: The training.
        """

    @abstractmethod
    def ended(self, seconds: float) -> Iterator[tuple[str, State]]:
        """Wait for trainings to end.

        Args:
            seconds: How long to wait at most.

        Returns:
            Names of those that have ended, and how: "died" if they did not come to say so.
        """

    @abstractmethod
    def stop(self) -> None:
        """Ask all trainings to stop."""

    @abstractmethod
    def close(self) -> None:
        """End what still runs, at once."""

"""The sinks that gradlab brings, by name."""

from collections.abc import Callable, Sequence
from pathlib import Path

from gradlab.checks import UsageError
from gradlab.registry import Registry
from gradlab.sinks.mlflow import MLflow
from gradlab.sinks.sink import Sink
from gradlab.sinks.tensorboard import TensorBoard
from gradlab.sinks.wandb import WeightsAndBiases

SINKS: Registry[Callable[[Path | None], Sink]] = Registry(
    "sink", {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
)
"""Called with the folder to write to, None for each tool's own choice."""


def make_sinks(wanted: Sequence[str | Sink]) -> list[Sink]:
    """Make sinks ready to be opened.

    Args:
        wanted: Names in `SINKS`, or sinks.

    Returns:
        Sinks, in the same order.

    Raises:
        UsageError: If there is no such sink, or what it needs is not installed.
    """
    made: list[Sink] = []
    for sink in wanted:
        if isinstance(sink, str):
            made.append(SINKS[sink](None))
        elif isinstance(sink, Sink) and not isinstance(sink, type):
            made.append(sink)
        else:
            raise UsageError(
                f"`sinks` must hold names ({', '.join(SINKS)}), or objects with `open`, `write` "
                f"and `close`. Got {sink!r}."
            )
    return made

"""Where a sweep's trainings run, by name."""

from collections.abc import Callable

from gradlab.checks import UsageError, check
from gradlab.registry import Registry
from trainers.sweeps.engine import Engine
from trainers.sweeps.local import LocalEngine, cores
from trainers.sweeps.ray_engine import RayEngine


def _local(threads: int, jobs: int | None, address: str | None) -> Engine:
    if address is not None:
        raise UsageError(
            f"`--address` is for a cluster. Add --engine ray. Got address={address!r}."
        )
    return LocalEngine(slots=jobs or max(1, cores() // threads))


def _ray(threads: int, jobs: int | None, address: str | None) -> Engine:
    return RayEngine(threads=threads, jobs=jobs, address=address)


ENGINES: Registry[Callable[[int, int | None, str | None], Engine]] = Registry(
    "engine", {"local": _local, "ray": _ray}
)


def make_engine(
    name: str, *, threads: int = 1, jobs: int | None = None, address: str | None = None
) -> Engine:
    """Make an engine by its name.

    Args:
        name: "local" or "ray".
        threads: Threads of one training at most.
        jobs: Trainings at once; by default as many as the cores suffice for.
        address: Of a Ray cluster, host and port; by default one is started on this machine.

    Returns:
        The engine.

    Raises:
        UsageError: If there is no such engine, it is not installed, or can't be reached.
    """
    check(jobs is None or jobs >= 1, "jobs", "be at least 1", jobs)
    return ENGINES[name](threads, jobs, address)

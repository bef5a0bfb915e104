"""Environments by name."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from gradlab.checks import check, unknown_name
from trainers.envs.blind_spread import GROUPS, BlindSpread
from trainers.envs.mamujoco import MujocoEnv, mamujoco_names
from trainers.envs.matrix_games import NAMES, MatrixGame
from trainers.envs.own import SEPARATOR, make_own
from trainers.envs.pettingzoo import make_pettingzoo, module_names
from trainers.envs.smax import SmaxEnv, map_names
from trainers.envs.vector_env import VectorEnv
from trainers.envs.vmas import VmasEnv, scenario_files


class Family(NamedTuple):
    """Environments whose names begin alike.

    Attributes:
        names: Lists what can be made here, without what all names begin with; empty if a package
            that the family needs is not installed.
        make: Makes one, from its name and the keyword arguments of `make_env`; raises UsageError,
            which says what to install, if a package is not installed.
    """

    names: Callable[[], Iterable[str]]
    make: Callable[..., VectorEnv]


FAMILIES = {
    "smax": Family(map_names, SmaxEnv),
    "vmas": Family(scenario_files, VmasEnv),
    "bps": Family(lambda: GROUPS, BlindSpread),
    "pettingzoo": Family(module_names, make_pettingzoo),
    "mamujoco": Family(mamujoco_names, MujocoEnv),
}
"""By what their names begin with, before the slash."""


def environment_names() -> list[str]:
    """List the environments that can be made.

    Returns:
        Their registered names.
    """
    return [
        *NAMES,
        *(f"{family}/{name}" for family, (names, _) in FAMILIES.items() for name in names()),
    ]


def make_env(
    name: str,
    *,
    copies: int,
    agents: int | None = None,
    seed: int = 0,
    args: Mapping[str, object] | None = None,
    info: bool = False,
) -> VectorEnv:
    """Make an environment by its registered name.

    Args:
        name: E.g. "specialisation", "vmas/navigation", or one's own "my_module:make_env".
        copies: Number of copies stepped at once.
        agents: Number of agents; None for the environment's own default.
        seed: Seed of all its randomness.
        args: Keyword arguments to the environment.
        info: Whether steps bring what the environment measures itself.

    Returns:
        The environment, to be reset before its first step.

    Raises:
        UsageError: If the name, an argument or a number is not one that exists, or a package that
            the environment needs is not installed.
    """
    check(copies >= 1, "copies", "be at least 1", copies)
    check(agents is None or agents >= 1, "agents", "be at least 1", agents)
    args = args or {}
    if name in NAMES:
        return MatrixGame(name, copies=copies, agents=agents, args=args)
    family, slash, own = name.partition("/")
    if slash and family in FAMILIES:
        make = FAMILIES[family].make
        return make(own, copies=copies, agents=agents, seed=seed, args=args, info=info)
    if SEPARATOR in name:
        return make_own(name, copies=copies, agents=agents, seed=seed, args=args, info=info)
    raise unknown_name("environment", name, environment_names())

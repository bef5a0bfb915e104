"""Environments by name."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from gradlab.checks import check, unknown_name
from trainers.envs.blind_spread import GROUPS, BlindSpread
from trainers.envs.mamujoco import MujocoEnv, find_partition, mamujoco_names
from trainers.envs.matrix_games import NAMES, MatrixGame
from trainers.envs.own import SEPARATOR, make_own
from trainers.envs.pettingzoo import make_pettingzoo, module_names
from trainers.envs.smax import SmaxEnv, map_names
from trainers.envs.vector_env import VectorEnv, cant_be_split
from trainers.envs.vmas import VmasEnv, scenario_files
from trainers.processes import Share


class Family(NamedTuple):
    """Environments whose names begin alike.

    Attributes:
        names: Lists what can be made here, without what all names begin with; empty if a package
            that the family needs is not installed.
        make: Makes one, from its name and the keyword arguments of `make_env`; raises UsageError,
            which says what to install, if a package is not installed.
        packages: Distributions that its environments are from.
        splits: Whether some copies alone can be what they are among all, which an argument `share`
            then asks for.
        accepts: Raises UsageError for what no environment is called; by default what `names` does
            not list.
    """

    names: Callable[[], Iterable[str]]
    make: Callable[..., VectorEnv]
    packages: tuple[str, ...]
    splits: bool = True
    accepts: Callable[[str], object] | None = None


FAMILIES = {
    "smax": Family(map_names, SmaxEnv, ("jaxmarl", "jax")),
    "vmas": Family(scenario_files, VmasEnv, ("vmas",)),
    "bps": Family(lambda: GROUPS, BlindSpread, (), splits=False),
    "pettingzoo": Family(
        module_names,
        make_pettingzoo,
        ("pettingzoo", "gymnasium", "mpe2"),
        accepts=lambda _: None,  # any module, which only importing it would tell
    ),
    "mamujoco": Family(
        mamujoco_names,
        MujocoEnv,
        ("gymnasium-robotics", "mujoco"),
        accepts=find_partition,  # some robots have more than can be listed
    ),
}
"""By what their names begin with, before the slash."""


def environment_names() -> list[str]:
    """List the environments that can be made.

    Returns:
        Their registered names.
    """
    return [
        *NAMES,
        *(f"{prefix}/{name}" for prefix, family in FAMILIES.items() for name in family.names()),
    ]


def check_name(name: str) -> None:
    """Raise for a name by which no environment can be made, as far as is known without any import.

    What only the environment itself would refuse is let through: a module of PettingZoo's or one's
    own, and names of a family whose packages are not installed.

    Args:
        name: An environment's name, as `make_env` takes it.

    Raises:
        UsageError: If there is none of that name.
    """
    prefix, slash, own = name.partition("/")
    if not slash or prefix not in FAMILIES:
        if name not in NAMES and SEPARATOR not in name:
            raise unknown_name("environment", name, environment_names())
        return
    family = FAMILIES[prefix]
    if family.accepts:
        family.accepts(own)
    elif (known := list(family.names())) and own not in known:
        raise unknown_name("environment", name, [f"{prefix}/{other}" for other in known])


def packages_of(name: str) -> tuple[str, ...]:
    """Look up which packages an environment is from.

    Args:
        name: An environment's name, as `make_env` takes it.

    Returns:
        Names under which they are distributed; none for gradlab's and one's own.
    """
    family = FAMILIES.get(name.partition("/")[0])
    return family.packages if family else ()


def make_env(
    name: str,
    *,
    copies: int,
    agents: int | None = None,
    seed: int = 0,
    args: Mapping[str, object] | None = None,
    info: bool = False,
    share: Share | None = None,
) -> VectorEnv:
    """Make an environment by its registered name.

    Args:
        name: E.g. "specialisation", "vmas/navigation", or one's own "my_module:make_env".
        copies: Number of copies stepped at once.
        agents: Number of agents; None for the environment's own default.
        seed: Seed of all its randomness.
        args: Keyword arguments to the environment.
        info: Whether steps bring what the environment measures itself.
        share: Which copies to make, if other processes have others; None: all.

    Returns:
        The environment, to be reset before its first step.

    Raises:
        UsageError: If the name, an argument or a number is not one that exists, a package that the
            environment needs is not installed, or its copies can't be shared out.
    """
    check(copies >= 1, "copies", "be at least 1", copies)
    check(agents is None or agents >= 1, "agents", "be at least 1", agents)
    args = args or {}
    if name in NAMES:
        env: VectorEnv = MatrixGame(name, copies=copies, agents=agents, args=args)
        env.share = share
        return env
    asked: dict[str, Any] = {"agents": agents, "seed": seed, "args": args, "info": info}
    asked["copies"] = copies
    family, slash, own = name.partition("/")
    splits, make = True, partial(make_own, name)
    if slash and family in FAMILIES:
        splits, make = FAMILIES[family].splits, partial(FAMILIES[family].make, own)
    elif SEPARATOR not in name:
        raise unknown_name("environment", name, environment_names())
    if share is None:
        return make(**asked)
    if not splits:
        raise cant_be_split(name, "its copies draw from one stream of random numbers")
    env = make(**asked, share=share)
    env.share = share
    return env

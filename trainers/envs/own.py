"""Environments of the user's own, by `module:function`."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradlab.checks import UsageError, check, unknown_name
from gradlab.run_writer import is_run
from trainers.envs.parallel_copies import ParallelCopies, in_one_line
from trainers.envs.vector_env import VectorEnv, cant_be_split
from trainers.processes import Share

SEPARATOR = ":"


def make_own(
    name: str,
    *,
    copies: int,
    agents: int | None,
    seed: int,
    args: Mapping[str, Any],
    info: bool = False,
    share: Share | None = None,
) -> VectorEnv:
    """Make what a function of the user's makes.

    The function is given `args`, and what it has parameters for of `agents`, `copies`, `seed` and
    `info`. One with a parameter `copies` returns a `VectorEnv` of so many; any other is called once
    for each copy and returns an environment with PettingZoo's parallel interface.

    Args:
        name: E.g. "my_package.my_module:make_env"; modules in the current directory are found.
        copies: Number of copies.
        agents: Number of agents; None for the environment's own default.
        seed: Seed of all its randomness.
        args: Keyword arguments to the function.
        info: Whether steps bring what the environment measures itself.
        share: Which copies they are; None: all.

    Returns:
        The environment.

    Raises:
        UsageError: If there is no such function, it raises an error, or returns something else.
    """
    make = _found(name)
    with in_one_line(f"{name}: reading its signature", UsageError):
        parameters = inspect.signature(make).parameters
    offered = {"copies": copies, "agents": agents, "seed": seed, "info": info}
    given = {
        key: value
        for key, value in offered.items()
        if key in parameters and not (key == "agents" and value is None)
    } | dict(args)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in args:
        if not takes_all and key not in parameters:
            raise unknown_name(f"argument of {name}", key, parameters)
    if "copies" not in parameters:
        return ParallelCopies(
            name,
            lambda: make(**given),
            copies=copies,
            agents=agents,
            seed=seed,
            info=info,
            share=share,
        )
    if share is not None:
        raise cant_be_split(name, "it makes all copies at once, from one seed")
    with in_one_line(f"{name}: making it", UsageError):
        env = make(**given)
    if not isinstance(env, VectorEnv):
        raise UsageError(
            f"{name} must return a trainers.envs.vector_env.VectorEnv, as it has a parameter "
            f"`copies`. Got a {type(env).__name__}."
        )
    check(env.copies == copies, "copies", f"be {copies} in what {name} returns", env.copies)
    check(agents in {None, env.spec.agents}, "agents", f"be {env.spec.agents} in {name}", agents)
    return env


def check_not_of_a_run(name: str, module: str) -> None:
    """Refuse code that lies in a run folder: a run from somebody else must not bring its own.

    Args:
        name: The environment's name, which may be what such a run says.
        module: The module that would be imported for it.

    Raises:
        UsageError: If it would be found in a run folder.
    """
    parts = module.split(".")
    for base in (os.getcwd(), *sys.path):
        place = Path(base).resolve().joinpath(*parts)
        first = Path(base, parts[0])
        if (first.is_dir() or first.with_suffix(".py").is_file()) and any(
            is_run(folder) for folder in (place, *place.parents)
        ):
            raise UsageError(
                f"{name}: {first.resolve()} lies in a run folder, from which no code is taken. "
                "Move it elsewhere if you trust it."
            )


def _found(name: str) -> Callable[..., Any]:
    """The function that a name leads to."""
    module, _, attribute = name.partition(SEPARATOR)
    parts = [*module.split("."), attribute]
    if not all(part.isidentifier() for part in parts):
        raise UsageError(
            f"an environment of your own must be named module{SEPARATOR}function, e.g. "
            f"my_package.my_module{SEPARATOR}make_env. Got {name!r}."
        )
    check_not_of_a_run(name, module)
    here = os.getcwd()
    # A console script's path does not have it, that of `python -m` has. In front while the module
    # is looked for, behind afterwards: a folder in it may be called like a package of gradlab's.
    sys.path.insert(0, here)
    try:
        with in_one_line(f"{name}: importing {module}", UsageError):
            found = importlib.import_module(module)
    except UsageError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{module}.".startswith(f"{missing.name}."):
            raise UsageError(
                f"{name}: there is no module {missing.name} in {here} or among what is installed. "
                "Start gradlab in the folder that it is in, or install it."
            ) from None
        raise
    finally:
        sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)
    make: object = getattr(found, attribute, None)
    if not callable(make):
        known = [
            key
            for key, value in vars(found).items()
            if callable(value)
            and not key.startswith("_")
            and getattr(value, "__module__", None) == module
        ]
        raise unknown_name(f"function of {module}", attribute, known)
    return make

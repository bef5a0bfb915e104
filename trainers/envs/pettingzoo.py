"""PettingZoo's parallel environments (Terry et al., 2021), by the module that makes them."""

import contextlib
import importlib
import importlib.util
import io
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradlab.checks import UsageError, unknown_name
from gradlab.extras import require
from trainers.envs.own import check_not_of_a_run
from trainers.envs.parallel_copies import ParallelCopies, in_one_line
from trainers.processes import Share

EXTRA = "pettingzoo"
_MAKE = "parallel_env"


def module_names() -> list[str]:
    """List the environments of mpe2, which the extra brings, without importing it.

    Returns:
        Names of modules, e.g. "mpe2.simple_spread_v3"; none if it is not installed.
    """
    found = importlib.util.find_spec("mpe2")
    if found is None or found.origin is None:
        return []
    files = sorted(Path(found.origin).parent.glob("*.py"))
    return [f"mpe2.{file.stem}" for file in files if re.search(r"_v\d+$", file.stem)]


def make_pettingzoo(
    module: str,
    *,
    copies: int,
    agents: int | None,
    seed: int,
    args: Mapping[str, Any],
    info: bool = False,
    share: Share | None = None,
) -> ParallelCopies:
    """Make the environment that a module's `parallel_env` makes.

    Args:
        module: Its name, e.g. "mpe2.simple_spread_v3".
        copies: Number of copies.
        agents: The number of agents that is asked for; None: whatever there are.
        seed: Seed of all its randomness.
        args: Keyword arguments to `parallel_env`.
        info: Whether steps bring the numbers in the environment's `infos`.
        share: Which copies they are; None: all.

    Returns:
        The environment.

    Raises:
        UsageError: If there is no such module, or its environment can't be used.
    """
    name = f"pettingzoo/{module}"
    package = module.partition(".")[0]
    check_not_of_a_run(name, module)
    if package in {"pettingzoo", "mpe2"}:
        require(EXTRA, "pettingzoo", package)
    # Pygame greets on standard output, and old names of environments warn that they are old.
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            with in_one_line(f"{name}: importing it", UsageError):
                found = importlib.import_module(module)
        except UsageError as error:
            missing = error.__cause__
            if isinstance(missing, ModuleNotFoundError) and f"{module}.".startswith(
                f"{missing.name}."
            ):
                raise unknown_name("PettingZoo module", module, module_names()) from None
            raise
    make = getattr(found, _MAKE, None)
    if make is None:
        raise UsageError(
            f"{name} must be a module with a function {_MAKE}, as modules of PettingZoo's parallel "
            "environments have. It has none."
        )
    return ParallelCopies(
        name, lambda: make(**args), copies=copies, agents=agents, seed=seed, info=info, share=share
    )

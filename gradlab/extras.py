"""Packages beyond gradlab's own that a choice needs, and how to install them."""

import importlib.util

from gradlab.checks import UsageError


def installed(*modules: str) -> bool:
    """Tell whether modules can be found, without importing them.

    Args:
        modules: Names of top-level modules.

    Returns:
        Whether all can.
    """
    return all(importlib.util.find_spec(module) is not None for module in modules)


def require(extra: str, *modules: str, needs: str = "") -> None:
    """Raise unless modules can be found; to be called where what needs them is made.

    Args:
        extra: The extra of gradlab that brings them.
        modules: Names of top-level modules.
        needs: What needs them, with its verb (default: the extra's environments).

    Raises:
        UsageError: If one can't be found.

    >>> require("smax", "no_such_module")
    Traceback (most recent call last):
    ...
    gradlab.checks.UsageError: smax environments need no_such_module, which is not installed. \
Install it: pip install 'gradlab[smax]'
    """
    missing = [module for module in modules if not installed(module)]
    if missing:
        raise UsageError(
            f"{needs or f'{extra} environments need'} {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed. Install "
            f"{'it' if len(missing) == 1 else 'them'}: pip install 'gradlab[{extra}]'"
        )

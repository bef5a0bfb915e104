"""Which versions of which packages made something."""

import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

_ALWAYS = ("gradlab", "torch", "numpy")


def versions(*packages: str) -> dict[str, str]:
    """Look up versions of Python, gradlab, what it computes with, and further packages.

    Args:
        packages: Names under which they are distributed.

    Returns:
        Versions by name; of those that are installed.
    """
    found = {"python": platform.python_version()}
    for name in (*_ALWAYS, *packages):
        with suppress(PackageNotFoundError):  # as gradlab, of a source tree that is not installed
            found[name] = version(name)
    return found


def changed(before: object, now: Mapping[str, str]) -> list[str]:
    """Say in which versions a run differs that goes on.

    Args:
        before: What run.json says of them; anything, if somebody wrote it.
        now: Versions by name.

    Returns:
        A text for each that was another.
    """
    if not isinstance(before, dict):
        return []
    return [
        f"{name} {before[name]!s:.40} (now {value})"
        for name, value in now.items()
        if before.get(name, value) != value
    ]

"""The one error wording: what must hold, what was given, and how to mend it."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Bad input: its message is one line that says what, where, got, expected and how to mend.

    The command line prints it without a traceback and leaves with status 2.
    """


class Failed(RuntimeError):
    """What was asked for rightly can't be done: its message is one line that says why.

    The command line prints it without a traceback and leaves with status 1.
    """


class TrainingFailed(Failed):
    """A training that can't go on: its message is one line that says why, and what is saved.

    The command line prints it without a traceback and leaves with status 1.
    """


def check(holds: bool, name: str, rule: str, got: object) -> None:
    """Raise unless an argument obeys its rule.

    Args:
        holds: Whether the rule holds.
        name: The argument, as the user wrote it.
        rule: What must hold, to be read after "must", e.g. "be at least 1".
        got: The value that was given.

    Raises:
        UsageError: If the rule does not hold.

    >>> check(False, "agents", "be at least 1", 0)
    Traceback (most recent call last):
    ...
    gradlab.checks.UsageError: `agents` must be at least 1. Got agents=0.
    """
    if not holds:
        raise UsageError(f"`{name}` must {rule}. Got {name}={got!r}.")


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """Make the error for a name that is not among those that exist.

    Args:
        kind: What the name names, e.g. "method".
        name: The name that was given.
        known: The names that exist.

    Returns:
        The error; its message gives the nearest name, if any is near, and lists all.

    >>> print(unknown_name("method", "hypermal", ["fups", "hypermarl"]))
    Unknown method 'hypermal'. Did you mean 'hypermarl'? Known: fups, hypermarl.
    """
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UsageError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}.")

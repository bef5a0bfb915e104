"""Which cases of a test are left to the slow tests."""

from itertools import product

import pytest


def slow_but(cases, *fast):
    """Mark all cases as slow but some; the code that they run is the same, or nearly so."""
    unknown = set(fast) - set(cases)
    assert not unknown, unknown
    return [case if case in fast else _slow(case) for case in cases]


def covering(*parameters):
    """All combinations; fast are the first of each, the second of each, ...: every value once."""
    most = max(map(len, parameters))
    fast = {tuple(p[n % len(p)] for p in parameters) for n in range(most)}
    return [
        combination if combination in fast else _slow(combination)
        for combination in product(*parameters)
    ]


def _slow(case):
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)

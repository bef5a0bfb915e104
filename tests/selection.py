"""Which cases of a test are left to the slow tests."""

import pytest


def slow_but(cases, *fast):
    """Mark all cases as slow but some; the code that they run is the same, or nearly so."""
    unknown = set(fast) - set(cases)
    assert not unknown, unknown
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]

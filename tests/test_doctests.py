import doctest
import importlib
import pkgutil

import pytest

PACKAGES = ("gradlab", "trainers", "analyses", "dashboards")
MODULES = [
    module.name
    for package in PACKAGES
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("module", [*PACKAGES, *MODULES])
def test_examples_in_docstrings_are_true(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0

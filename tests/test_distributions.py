import ast
import json
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest
from distributions import (
    EXTRAS,
    PROJECT,
    ROOT,
    constraints,
    installed,
    pulled_in,
    rows,
    written,
)
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PACKAGES = ("gradlab", "trainers", "analyses", "dashboards")
NOT_PINNED = {"gradlab", "pip"}  # this project, and what installs it


def declared(requirements):
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def imported():
    """Top-level names of all modules that the packages import."""
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    yield from (alias.name.partition(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    yield node.module.partition(".")[0]


def test_constraints_name_every_distribution_installed_in_its_version():
    pinned = constraints()
    here = {name: found.version for name, found in installed().items() if name not in NOT_PINNED}
    assert {n: v for n, v in here.items() if Version(v).public != pinned.get(n)} == {}


def test_constraints_name_what_the_extras_pull_in_and_nothing_else():
    every = [text for needs in EXTRAS.values() for text in needs]
    needed = pulled_in([*PROJECT["dependencies"], *every]) - NOT_PINNED
    assert needed - constraints().keys() == set()
    left = constraints().keys() - needed
    # What an extra that is not installed pulls in can't be known here; the slow test asks.
    missing = [extra for extra, needs in EXTRAS.items() if declared(needs) - installed().keys()]
    assert not left & installed().keys()
    assert missing or not left


def test_a_distribution_that_is_not_pinned_would_be_noticed(monkeypatch):
    monkeypatch.setitem(globals(), "constraints", lambda: {"numpy": "0"})
    with pytest.raises(AssertionError):
        test_constraints_name_every_distribution_installed_in_its_version()


@pytest.mark.slow
def test_a_fresh_install_resolves_to_the_constraints():
    report = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"),
            *("--report", "-", "--constraint", "constraints.txt", f".[{','.join(EXTRAS)}]"),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout
    chosen = {
        canonicalize_name(found["metadata"]["name"]): found["metadata"]["version"]
        for found in json.loads(report)["install"]
    }
    chosen = {name: Version(v).public for name, v in chosen.items() if name not in NOT_PINNED}
    assert chosen == constraints()


@pytest.mark.slow
def test_what_is_installed_goes_together():
    asked = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert asked.returncode == 0, asked.stdout


def test_packages_import_what_is_declared_and_need_what_they_declare():
    homes = {
        name: {canonicalize_name(home) for home in of}
        for name, of in packages_distributions().items()
    }
    used = [homes[name] for name in set(imported()) - set(PACKAGES) if name in homes]
    core = declared(PROJECT["dependencies"])
    assert core - set().union(*used) == set()
    every = core | declared(text for needs in EXTRAS.values() for text in needs)
    assert [of for of in used if not of & every] == []


def test_licences_are_listed_as_the_packages_state_them():
    listed = written()
    assert listed.keys() == constraints().keys()
    assert {name: row for name, row in rows().items() if listed[name] != row} == {}


def test_what_is_pulled_in_follows_extras_and_markers():
    assert "torch" in pulled_in(["vmas"])
    assert "qpsolvers" in pulled_in(["torchjd[quadprog-projector]"]) - pulled_in(["torchjd"])
    assert pulled_in(["numpy; python_version < '3'"]) == set()

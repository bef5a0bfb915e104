"""What gradlab's extras pull in, and under which licences; run as a script it writes the page.

`python tests/distributions.py` writes docs/licences.md anew. What is constrained but not installed
here (an extra that `make` leaves out) keeps its row.
"""

import re
import sysconfig
from collections.abc import Iterable
from functools import cache
from importlib.metadata import Distribution, distributions
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
HEAD = """# Licences of what gradlab needs

gradlab itself is under the Apache License 2.0. It contains nothing of other packages: an installer
fetches them. `python tests/distributions.py` writes this page from the metadata that the packages
come with, and a test holds it to what is installed; what a package does not state there is not
guessed. "Core" is what every installation has; the rest comes with one of gradlab's extras.

Mind that VMAS, which every installation has for its environments, states the GPL, version 3: who
distributes gradlab and VMAS together distributes something under the GPL.

| package | version | licence | comes with |
| --- | --- | --- | --- |
"""


@cache
def installed() -> dict[str, Distribution]:
    """Distributions of this environment by name."""
    # Where they are installed: Ray, once imported, has others beside it on the path.
    found = distributions(
        path=sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    )
    return {canonicalize_name(d.metadata["Name"]): d for d in found}


def constraints() -> dict[str, str]:
    """Versions in constraints.txt by name."""
    lines = (ROOT / "constraints.txt").read_text().split()
    pins = [line.split("==") for line in lines]
    return {canonicalize_name(name): version for name, version in pins}


def pulled_in(requirements: Iterable[str]) -> set[str]:
    """Names of all that requirements lead to, as far as it is installed."""
    found: set[tuple[str, str]] = set()
    pending = [(Requirement(text), "") for text in requirements]
    while pending:
        wanted, extra = pending.pop()
        if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(wanted.name)
        for of in ("", *wanted.extras):
            if (name, of) not in found:
                found.add((name, of))
                more = installed()[name].requires if name in installed() else ()
                pending += [(Requirement(text), of) for text in more or ()]
    return {name for name, _ in found}


def licence(metadata) -> str:
    """What a distribution states of itself, in a line."""
    if expression := metadata.get("License-Expression"):
        return expression
    classified = [
        line.rpartition(" :: ")[2]
        for line in metadata.get_all("Classifier", ())
        if line.startswith("License :: ") and line != "License :: OSI Approved"
    ]
    if classified:
        return ", ".join(classified)
    lines = [line.strip() for line in (metadata.get("License") or "").splitlines() if line.strip()]
    return lines[0][:80] if lines else "not stated"


def rows() -> dict[str, str]:
    """The page's rows by package, as this environment has them."""
    core = pulled_in(PROJECT["dependencies"])
    return {
        name: f"| {name} | {version} | {licence(installed()[name].metadata).replace('|', '/')} | "
        f"{'core' if name in core else 'an extra'} |"
        for name, version in constraints().items()
        if name in installed()
    }


def written() -> dict[str, str]:
    """The page's rows by package, as they stand."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    return {m[1]: line for line in lines if (m := re.match(r"\| ([a-z0-9-]+) \| [0-9]", line))}


if __name__ == "__main__":
    every = written() | rows()
    PAGE.write_text(HEAD + "".join(f"{every[name]}\n" for name in constraints() if name in every))

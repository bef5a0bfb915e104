"""Entry point of the console script and of `python -m gradlab`."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

_SIBLINGS = ("trainers", "analyses", "dashboards")


class _BesideGradlab(MetaPathFinder):
    """Finds our packages beside this one, whatever a user's own folders are called."""

    @classmethod
    def find_spec(
        cls,
        fullname: str,
        path: object = None,  # noqa: ARG003 -- the protocol's
        target: object = None,  # noqa: ARG003
    ) -> ModuleSpec | None:
        if fullname not in _SIBLINGS:
            return None
        return PathFinder.find_spec(fullname, [str(Path(__file__).parents[1])])


# As this is imported: processes that a command starts import it again, and never call `main`.
sys.meta_path.insert(0, _BesideGradlab())


def main() -> None:
    """Run the command line and leave with its status."""
    from gradlab.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()

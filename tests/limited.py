"""Commands of gradlab in a process whose memory is limited: their statuses and what they said.

    python tests/limited.py MIB < commands

`MIB` may be added to what the process takes when all is imported; `commands` is JSON, a list of
lists of words. Prints JSON, for each command its status and the lines that it wrote to stderr.
"""

import contextlib
import io
import json
import resource
import sys
from importlib import import_module
from pathlib import Path

from gradlab.cli import run

IMPORTED = ("trainers.train", "trainers.sweeps.file", "dashboards.page", "analyses.export")


def limited(commands, mib):
    for name in IMPORTED:  # which would else count as what a command takes
        import_module(name)
    held = next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmSize:")
    )
    most = held * 1024 + mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for words in commands:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = run(words)
        yield status, said.getvalue().splitlines()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(list(limited(json.load(sys.stdin), int(sys.argv[1])))))

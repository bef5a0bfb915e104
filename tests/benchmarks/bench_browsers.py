"""What a training pays for the readers of its dashboard: 50 open pages against none, by turns.

One training in a process of one thread, every tenth update diagnosed, and the server of its run;
`--readers` clients in a process of their own ask what open pages ask (`reader.py`). Every twenty
updates that process is stopped, or goes on, in the order on, off, off, on, so that neither what a
machine does over minutes nor what a training does while it learns falls to one of the two alone.
The server runs throughout. How many seconds of CPU trainer, server and readers took is read from
the system.

    python tests/benchmarks/bench_browsers.py [--readers N] [--pairs P]
"""

import argparse
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from bench_dashboard import served
from measure import write
from reader import Crowd
from scipy.stats import bootstrap

LIMITS = {"slowed by, %": 5}
TURN = 20  # updates: a few seconds, as a machine is not as fast from minute to minute
GAME = {
    "method": "hypermarl",
    "env": "specialisation",
    "agents": 4,
    "copies": 32,
    "steps": 16,
    "every": 10,
    "effects-every": 20,
    "diagnostics": "full",
    "threads": 1,
}


def spent(process):
    """Seconds of CPU that a process has taken (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def look_by_turns(trainer, server, watching, records, turns):
    """Have readers look on in some turns: of each the wall time and CPU of an update, and all CPU."""
    query = "SELECT max(\"update\") FROM record WHERE quantity = 'frames'"
    with closing(sqlite3.connect(f"{records.as_uri()}?mode=ro", uri=True)) as database:

        def newest():
            return database.execute(query).fetchone()[0] or 0

        def wait_until(update):
            while (now := newest()) < update:
                assert trainer.poll() is None
                assert watching.poll() is None, "a reader was not answered well"
                time.sleep(0.01)
            return now

        processes = {"trainer": trainer, "server": server, "readers": watching}
        at = wait_until(newest() + 1)
        for looked_at in turns:
            watching.send_signal(signal.SIGCONT if looked_at else signal.SIGSTOP)
            began, first = time.perf_counter(), at
            before = {name: spent(process.pid) for name, process in processes.items()}
            at = wait_until(first + TURN)
            seconds = time.perf_counter() - began
            cpu = {name: spent(process.pid) - before[name] for name, process in processes.items()}
            found = {
                "readers": looked_at,
                "ms per update": round(1e3 * seconds / (at - first), 2),
                "ms of CPU per update": round(1e3 * cpu["trainer"] / (at - first), 2),
                "CPU": {name: round(used / seconds, 3) for name, used in cpu.items()},
            }
            print(found, flush=True)
            yield found
        watching.send_signal(signal.SIGCONT)


def measure(readers, turns):
    """Train while so many look on by turns: what each turn cost, and what readers were answered."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        words = [word for name, value in GAME.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "gradlab", "train", "--out", str(folder), *words]
        frames = str(10**9)  # it is ended before
        trainer = subprocess.Popen([*command, "--frames", frames], stdout=subprocess.DEVNULL)
        try:
            while not (folder / "run.json").exists():
                assert trainer.poll() is None
                time.sleep(0.05)
            with served(folder) as (address, server):
                words = [sys.executable, __file__, "--watch", address, "--readers", str(readers)]
                watching = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                assert watching.stdout.readline() == b"looking\n"
                records = folder / "records.sqlite"
                found = list(look_by_turns(trainer, server, watching, records, turns))
                said, _ = watching.communicate(b"\n")
                assert watching.returncode == 0, "a reader was not answered well"
        finally:
            trainer.terminate()
            trainer.wait()
    return found, json.loads(said)


def watch(address, readers):
    """Look on until standard input says so."""
    with Crowd(address, readers, thorough=False) as crowd:
        while not all(reader.pages for reader in crowd.readers):  # all have opened their page
            time.sleep(0.1)
            crowd.check()
        print("looking", flush=True)
        sys.stdin.readline()
    asked = sum(reader.asked for reader in crowd.readers)
    received = sum(reader.bytes for reader in crowd.readers)
    pages = sum(reader.pages for reader in crowd.readers)
    print(json.dumps({"requests": asked, "pages": pages, "MB": received / 1e6}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--readers", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--watch", metavar="ADDRESS", help="what a process of readers is given")
    options = parser.parse_args()
    if options.watch:
        watch(options.watch, options.readers)
        return
    order = [turn for n in range(options.pairs) for turn in ((True, False), (False, True))[n % 2]]
    turns, readers = measure(options.readers, order)
    pairs = [
        {turn["readers"]: turn for turn in pair}
        for pair in zip(turns[::2], turns[1::2], strict=True)
    ]
    slowed, dearer = (
        [100 * (pair[True][what] / pair[False][what] - 1) for pair in pairs]
        for what in ("ms per update", "ms of CPU per update")
    )
    low, high = bootstrap((slowed,), np.median, rng=np.random.default_rng(0)).confidence_interval
    found = {
        "limits": LIMITS,
        "readers": options.readers,
        "updates": TURN * len(turns),
        "slowed by, %": {
            "median": round(statistics.median(slowed), 1),
            "interval": [round(float(low), 1), round(float(high), 1)],
            "pairs": [round(percent, 1) for percent in slowed],
            # Of which a machine that is busy with other work says more than of the time.
            "CPU of the trainer, pairs": [round(percent, 1) for percent in dearer],
        },
        "answered": readers,
        "turns": turns,
    }
    print(json.dumps({k: v for k, v in found.items() if k != "turns"}, indent=2))
    write("browsers", found, packages=("torch", "numpy", "plotly", "dash", "waitress"))


if __name__ == "__main__":
    main()

"""What a training pays for the readers of its dashboard: 50 open pages against none, by turns.

A training of fixed work in a process of one thread, every tenth update diagnosed, and the server of
its run; `--readers` clients in a process of their own ask what open pages ask (`reader.py`). Each
round trains once with and once without them; the server runs in both. How many seconds of CPU
trainer, server and readers took is read from the system.

    python tests/benchmarks/bench_browsers.py [--readers N] [--rounds R] [--updates N]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_dashboard import served
from measure import write
from reader import Crowd

from gradlab.run import open_run

LIMITS = {"slowed by, %": 5}
GAME = {
    "method": "hypermarl",
    "env": "specialisation",
    "agents": 4,
    "copies": 32,
    "steps": 16,
    "every": 10,
    "effects-every": 100,
    "diagnostics": "full",
    "threads": 1,
}


def spent(process):
    """Seconds of CPU that a process has taken (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def newest(folder):
    """The last update that a run has recorded; -1 if none."""
    run = open_run(folder)
    update = run.newest("frames") if "frames" in run.quantities else None
    return -1 if update is None else update


def train(folder, frames, readers, log):
    """Train while so many look on: seconds from the first update to the last, and what all took."""
    words = [word for name, value in GAME.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "gradlab", "train", "--out", str(folder), *words]
    trainer = subprocess.Popen([*command, "--frames", str(frames)], stdout=subprocess.DEVNULL)
    while not (folder / "run.json").exists() or newest(folder) < 0:
        assert trainer.poll() is None
        time.sleep(0.05)
    with served(folder) as (address, server):
        watching = None
        if readers:
            words = [sys.executable, __file__, "--watch", address, "--readers", str(readers)]
            watching = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert watching.stdout.readline() == b"looking\n"
        first, began = newest(folder), time.perf_counter()
        cpu = {"trainer": spent(trainer.pid), "server": spent(server.pid)}
        last = frames // (GAME["copies"] * GAME["steps"]) - 1
        while (at := newest(folder)) < last:
            assert trainer.poll() is None, "it ended before its last update"
            time.sleep(0.2)
        seconds = time.perf_counter() - began
        cpu["trainer"] = spent(trainer.pid) - cpu["trainer"]
        cpu["server"] = spent(server.pid) - cpu["server"]
        found = {
            "ms per update": 1e3 * seconds / (at - first),
            "ms of CPU per update": 1e3 * cpu["trainer"] / (at - first),
            "CPU": {},
        }
        if watching:
            cpu["readers"] = spent(watching.pid)
            said, _ = watching.communicate(b"\n")
            assert watching.returncode == 0, "a reader was not answered well"
            found["readers"] = json.loads(said)
        found["CPU"] = {name: round(used / seconds, 3) for name, used in cpu.items()}
    assert trainer.wait() == 0
    log(found)
    return found


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
    slowest = max(reader.slowest for reader in crowd.readers)
    pages = sum(reader.pages for reader in crowd.readers)
    print(json.dumps({"requests": asked, "pages": pages, "MB": received / 1e6, "slowest": slowest}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--readers", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--watch", metavar="ADDRESS", help="what a process of readers is given")
    options = parser.parse_args()
    if options.watch:
        watch(options.watch, options.readers)
        return
    frames = options.updates * GAME["copies"] * GAME["steps"]
    rounds = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as temporary:
            turns = [0, options.readers][:: 1 if number % 2 else -1]
            rounds.append({
                readers: train(Path(temporary) / str(readers), frames, readers, print)
                for readers in turns
            })
    slowed, dearer = (
        [100 * (turn[options.readers][what] / turn[0][what] - 1) for turn in rounds]
        for what in ("ms per update", "ms of CPU per update")
    )
    found = {
        "limits": LIMITS,
        "readers": options.readers,
        "updates": options.updates,
        "slowed by, %": {
            "median": round(statistics.median(slowed), 1),
            "rounds": [round(percent, 1) for percent in slowed],
            # Of which a machine that is busy with other work says more than of the time.
            "CPU of the trainer, rounds": [round(percent, 1) for percent in dearer],
        },
        "rounds": [{str(n): turn[n] for n in turn} for turn in rounds],
    }
    print(json.dumps({k: v for k, v in found.items() if k != "rounds"}, indent=2))
    write("browsers", found, packages=("torch", "numpy", "plotly", "dash", "waitress"))


if __name__ == "__main__":
    main()

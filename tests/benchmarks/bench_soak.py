"""A long training, every update diagnosed, its dashboard followed: does anything grow?

`gradlab train` and `gradlab dashboard --serve` as a user starts them, and a reader that asks what
an open page asks (`reader.py`; a browser would take most of a small machine) from the beginning to
the end. Resident memory of trainer and server is read while they work; its slope is fitted to the
second half of the updates. Then the run is opened, with 100,000 updates or as many as were done in
`--minutes`, after which the training is asked to stop.

With `--opened-at N` only the last is done anew, for a machine that was not quiet then: of a run of
`--updates`, whose records are repeated until there are N updates.

    python tests/benchmarks/bench_soak.py [--updates N] [--minutes M] [--opened-at N] [--note WORDS]
"""

import argparse
import json
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from bench_dashboard import browsing, served
from measure import RESULTS, resident, write
from reader import Reader

from gradlab.run import open_run

COPIES, STEPS = 8, 2
GAME = {
    "method": "hypermarl",
    "env": "specialisation",
    "agents": 2,
    "copies": COPIES,
    "steps": STEPS,
    "every": 1,
    "effects-every": 1000,
    "diagnostics": "full",
    "network.hidden": 8,
    "hypernetwork.hidden": 8,
    "ppo.epochs": 1,
    "ppo.minibatches": 1,
}
LIMITS = {"seconds to open": 2, "MiB per 100,000 updates": 10}
PACKAGES = ("torch", "numpy", "plotly", "dash")


def newest(records):
    """The last update that is recorded, as a plain reader sees it."""
    with closing(sqlite3.connect(f"{records.as_uri()}?mode=ro", uri=True)) as database:
        query = "SELECT max(\"update\") FROM record WHERE quantity = 'frames'"
        return database.execute(query).fetchone()[0] or 0


def soak(folder, updates, minutes):
    """Train until all is done or the time is up.

    Returns:
        How many updates were done; rows of seconds, update and resident MiB; how it was followed.
    """
    command = [sys.executable, "-m", "gradlab", "train", "--out", str(folder)]
    for name, value in (GAME | {"frames": updates * COPIES * STEPS}).items():
        command += [f"--{name}", str(value)]
    began = time.perf_counter()
    records = folder / "records.sqlite"
    trainer = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while trainer.poll() is None and not (records.exists() and (folder / "run.json").exists()):
        time.sleep(0.1)
    rows = []
    with served(folder) as (address, server):
        reader = Reader(address)
        reader.open()
        asked = False
        while trainer.poll() is None:
            time.sleep(reader.pause)
            reader.look()
            if not (asked or (spent := time.perf_counter() - began) < 60 * minutes):
                trainer.send_signal(signal.SIGINT)  # it ends the update and saves
                asked = True
                continue
            memory = {"trainer": trainer.pid, "server": server.pid}
            try:
                memory = {name: resident(pid) for name, pid in memory.items()}
            except (FileNotFoundError, RuntimeError):  # the trainer has just ended
                continue
            rows.append({"seconds": spent, "update": newest(records), "MiB": memory})
        done = newest(records)
        time.sleep(reader.pause)
        assert reader.look() == done  # the page has kept up
    assert trainer.returncode == (130 if asked else 0), trainer.returncode
    followed = {"pages": reader.pages, "slowest answer, s": round(reader.slowest, 2)}
    return done + 1, rows, followed


def grown(rows, name):
    """Resident MiB halfway and at the end, and the slope in between."""
    last = [row for row in rows if row["update"] >= rows[-1]["update"] / 2]
    updates, memory = [row["update"] for row in last], [row["MiB"][name] for row in last]
    slope = np.polyfit(updates, memory, 1)[0]
    return {
        "halfway": round(memory[0], 1),
        "end": round(memory[-1], 1),
        "per 100,000 updates": round(1e5 * float(slope), 2),
    }


def stored(folder):
    """Bytes of the records for each update, over the first and the second half of the updates."""
    run = open_run(folder)
    updates = run.updates("frames")
    with closing(sqlite3.connect(f"{(folder / 'records.sqlite').as_uri()}?mode=ro", uri=True)) as d:
        query = 'SELECT sum(length(array)) FROM record WHERE "update" % 1000 <> 0 AND "update" '
        halfway = updates[-1] // 2
        halves = [d.execute(query + half, (halfway,)).fetchone()[0] for half in ("<= ?", "> ?")]
    plain = [sum(u % 1000 != 0 and (u <= halfway) == first for u in updates) for first in (1, 0)]
    size = sum(file.stat().st_size for file in folder.glob("records.sqlite*"))
    return {
        "arrays, first half": round(halves[0] / plain[0], 1),
        "arrays, second half": round(halves[1] / plain[1], 1),
        "file": round(size / len(updates), 1),
    }


def opening(folder):
    """Seconds to open the run, in a script and in a dashboard that has just been started.

    The dashboard's first answer is all that the page says beside its figures, and the figures in
    sight. Then, with what a process or a browser takes to begin: `gradlab conflict`, the drawn page.
    """
    began = time.perf_counter()
    run = open_run(folder)
    assert run.state in {"done", "stopped"}
    assert not run.problems
    opened = time.perf_counter() - began
    with served(folder) as (address, _):
        reader = Reader(address)
        reader.open()
        began = time.perf_counter()
        reader.look()
        answered = time.perf_counter() - began
    began = time.perf_counter()
    command = [sys.executable, "-m", "gradlab", "conflict", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    conflict = time.perf_counter() - began
    with served(folder) as (address, _), browsing() as page:
        began = time.perf_counter()
        page.goto(f"{address}#tab=interference")
        page.wait_for_selector("html[data-ready=yes]")
        drawn = time.perf_counter() - began
    return {
        "open_run": round(opened, 3),
        "dashboard's first answer": round(answered, 2),
        "gradlab conflict": round(conflict, 2),
        "dashboard drawn in a browser": round(drawn, 2),
    }


def lengthen(folder, updates):
    """Repeat the records of a run until it has so many updates."""
    with closing(sqlite3.connect(folder / "records.sqlite")) as database:
        (length,) = database.execute('SELECT max("update") + 1 FROM record').fetchone()
        for first in range(length, updates, length):
            query = 'INSERT INTO record SELECT quantity, "update" + ?, array FROM record'
            database.execute(f'{query} WHERE "update" < ?', (first, min(length, updates - first)))
        database.commit()


def reopen(folder, recorded, updates):
    """What it takes to open a run of so many updates, of which some were recorded by a training."""
    command = [sys.executable, "-m", "gradlab", "train", "--out", str(folder)]
    for name, value in (GAME | {"frames": recorded * COPIES * STEPS}).items():
        command += [f"--{name}", str(value)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lengthen(folder, updates)
    return {"updates": newest(folder / "records.sqlite") + 1, "recorded": recorded} | {
        "seconds": opening(folder)
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--opened-at", type=int)
    parser.add_argument("--note", help="said beside the results")
    options = parser.parse_args()
    if options.opened_at:
        with tempfile.TemporaryDirectory() as temporary:
            again = reopen(Path(temporary) / "run", options.updates, options.opened_at)
        print(json.dumps(again, indent=2))
        record = json.loads((RESULTS / "soak.json").read_text())
        found = record["rows"] | {"opened anew": again}
        write("soak", found, note=options.note or record.get("note"), packages=PACKAGES)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        done, rows, followed = soak(folder, options.updates, options.minutes)
        found = {
            "limits": LIMITS,
            "updates": done,
            "minutes": round(rows[-1]["seconds"] / 60, 1),
            "followed": followed,
            "resident MiB": {name: grown(rows, name) for name in ("trainer", "server")},
            "bytes per update": stored(folder),
            "seconds": opening(folder),
            "samples": rows[:: max(1, len(rows) // 60)],
        }
    print(json.dumps({k: v for k, v in found.items() if k != "samples"}, indent=2))
    write("soak", found, note=options.note, packages=PACKAGES)


if __name__ == "__main__":
    main()

"""The command that trains a grid of settings, and the view of many trainings at once."""

import argparse
import shlex
import sqlite3
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from gradlab.checks import Failed, UsageError
from gradlab.cli.stopping import Stopped, stop_on_signal

if TYPE_CHECKING:
    from trainers.sweeps import State, Sweep

_ENDED = ("done", "stopped", "failed", "died")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where trainings run.

    Args:
        parser: Where to add them.
    """
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="trainings at once (default: as many as have cores)"
    )
    parser.add_argument(
        "--engine",
        default="local",
        help="local (default): processes on this machine; ray: a Ray cluster",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="the Ray cluster (default: one that is started on this machine)",
    )


def sweep(options: argparse.Namespace) -> None:
    """`gradlab sweep`: train what is missing of a grid; runs that exist are kept.

    Args:
        options: The parsed command line.
    """
    from trainers.sweeps import find_sweep, plan_runs, read_sweep

    runs = plan_runs(*read_sweep(options.file))
    out = options.out or Path("runs", options.file.stem)
    found = find_sweep(runs, out)
    if options.list:
        _print_list(found)
        return
    words = ["gradlab", "sweep", str(options.file), *(["--out", str(out)] if options.out else [])]
    train_all(found, options, shlex.join(words))
    print(f"Runs: {out}\nDashboard: gradlab dashboard {out} --serve")


def _print_list(sweep: "Sweep") -> None:
    shown = Table(Column("run", overflow="fold"), "state", title=f"Runs of {sweep.out}")
    for name, state in sweep.states.items():
        shown.add_row(name, "done" if state.kind == "kept" else "to be trained")
    Console().print(shown)


def train_all(sweep: "Sweep", options: argparse.Namespace, again: str) -> None:
    """Train all runs of a sweep that are not done, and show how they stand.

    Args:
        sweep: The sweep.
        options: The parsed command line, which says where they run.
        again: The command that goes on with what is not done.

    Raises:
        Stopped: If it was asked to stop.
        Failed: If a run failed.
    """
    from trainers.sweeps import make_engine, run_sweep

    threads = max(run.config.threads for run in sweep.runs.values())
    engine = make_engine(
        options.engine, threads=threads, jobs=options.jobs, address=options.address
    )
    with _View(sweep) as view, stop_on_signal() as stop:
        run_sweep(sweep, engine, watch=view.show, stop=stop)
        stopped = stop()
    counts = Counter(state.kind for state in sweep.states.values())
    done = counts["done"] + counts["kept"]
    if stopped and done + counts["failed"] < len(sweep.states):
        raise Stopped(
            f"stopped and saved; {done} of {len(sweep.states)} runs are done. To go on: {again}"
        )
    if counts["failed"]:
        raise Failed(
            f"{counts['failed']} of {len(sweep.states)} runs failed, the other {done} are done. To "
            f"try again, from where they were: {again}"
        )


class _View:
    """A bar for all runs and one for each that is running; a line for each that has ended."""

    def __init__(self, sweep: "Sweep") -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[last]}"),
        )
        self._whole = self._bar.add_task(str(sweep.out), total=len(sweep.runs), count="", last="")
        self._tasks: dict[str, TaskID] = {}
        self._shown: dict[str, State] = {}

    def __enter__(self) -> "_View":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        for task in self._tasks.values():
            self._bar.remove_task(task)
        self._bar.stop()

    def show(self, sweep: "Sweep") -> None:
        """Bring what is shown up to date.

        Args:
            sweep: The sweep.
        """
        for name, state in sweep.states.items():
            if self._shown.get(name) != state:
                self._shown[name] = state
                self._tell(name, state)
            if state.kind == "running":
                self._follow(sweep, name)
        counts = Counter(state.kind for state in sweep.states.values())
        said = [f"{n} {kind}" for kind in ("failed", "running", "waiting") if (n := counts[kind])]
        done = counts["done"] + counts["kept"]
        self._bar.update(
            self._whole,
            completed=done + counts["failed"],
            count=f"{done} of {len(sweep.states)} runs done",
            last=", ".join(said),
        )

    def _tell(self, name: str, state: "State") -> None:
        if state.kind != "running" and name in self._tasks:
            self._bar.remove_task(self._tasks.pop(name))
        if state.kind in _ENDED:
            line = f"{state.kind}: {name}" + (f": {state.cause}" if state.cause else "")
            print(line, file=sys.stderr if state.cause else sys.stdout)
        elif state.kind == "waiting" and state.cause:
            print(f"again: {name}: {state.cause}; going on from its checkpoint", file=sys.stderr)

    def _follow(self, sweep: "Sweep", name: str) -> None:
        """Read from a run's folder how far it is."""
        from analyses.listing import last_number
        from gradlab.run import open_run
        from gradlab.run_writer import is_run

        if name not in self._tasks:
            total = sweep.runs[name].config.frames
            self._tasks[name] = self._bar.add_task(name, total=total, count="", last="")
        frames, last = 0.0, float("nan")
        try:
            if is_run(sweep.folders[name]):
                run = open_run(sweep.folders[name])
                frames = last_number(run, "frames")
                last = last_number(run, "episode_return")
        except (UsageError, OSError, sqlite3.Error):  # half made as yet
            return
        if frames == frames:
            self._bar.update(
                self._tasks[name],
                completed=frames,
                count=f"{frames:,.0f} frames",
                last="" if last != last else f"return {last:.3f}",
            )

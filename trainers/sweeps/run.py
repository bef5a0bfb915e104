"""A sweep: what is missing is trained, what was cut off goes on, what fails holds nothing up."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gradlab.checks import UsageError
from gradlab.run import Run, open_run, runs_below
from gradlab.run_writer import is_run, make_folder, write_atomically
from trainers.checkpoints import newest_update
from trainers.config import TrainConfig
from trainers.sweeps.engine import Engine
from trainers.sweeps.plan import PlannedRun, training_key
from trainers.sweeps.task import State, Task
from trainers.train import check_same_settings

INDEX = "sweep.json"
"""The file in a sweep's folder that lists its runs."""

DEATHS = 3
"""How often a training's process may die without having come further before it counts as failed."""

_SCHEMA = 1
_LOOK = 0.5  # seconds


@dataclass
class _Life:
    """What a run's process has to come further than, and how often it did not."""

    reached: int
    deaths: int = 0


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Planned runs and where they are.

    Attributes:
        out: The folder of all.
        runs: The runs by name.
        folders: Each one's folder: of its name, or what there is already with its settings.
        states: How each stands.
    """

    out: Path
    runs: Mapping[str, PlannedRun]
    folders: Mapping[str, Path]
    states: dict[str, State] = field(default_factory=dict)

    def open(self) -> dict[str, Run]:
        """Open the runs that are done.

        Returns:
            Runs by name.
        """
        done = (name for name, state in self.states.items() if state.kind in {"kept", "done"})
        return {name: open_run(self.folders[name]) for name in done}


def find_sweep(runs: Sequence[PlannedRun], out: Path) -> Sweep:
    """Look which runs of a sweep are there.

    Args:
        runs: What is planned.
        out: The sweep's folder; need not exist.

    Returns:
        The sweep, with states "kept" and "waiting".

    Raises:
        UsageError: If a folder that a run is to have holds one with other settings, or the sweep's
            folder is a file.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; a sweep needs a folder. Choose another --out.")
    there = dict(_trainings(out))
    folders, states = {}, {}
    for run in runs:
        folder = there.get(training_key(run.config), out / run.name)
        if is_run(folder):
            check_same_settings(run.config, folder, but=("log",))
        done = is_run(folder) and open_run(folder).state == "done"
        folders[run.name] = folder
        states[run.name] = State(kind="kept" if done else "waiting")
    return Sweep(out=out, runs={run.name: run for run in runs}, folders=folders, states=states)


def run_sweep(
    sweep: Sweep,
    engine: Engine,
    *,
    watch: Callable[[Sweep], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Train all runs that are not done.

    A run whose process dies (a kill, too little memory) is started again and goes on from its
    newest checkpoint, as often as it comes further meanwhile. Nothing that happens to one run ends
    another.

    Args:
        sweep: The sweep; its states are kept up to date, also in the folder's index.
        engine: What trains; is closed in the end.
        watch: Shown the sweep at each change, and about twice a second.
        stop: Asked as often whether to stop. Runs are then stopped, to be resumed another time.
    """
    waiting = deque(name for name, state in sweep.states.items() if state.kind == "waiting")
    lives: dict[str, _Life] = {}
    running: set[str] = set()
    stopping = False
    make_folder(sweep.out)

    def enter(name: str, state: State) -> None:
        sweep.states[name] = state
        _write_index(sweep)
        watch(sweep)

    _write_index(sweep)
    watch(sweep)
    try:
        while running or (waiting and not stopping):
            if stop() and not stopping:
                stopping = True
                engine.stop()
            while waiting and len(running) < engine.slots and not stopping:
                name = waiting.popleft()
                lives.setdefault(name, _Life(newest_update(sweep.folders[name])))
                running.add(name)
                engine.start(_task(sweep, name))
                enter(name, State(kind="running"))
            for name, state in engine.ended(_LOOK):
                running.remove(name)
                if state.kind == "died" and not stopping:
                    state = _after_death(state, lives[name], newest_update(sweep.folders[name]))
                    if state.kind == "waiting":
                        waiting.appendleft(name)
                enter(name, state)
            watch(sweep)
    finally:
        engine.close()


def _trainings(out: Path) -> Iterator[tuple[str, Path]]:
    """The runs there are, by what they train."""
    for path in runs_below(out):
        # One of another version, or damaged, is left as it is.
        with suppress(ValueError):
            if config := open_run(path).config:
                yield training_key(TrainConfig.model_validate(config)), path


def _task(sweep: Sweep, name: str) -> Task:
    config = sweep.runs[name].config
    return Task(
        name=name,
        settings=config.model_dump(mode="json"),
        folder=sweep.folders[name].resolve(),
        threads=config.threads,
    )


def _after_death(state: State, life: _Life, reached: int) -> State:
    """Whether a run whose process died is tried again."""
    life.deaths = life.deaths + 1 if reached <= life.reached else 1
    life.reached = reached
    if life.deaths < DEATHS:
        return State(kind="waiting", cause=state.cause)
    return State(kind="failed", cause=f"{state.cause}, {DEATHS} times without coming further")


def _write_index(sweep: Sweep) -> None:
    rows = [
        {
            "run": name,
            "folder": str(sweep.folders[name].relative_to(sweep.out)),
            "settings": dict(sweep.runs[name].differing),
            "state": state.kind,
            "cause": state.cause,
        }
        for name, state in sweep.states.items()
    ]
    text = json.dumps({"schema": _SCHEMA, "runs": rows}, indent=2) + "\n"
    write_atomically(sweep.out / INDEX, text.encode())

"""Many trainings: a grid of settings, trained side by side into one folder."""

from trainers.sweeps.engine import Engine
from trainers.sweeps.engines import make_engine
from trainers.sweeps.file import read_sweep
from trainers.sweeps.local import LocalEngine
from trainers.sweeps.plan import PlannedRun, plan_runs
from trainers.sweeps.run import Sweep, find_sweep, run_sweep
from trainers.sweeps.task import State

__all__ = [
    "Engine",
    "LocalEngine",
    "PlannedRun",
    "State",
    "Sweep",
    "find_sweep",
    "make_engine",
    "plan_runs",
    "read_sweep",
    "run_sweep",
]

"""How long a study's `standard` budget takes: does it fit a night?

Every design cell of the study is trained for a few updates, one seed, as many at once as there are
cores; from the seconds of its updates, diagnosed and not, follows what all of its updates take, and
all of its seeds. What a process takes beside its updates (imports, the first one's compilation, the
evaluation after the last) is taken from the same sweep.

    python tests/benchmarks/bench_nights.py [STUDY ...]
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from measure import write

from analyses.studies import STUDIES
from trainers.config import OffPolicyConfig, TrainConfig
from trainers.diagnosis import DIAGNOSED_SAMPLES
from trainers.sweeps import LocalEngine, find_sweep, plan_runs, run_sweep
from trainers.sweeps.local import cores

NIGHT = 10  # hours
FIRST, EVERY = 5, 4  # the updates before FIRST are left out of the seconds of one
EFFECTS, UPDATES = 2 * EVERY, 3 * EVERY + 1
USUAL = ("adaptability", "homogeneous", "mamujoco")
"""Studies of which no report of `standard` says what it took."""


def shortened(config):
    """A run's settings for a few of its updates, each of which does as much as any later one."""
    changed = {
        "frames": UPDATES * config.copies * config.steps,
        "every": EVERY,
        "effects_every": EFFECTS,
        "diagnosed_samples": config.diagnosed_samples
        or config.every * DIAGNOSED_SAMPLES[config.diagnostics],
    }
    own = getattr(config, config.algorithm, None)
    if isinstance(own, OffPolicyConfig):
        least = own.model_copy(update={"warmup_frames": own.batch_size})
        changed[config.algorithm] = least.model_dump()
    return TrainConfig.model_validate(config.model_dump() | changed)


def seconds_of(run):
    """Seconds of each kind of update, and of all there were."""
    seconds = dict(enumerate(run.quantity("seconds").to_numpy().tolist()))
    plain = [took for update, took in seconds.items() if update >= FIRST and update % EVERY]
    return {
        "plain": statistics.median(plain),
        "diagnosed": seconds[UPDATES - 1],
        "effects": seconds[EFFECTS],
        "all": sum(seconds.values()),
    }


def hours_of(config, seconds):
    """Hours that all updates of a run take."""
    effects = (config.updates - 1) // config.effects_period
    diagnosed = -(-config.updates // config.every) - effects
    plain = config.updates - diagnosed - effects
    counts = {"plain": plain, "diagnosed": diagnosed, "effects": effects}
    return sum(count * seconds[kind] for kind, count in counts.items()) / 3600


def night(name):
    """Hours that a study is to take on this machine, and what they are made of."""
    planned = plan_runs(STUDIES[name].budgets["standard"])
    first = min(run.config.seed for run in planned)
    seeds = len({run.config.seed for run in planned})
    cells = {run.name: run for run in planned if run.config.seed == first}
    assert len(cells) * seeds == len(planned)
    slots = cores()
    with tempfile.TemporaryDirectory() as folder:
        short = [replace(run, config=shortened(run.config)) for run in cells.values()]
        sweep = find_sweep(short, Path(folder))
        began = time.perf_counter()
        run_sweep(sweep, LocalEngine(slots=slots))
        took = time.perf_counter() - began
        causes = {name: state.cause for name, state in sweep.states.items() if state.kind != "done"}
        assert not causes, causes
        measured = {name: seconds_of(run) for name, run in sweep.open().items()}
    beside = slots * took - sum(seconds["all"] for seconds in measured.values())
    updates = sum(hours_of(cells[cell].config, seconds) for cell, seconds in measured.items())
    hours = {
        "updates": seeds * updates / slots,
        "beside updates": seeds * beside / slots / 3600,
    }
    return {
        "study": name,
        "runs": len(planned),
        "cells": len(cells),
        "frames": sum(run.config.frames for run in planned),
        "hours": round(sum(hours.values()), 2),
        "hours of": {what: round(value, 2) for what, value in hours.items()},
        "measured for, s": round(took),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("studies", nargs="*", default=USUAL)
    rows = []
    for name in parser.parse_args().studies:
        rows.append(night(name))
        print(rows[-1], flush=True)
    found = {"limits": {"hours": NIGHT}, "cores": cores(), "studies": rows}
    write("nights", found, packages=("torch", "numpy", "vmas", "jaxmarl", "jax", "mujoco"))


if __name__ == "__main__":
    main()

"""How much more a sweep gets done with as many trainings at once as there are cores."""

import statistics
import tempfile
import time
from pathlib import Path

from measure import write

from trainers.sweeps import LocalEngine, find_sweep, plan_runs, run_sweep
from trainers.sweeps.local import cores

RUNS = 6
ROUNDS = 3
DOCUMENT = {
    "settings": {"env": "specialisation", "agents": 4, "method": "hypermarl", "frames": 40_000},
    "grid": {"seed": list(range(RUNS))},
}


def seconds(slots, runs=RUNS):
    """Of a whole sweep, from the first process to the last run's end."""
    document = DOCUMENT | {"grid": {"seed": list(range(runs))}}
    with tempfile.TemporaryDirectory() as folder:
        sweep = find_sweep(plan_runs(document), Path(folder))
        began = time.perf_counter()
        run_sweep(sweep, LocalEngine(slots=slots))
        took = time.perf_counter() - began
        assert {state.kind for state in sweep.states.values()} == {"done"}
    return took


def main():
    seconds(1, runs=1)  # makes the process that the others are forked from
    rounds = [{"one": seconds(1), "all": seconds(cores())} for _ in range(ROUNDS)]
    for found in rounds:
        print({name: round(value, 1) for name, value in found.items()}, flush=True)
    rows = {
        "cores": cores(),
        "runs": RUNS,
        "rounds": ROUNDS,
        "seconds, one after the other": statistics.median(found["one"] for found in rounds),
        "throughput": statistics.median(found["one"] / found["all"] for found in rounds),
        "throughput, lowest": min(found["one"] / found["all"] for found in rounds),
    }
    print(rows)
    write("sweeps", rows)


if __name__ == "__main__":
    main()

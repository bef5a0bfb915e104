"""What diagnosing every update costs a training: PPO with 4 epochs, vmas/navigation, 128 copies.

Whole trainings, recorded as `gradlab train` does. Each round runs every level once, in an order that
rotates, so that a machine which slows down or speeds up favours none of them.
"""

import statistics
import tempfile
import time
from pathlib import Path

from measure import write

from gradlab.run_writer import RunWriter
from trainers.config import TrainConfig
from trainers.loop import Trainer, describe

UPDATES, ROUNDS = 12, 11
LEVELS = ("off", "light", "full")


def seconds_of(method, level, folder):
    config = TrainConfig(
        method=method,
        env="vmas/navigation",
        agents=4,
        copies=128,
        steps=32,
        frames=128 * 32 * UPDATES,
        diagnostics=level,
        every=1,
        effects_every=10 * UPDATES,  # transference and the like have a schedule of their own
    )
    trainer = Trainer(config)
    with RunWriter(folder) as writer:
        writer.describe(**describe(trainer), state="running")
        began = time.perf_counter()
        trainer.run(writer, lambda *_: None)
        return time.perf_counter() - began


def row(method):
    times = {level: [] for level in LEVELS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            first = number % len(LEVELS)
            for level in (*LEVELS[first:], *LEVELS[:first]):
                out = Path(folder, f"{level}-{number}")
                times[level].append(seconds_of(method, level, out))
    found = {"method": method, "updates": UPDATES}
    found["ms per update"] = 1e3 * statistics.median(times["off"]) / UPDATES
    for level in LEVELS[1:]:
        pairs = zip(times[level], times["off"], strict=True)
        found[level] = statistics.median(a / b for a, b in pairs) - 1
    print(found, flush=True)
    return found


def main():
    write("training", [row(method) for method in ("fups", "fups-id", "nops", "hypermarl")])


if __name__ == "__main__":
    main()

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

LENGTHS = {100: (5, 5), 32: (12, 7)}
"""Updates of one training, and rounds, for each length of a rollout."""
LEVELS = ("off", "light", "full")


def seconds_of(method, steps, level, folder):
    updates, _ = LENGTHS[steps]
    config = TrainConfig(
        method=method,
        env="vmas/navigation",
        agents=4,
        copies=128,
        steps=steps,
        frames=128 * steps * updates,
        diagnostics=level,
        every=1,
        effects_every=10 * updates,  # transference and the like have a schedule of their own
    )
    trainer = Trainer(config)
    with RunWriter(folder) as writer:
        writer.describe(**describe(trainer), state="running")
        began = time.perf_counter()
        trainer.run(writer, lambda *_: None)
        return time.perf_counter() - began


def row(method, steps):
    updates, rounds = LENGTHS[steps]
    times = {level: [] for level in LEVELS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            first = number % len(LEVELS)
            for level in (*LEVELS[first:], *LEVELS[:first]):
                out = Path(folder, f"{level}-{number}")
                times[level].append(seconds_of(method, steps, level, out))
    found = {"method": method, "steps": steps, "updates": updates}
    found["ms per update"] = 1e3 * statistics.median(times["off"]) / updates
    for level in LEVELS[1:]:
        pairs = zip(times[level], times["off"], strict=True)
        found[level] = statistics.median(a / b for a, b in pairs) - 1
    print(found, flush=True)
    return found


def main():
    methods = ("fups", "fups-id", "nops", "hypermarl")
    write("training", [row(method, steps) for steps in LENGTHS for method in methods])


if __name__ == "__main__":
    main()

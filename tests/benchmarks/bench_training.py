"""What diagnosing every update costs a training: PPO with 4 epochs, vmas/navigation, 128 copies.

Whole trainings, recorded as `gradlab train` does, one for each level. They go on side by side, an
update of each in turn and the order rotating, so that a machine which slows down or speeds up
favours none of them. From one update to the next it may do so by more than what is measured.
Hence also the seconds of diagnosing and recording are taken, relative to the same update's rest.
"""

import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from measure import write

from gradlab.run_writer import RunWriter
from trainers.config import TrainConfig
from trainers.loop import Trainer, describe

UPDATES = {100: 11, 32: 31}
"""For each length of a rollout; the first of them warms up and is not counted."""
LEVELS = ("off", "light", "full")


class Training:
    """A training that does its next update when told to, in a thread of its own.

    Attributes:
        seconds: Of each update, all of it.
        added: Of each update, in diagnosing and in writing what is recorded.
    """

    def __init__(self, method, steps, level, folder):
        self.config = TrainConfig(
            method=method,
            env="vmas/navigation",
            agents=4,
            copies=128,
            steps=steps,
            frames=128 * steps * UPDATES[steps],
            diagnostics=level,
            every=1,
            effects_every=10 * UPDATES[steps],  # transference and the like have a schedule apart
        )
        self.folder = folder
        self.seconds, self.added = [], []
        self.trainer = Trainer(self.config)
        self.trainer.diagnosis.of = self._timed(self.trainer.diagnosis.of)
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._train, daemon=True).start()

    def update(self):
        self.added.append(0.0)
        began = time.perf_counter()
        self.go.release()
        if not self.done.acquire(timeout=120):
            raise SystemExit("an update failed, or takes more than two minutes")
        self.seconds.append(time.perf_counter() - began)

    def _train(self):
        with RunWriter(self.folder) as writer:
            writer.describe(**describe(self.trainer), state="running")
            writer.write = self._timed(writer.write)
            self.go.acquire()
            self.trainer.run(writer, lambda *_: None, self._next)

    def _next(self):
        """The update is done."""
        last = len(self.added) == UPDATES[self.config.steps]
        self.done.release()
        if not last:
            self.go.acquire()
        return last

    def _timed(self, function):
        def timed(*arguments):
            began = time.perf_counter()
            found = function(*arguments)
            self.added[-1] += time.perf_counter() - began
            return found

        return timed


def row(method, steps):
    with tempfile.TemporaryDirectory() as folder:
        trainings = {level: Training(method, steps, level, Path(folder, level)) for level in LEVELS}
        for number in range(UPDATES[steps]):
            first = number % len(LEVELS)
            for level in (*LEVELS[first:], *LEVELS[:first]):
                trainings[level].update()
    seconds = {level: np.array(t.seconds[1:]) for level, t in trainings.items()}
    added = {level: np.array(t.added[1:]) for level, t in trainings.items()}
    share = {x: float(np.median(added[x] / (seconds[x] - added[x]))) for x in LEVELS}
    found = {"method": method, "steps": steps, "updates": UPDATES[steps] - 1}
    found["ms per update"] = 1e3 * float(np.median(seconds["off"]))
    for level in LEVELS[1:]:
        found[level] = share[level] - share["off"]
        whole = seconds[level] / seconds["off"] - 1
        found[f"{level}, whole"] = np.quantile(whole, (0.5, 0.25, 0.75)).tolist()
    print(found, flush=True)
    return found


def main():
    methods = ("fups", "fups-id", "nops", "hypermarl")
    write("training", [row(method, steps) for steps in UPDATES for method in methods])


if __name__ == "__main__":
    main()

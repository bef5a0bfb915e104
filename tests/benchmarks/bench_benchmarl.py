"""What diagnosing every iteration costs a BenchMARL experiment: IPPO, vmas/navigation, 128 copies.

BenchMARL's own defaults for all else: 6,000 frames collected, 45 passes of minibatches of 400, shared
networks 256-256. Each side is a process of its own with one torch thread; they take turns, one
iteration at a time, in an order that rotates.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import warnings

import torch
from bench_throughput import Worker, in_turns
from benchmarl.algorithms import IppoConfig
from benchmarl.environments import VmasTask
from benchmarl.experiment import Experiment, ExperimentConfig
from benchmarl.models import MlpConfig
from measure import PACKAGES, write
from throughput_gate import Gate
from throughput_peer import Timing

from gradlab.integrations.benchmarl import GradlabCallback

SIDES = ("without", "light", "full")
AGENTS, COPIES = 4, 128


class Side(Worker):
    """A process that trains with or without the callback."""

    def __init__(self, side):
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--side", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # its progress bar
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def train(side):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    config = ExperimentConfig.get_from_yaml()
    config.on_policy_n_envs_per_worker = COPIES
    config.evaluation = config.render = config.create_json = False
    config.loggers = []
    task = VmasTask.NAVIGATION.get_from_yaml()
    task.config["n_agents"] = AGENTS
    watching = [] if side == "without" else [GradlabCallback(every=1, level=side)]
    with tempfile.TemporaryDirectory() as folder:
        config.save_folder = folder
        experiment = Experiment(
            task=task,
            algorithm_config=IppoConfig.get_from_yaml(),
            model_config=MlpConfig.get_from_yaml(),
            seed=0,
            config=config,
            callbacks=[*watching, Timing(Gate())],
        )
        experiment.run()


def measured(sides, rounds):
    found = in_turns({side: Side(side) for side in sides}, rounds)
    rows = []
    for side, stretches in found.items():
        row = {"side": side, "agents": AGENTS, "copies": COPIES, "rounds": rounds}
        for kind in ("wall", "cpu"):
            took, plain = (
                [sum(stretch[kind].values()) for stretch in of]
                for of in (stretches, found["without"])
            )
            ratios = [own / other for own, other in zip(took, plain, strict=True)]
            row[kind] = {
                "seconds": statistics.median(took),
                "collection": statistics.median(s[kind]["collection"] for s in stretches),
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
            }
        print(row, flush=True)
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--note", help="said beside the results")
    parser.add_argument("--try", action="store_true", dest="only_try", help="keep no results")
    asked = parser.parse_args()
    if asked.side:
        train(asked.side)
        return
    rows = measured(asked.sides, asked.rounds)
    if not asked.only_try:
        packages = (*PACKAGES, "benchmarl", "torchrl", "tensordict")
        write("benchmarl", rows, note=asked.note, packages=packages)


if __name__ == "__main__":
    main()

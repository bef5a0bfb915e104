"""Returns at equal frames beside BenchMARL's IPPO: same scenarios, settings and evaluation.

Each training is a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench_throughput import HERE, PPO, SCENARIOS, settings
from measure import write

FRAMES, SEEDS = 640_000, 3
TASKS = {
    "dispersion": ("dispersion", {}),
    "navigation, different goals": ("navigation", {"collisions": False}),
    "navigation, same goal": ("navigation", {"collisions": False, "agents_with_same_goal": 4}),
    "navigation, mixed goals": ("navigation", {"collisions": False, "agents_with_same_goal": 2}),
}
LIBRARIES = ("benchmarl", "gradlab")


def cells(seeds, frames):
    for seed in range(seeds):
        for task, (scenario, args) in TASKS.items():
            for method in ("fups", "nops"):
                yield {
                    "task": task,
                    "scenario": scenario,
                    "args": SCENARIOS[scenario] | args,
                    "method": method,
                    "algorithm": "ippo",
                    "agents": 4,
                    "copies": 128,
                    "steps": 100,
                    "hidden": [64, 64],
                    "ppo": PPO,
                    "frames": frames,
                    "seed": seed,
                }


def gradlab(cell):
    import torch
    from learning_evaluation import returns

    from gradlab.run_writer import RunWriter
    from trainers.config import TrainConfig
    from trainers.loop import Trainer, describe

    # BenchMARL's loss has no clipped values, and its weights of value and entropy.
    ppo = {"clip_value": False, "value_coefficient": 1.0, "entropy_coefficient": 0.0}
    trainer = Trainer(
        TrainConfig.model_validate(
            settings(cell)
            | {"frames": cell["frames"], "ppo": cell["ppo"] | ppo, "diagnostics": "light"}
        )
    )
    with tempfile.TemporaryDirectory() as folder, RunWriter(Path(folder, "run")) as writer:
        writer.describe(**describe(trainer), state="running")
        trainer.run(writer, lambda *_: None)
    theta, policy = trainer.actor.all_agents(), trainer.policy
    random = torch.Generator().manual_seed(0)

    def mean(observation):
        found = policy.distribution(theta, observation.transpose(0, 1))["mean"]
        return found.clamp(policy.box.low, policy.box.high).transpose(0, 1)

    def sampled(observation):
        action, _ = policy.sample(theta, observation.transpose(0, 1), random)
        return policy.to_env(action).transpose(0, 1)

    return {
        "frames": trainer.frames_done,
        "mean": returns(mean, cell),
        "sampled": returns(sampled, cell),
    }


def trained(library, cell):
    script = HERE / ("learning_peer.py" if library == "benchmarl" else "compare_learning.py")
    done = subprocess.run(
        [sys.executable, script, json.dumps(cell)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if library == "benchmarl" else None,  # its progress bar
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ).stdout
    line = next(line for line in done.splitlines() if line.startswith("found:"))
    row = {key: cell[key] for key in ("task", "method", "seed")} | {"library": library}
    row |= json.loads(line.removeprefix("found:"))
    print(row, flush=True)
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--try", action="store_true", dest="only_try", help="keep no results")
    parser.add_argument("cell", nargs="?")
    asked = parser.parse_args()
    if asked.cell:
        print("found:", json.dumps(gradlab(json.loads(asked.cell))))
        return
    with ThreadPoolExecutor(asked.workers) as pool:
        waiting = [
            pool.submit(trained, library, cell)
            for cell in cells(asked.seeds, asked.frames)
            for library in LIBRARIES
        ]
        rows = [future.result() for future in waiting]
    if not asked.only_try:
        write("learning", rows)


if __name__ == "__main__":
    main()

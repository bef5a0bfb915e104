"""Does removing the conflict between agents' gradients help? FuPS and HyperMARL, with and without.

    python examples/remove_conflict.py [--aggregate pcgrad] [--seeds 2] [--updates 60]

Trains on the Specialisation game, in which agents are to choose different actions, and prints the
reward per step in the last tenth of each training, with how far the aggregator turned the gradient.
Needs `pip install 'gradlab[aggregate]'`.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

import gradlab
from trainers.config import TrainConfig
from trainers.train import train_run

METHODS = ("fups", "hypermarl")


def trained(method: str, aggregate: str, seed: int, updates: int, out: Path) -> gradlab.Run:
    config = TrainConfig(
        method=method,
        aggregate=aggregate,
        env="specialisation",
        agents=4,
        seed=seed,
        copies=64,
        steps=16,
        frames=64 * 16 * updates,
        diagnostics="light",
        every=max(1, updates // 10),
    )
    folder = out / f"{config.scheme}-{seed}"
    train_run(config, folder)
    return gradlab.open_run(folder)


def main(aggregate: str, seeds: int, updates: int, out: Path) -> dict[str, np.ndarray]:
    """Train all, print a table and a sentence for each method; the reward per step by seed."""
    rewards: dict[str, np.ndarray] = {}
    print(f"{'method':20} {'reward per step':>15} {'by seed':>24}   cosine to sum   agents opposed")
    for method in METHODS:
        for name in ("none", aggregate):
            runs = [trained(method, name, seed, updates, out) for seed in range(seeds)]
            last = max(1, updates // 10)
            found = [float(run.quantity("reward_per_step")[-last:].mean()) for run in runs]
            label = runs[0].method
            rewards[label] = np.array(found)
            said = ""
            if name != "none":
                actor = [run.metrics.sel(network="actor") for run in runs]
                cosine = np.mean([m["aggregated_cosine"].mean() for m in actor])
                before, after = (
                    np.mean([m["opposed_agents"].sel(direction=d).mean() for m in actor])
                    for d in ("plain", "applied")
                )
                said = f"{cosine:13.3f}   {before:.1%} -> {after:.1%}"
            shown = " ".join(f"{value:.3f}" for value in found)
            print(f"{label:20} {np.mean(found):15.3f} {shown:>24}   {said}")
    for method in METHODS:
        differences = rewards[f"{method}+{aggregate}"] - rewards[method]
        print(
            f"{method}: {aggregate} changed the reward per step by {differences.mean():+.3f} "
            f"(seeds from {differences.min():+.3f} to {differences.max():+.3f})"
        )
    return rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--aggregate", default="pcgrad")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--updates", type=int, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        main(given.aggregate, given.seeds, given.updates, Path(folder))

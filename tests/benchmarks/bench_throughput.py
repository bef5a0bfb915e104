"""Frames per second of whole trainings beside BenchMARL's, and of environment stepping alone.

Every side of a cell is a process of its own with one torch thread; they take turns, one rollout and
one update at a time, so that all see the same machine. Costs are CPU seconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import write
from throughput_gate import MARK, Gate

HERE = Path(__file__).parent

PPO = {
    "epochs": 4,
    "minibatches": 4,
    "learning_rate": 5e-4,
    "adam_epsilon": 1e-5,
    "clip": 0.2,
    "discount": 0.99,
    "gae_lambda": 0.95,
    "max_gradient_norm": 0.5,
}
SCENARIOS = {
    "navigation": {
        "collisions": True,
        "agents_with_same_goal": 1,
        "split_goals": False,
        "observe_all_goals": False,
        "shared_rew": False,
        "lidar_range": 0.35,
        "agent_radius": 0.1,
    },
    "dispersion": {
        "n_food": 4,
        "share_reward": False,
        "food_radius": 0.05,
        "penalise_by_time": False,
    },
}
SIDES = {
    "raw": ("raw", ""),
    "benchmarl fups": ("benchmarl", "fups"),
    "benchmarl nops": ("benchmarl", "nops"),
    "gradlab fups": ("gradlab", "fups"),
    "gradlab nops": ("gradlab", "nops"),
    "gradlab hypermarl": ("gradlab", "hypermarl"),
}
ALLOCATORS = {
    "default": {},
    # Large blocks are kept and used again instead of given back to the system.
    "keeping": {
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**32),
        "MALLOC_TOP_PAD_": str(2**26),
    },
}


def raw(cell, gate):
    """VMAS alone, with actions drawn beforehand; all copies reset in one batch at the time limit."""
    import torch
    import vmas

    torch.set_num_threads(1)
    env = vmas.make_env(
        scenario=cell["scenario"],
        num_envs=cell["copies"],
        device="cpu",
        seed=cell["seed"],
        continuous_actions=True,
        clamp_actions=True,
        terminated_truncated=True,
        max_steps=cell["steps"],
        n_agents=cell["agents"],
        **cell["args"],
    )
    actions = 2 * torch.rand(cell["steps"], cell["agents"], cell["copies"], 2) - 1
    with torch.no_grad():
        env.reset()
        while True:
            gate.updated()
            for action in actions:
                env.step(list(action))
            env.reset()
            gate.collected()


def settings(cell):
    """What gradlab trains a cell with, but for frames and diagnostics."""
    return {
        "method": cell["method"],
        "algorithm": cell["algorithm"],
        "env": f"vmas/{cell['scenario']}",
        "env_args": {"max_steps": cell["steps"], **cell["args"]},
        "agents": cell["agents"],
        "copies": cell["copies"],
        "steps": cell["steps"],
        "seed": cell["seed"],
        "network": {"hidden": cell["hidden"]},
        "ppo": cell["ppo"],
    }


def gradlab(cell, gate):
    """A whole training as `gradlab train` does it, with light diagnostics in every update."""
    from gradlab.run_writer import RunWriter
    from trainers.config import TrainConfig
    from trainers.loop import Trainer, describe

    trainer = Trainer(
        TrainConfig.model_validate(
            settings(cell)
            | {
                "frames": cell["copies"] * cell["steps"] * 10_000,
                "diagnostics": cell.get("diagnostics", "light"),
                "every": 1,  # of fewer samples than every tenth: the same share of the time
            }
        )
    )
    collect = trainer._collect

    def timed():
        rollout = collect()
        gate.collected()
        return rollout

    trainer._collect = timed
    with tempfile.TemporaryDirectory() as folder, RunWriter(Path(folder, "run")) as writer:
        writer.describe(**describe(trainer), state="running")
        trainer.run(writer, lambda *_: gate.updated())


class Worker:
    """A process that does one side of a cell."""

    def __init__(self, side, cell, allocator):
        library, method = SIDES[side]
        script = "throughput_peer.py" if library == "benchmarl" else "bench_throughput.py"
        command = [sys.executable, str(HERE / script)]
        command += [] if library == "benchmarl" else ["--side", library]
        self._process = subprocess.Popen(
            [*command, json.dumps(cell | {"method": method})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if library == "benchmarl" else None,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | ALLOCATORS[allocator],
        )

    def answer(self):
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise RuntimeError(f"{self._process.args} ended: {self._process.wait()}")

    def measure(self):
        print(file=self._process.stdin, flush=True)
        return self.answer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()


def in_turns(workers, rounds):
    """What workers measure of themselves in rounds whose order rotates; they end after it."""
    sides = list(workers)
    found = {side: [] for side in sides}
    try:
        for worker in workers.values():
            worker.answer()
            worker.measure()  # not counted: what is done once
        for number in range(rounds):
            first = number % len(sides)
            for side in (*sides[first:], *sides[:first]):
                found[side].append(workers[side].measure())
    finally:
        for worker in workers.values():
            worker.__exit__()
    return found


def measure_cell(cell, allocator, rounds, sides=tuple(SIDES)):
    """Medians of CPU seconds over rounds in which all sides take turns."""
    found = in_turns({side: Worker(side, cell, allocator) for side in sides}, rounds)
    frames = cell["copies"] * cell["steps"]
    rows = []
    for side, stretches in found.items():
        row = {k: cell[k] for k in ("scenario", "algorithm", "agents", "copies")}
        row |= {"side": side, "allocator": allocator, "rounds": rounds}
        for kind in ("cpu", "wall"):
            parts = [stretch[kind] for stretch in stretches]
            row[kind] = {
                "collection": frames / statistics.median(p["collection"] for p in parts),
                "total": frames / statistics.median(p["collection"] + p["training"] for p in parts),
            }
            if side != "raw":
                row[kind]["training"] = frames / statistics.median(p["training"] for p in parts)
        print(
            f"{cell['scenario']} {cell['algorithm']} {cell['copies']} {allocator} {side}:",
            {k: round(v) for k, v in row["cpu"].items()},
            flush=True,
        )
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=["raw", "gradlab"])
    parser.add_argument("--scenario", nargs="*", default=list(SCENARIOS))
    parser.add_argument("--algorithm", nargs="*", default=["ippo", "mappo"])
    parser.add_argument("--copies", nargs="*", type=int, default=[32, 128, 512])
    parser.add_argument("--allocator", nargs="*", default=list(ALLOCATORS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", help="said beside the results")
    parser.add_argument("--try", action="store_true", dest="only_try", help="keep no results")
    parser.add_argument("cell", nargs="?")
    asked = parser.parse_args()
    if asked.side:
        {"raw": raw, "gradlab": gradlab}[asked.side](json.loads(asked.cell), Gate())
        return
    rows = []
    for allocator in asked.allocator:
        for scenario in asked.scenario:
            for algorithm in asked.algorithm:
                for copies in asked.copies:
                    cell = {
                        "scenario": scenario,
                        "args": SCENARIOS[scenario],
                        "algorithm": algorithm,
                        "agents": 4,
                        "copies": copies,
                        "steps": 100,
                        "hidden": [64, 64],
                        "ppo": PPO,
                        "seed": 0,
                    }
                    rounds = max(2, asked.rounds if copies < 512 else asked.rounds - 2)
                    rows += measure_cell(cell, allocator, rounds)
    if not asked.only_try:
        write("throughput", rows, note=asked.note)


if __name__ == "__main__":
    main()

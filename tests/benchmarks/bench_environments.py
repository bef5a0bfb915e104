"""Steps per second of each family of environments through gradlab's adapter, against its own stepping.

Random actions, drawn beforehand. Each environment is a process of its own with one torch thread; both
sides take turns in it.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time

import torch
from measure import write

ENVIRONMENTS = {
    "vmas/navigation": (32, 512),
    "vmas/dispersion": (32, 512),
    "mamujoco/halfcheetah-2x3": (8,),
    "mamujoco/ant-4x2": (8,),
    "mamujoco/humanoid-17x1": (8,),
    "smax/2s3z": (64,),
    "smax/smacv2_20_units": (64,),
    "bps/1": (8, 256),
    "bps/4": (8, 256),
    "pettingzoo/mpe2.simple_spread_v3": (8,),
}
"""Numbers of copies by name."""
ROUNDS, SECONDS = 7, 1.0
PACKAGES = ("torch", "numpy", "vmas", "gymnasium-robotics", "mujoco", "jaxmarl", "jax", "mpe2")


def adapter(name, copies):
    from trainers.envs import make_env
    from trainers.envs.vector_env import Discrete

    env = make_env(name, copies=copies)
    env.reset()
    space, shape = env.spec.action_space, (env.spec.agents, copies)

    def drawn():
        if isinstance(space, Discrete):
            return torch.randint(space.n, shape)
        low, high = (end[:, None] if end.dim() == 2 else end for end in (space.low, space.high))
        return low + (high - low) * torch.rand(*shape, space.size)

    actions = [drawn() for _ in range(10)]

    def allowed(action):
        """Where some actions are not available, the first that is stands in."""
        mask = env.action_mask()
        if mask is None or not isinstance(space, Discrete):
            return action
        possible = mask.gather(-1, action[..., None])[..., 0]
        return torch.where(possible, action, mask.long().argmax(-1))

    def step(steps):
        for number in range(steps):
            env.step(allowed(actions[number % 10]))

    return step


def measured(name, copies):
    torch.set_num_threads(1)
    family, _, own = name.partition("/")
    sides = {
        "raw": importlib.import_module(f"raw_{family}").raw_stepping(own, copies),
        "gradlab": adapter(name, copies),
    }
    steps = {}
    for side, step in sides.items():
        step(10)  # what is compiled or made at first use
        began = time.perf_counter()
        step(20)
        steps[side] = max(1, round(SECONDS * 20 / (time.perf_counter() - began)))
    rates = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side, step in sides.items():
            began = time.perf_counter()
            step(steps[side])
            rates[side].append(steps[side] * copies / (time.perf_counter() - began))
    return {
        "environment": name,
        "copies": copies,
        "per second": {side: statistics.median(found) for side, found in rates.items()},
        "ratio": statistics.median(
            ours / raw for ours, raw in zip(rates["gradlab"], rates["raw"], strict=True)
        ),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("one", nargs="*", help="an environment and a number of copies")
    asked = parser.parse_args()
    if asked.one:
        name, copies = asked.one
        print("found:", json.dumps(measured(name, int(copies))))
        return
    rows = []
    for name, numbers in ENVIRONMENTS.items():
        for copies in numbers:
            done = subprocess.run(
                [sys.executable, __file__, name, str(copies)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout
            line = next(line for line in done.splitlines() if line.startswith("found:"))
            rows.append(json.loads(line.removeprefix("found:")))
            print(rows[-1], flush=True)
    write("environments", rows, packages=PACKAGES)


if __name__ == "__main__":
    main()

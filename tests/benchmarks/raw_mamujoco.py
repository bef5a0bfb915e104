"""MuJoCo's robots in gymnasium's own vector environments: one agent, the same physics."""

import time

import numpy as np

ROBOTS = {
    "halfcheetah": "HalfCheetah",
    "ant": "Ant",
    "humanoid": "Humanoid",
    "walker2d": "Walker2d",
}


def raw_stepping(name, copies):
    """A function that makes so many steps of all copies; the vector environment resets what ends.

    Of gymnasium's two, one process for each copy with shared memory or all in this one, the one
    that is faster here.
    """
    import gymnasium
    from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

    robot = ROBOTS[name.partition("-")[0]]
    makers = [lambda: gymnasium.make(f"{robot}-v5", disable_env_checker=True)] * copies
    envs = [SyncVectorEnv(makers), AsyncVectorEnv(makers, shared_memory=True)]
    space = envs[0].action_space
    drawn = [space.sample() for _ in range(10)]
    seconds = []
    for env in envs:
        env.reset(seed=0)
        rounds = []
        for _ in range(3):
            began = time.perf_counter()
            for action in drawn * 20:
                env.step(action)
            rounds.append(time.perf_counter() - began)
        seconds.append(min(rounds))
    fastest = envs.pop(int(np.argmin(seconds)))
    envs[0].close()
    made = 0

    def step(steps):
        nonlocal made
        for _ in range(steps):
            fastest.step(drawn[made % len(drawn)])
            made += 1

    return step

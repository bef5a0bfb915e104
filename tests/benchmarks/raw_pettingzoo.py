"""PettingZoo's parallel environments stepped as its own documentation does, copy after copy."""

import importlib
import random
import warnings


def raw_stepping(name, copies):
    """A function that makes so many steps of all copies; a finished episode is reset."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(name)
    envs = [module.parallel_env() for _ in range(copies)]
    for seed, env in enumerate(envs):
        env.reset(seed=seed)
    numbers = random.Random(0)
    agents = envs[0].possible_agents
    drawn = [
        {agent: numbers.randrange(envs[0].action_space(agent).n) for agent in agents}
        for _ in range(10)
    ]
    made = 0

    def step(steps):
        nonlocal made
        for _ in range(steps):
            actions = drawn[made % len(drawn)]
            made += 1
            for env in envs:
                env.step({agent: actions[agent] for agent in env.agents})
                if not env.agents:
                    env.reset()

    return step

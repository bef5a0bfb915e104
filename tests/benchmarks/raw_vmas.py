"""VMAS stepped as its own documentation does."""

import torch


def raw_stepping(name, copies):
    """A function that makes so many steps of all copies; a finished episode is reset in one batch."""
    import vmas

    env = vmas.make_env(
        scenario=name,
        num_envs=copies,
        continuous_actions=True,
        clamp_actions=True,
        terminated_truncated=True,
        max_steps=100,
        seed=0,
    )
    env.reset()
    drawn = [
        [torch.rand(copies, env.get_agent_action_size(agent)) * 2 - 1 for agent in env.agents]
        for _ in range(10)
    ]
    made = 0

    @torch.no_grad()
    def step(steps):
        nonlocal made
        for _ in range(steps):
            env.step(drawn[made % len(drawn)])
            made += 1
            if made % 100 == 0:
                env.reset()

    return step

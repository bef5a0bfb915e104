"""Blind particle spread as tensor arithmetic alone: what the world computes, without the adapter."""

import torch


def raw_stepping(name, copies):
    """A function that makes so many steps of all copies; all start anew after 50."""
    from trainers.envs.blind_spread import GROUPS, moved

    sizes = torch.tensor(GROUPS[name])
    agents, groups = int(sizes.sum()), len(sizes)
    group = torch.arange(groups).repeat_interleave(sizes)
    everyone = torch.arange(agents)
    drawn = [torch.randint(5, (agents, copies)) for _ in range(10)]
    made = 0
    position = velocity = landmark = torch.empty(0)

    @torch.no_grad()
    def step(steps):
        nonlocal made, position, velocity, landmark
        for _ in range(steps):
            if made % 50 == 0:
                position = 2 * torch.rand(agents, copies, 2) - 1
                velocity = torch.zeros_like(position)
                landmark = 6 * torch.rand(copies, groups, 2) - 3
            position, velocity = moved(position, velocity, drawn[made % len(drawn)])
            relative = landmark - position[:, :, None]
            torch.cat([velocity, position, relative.flatten(2)], dim=-1)
            relative[everyone, :, group].norm(dim=-1).mul_(-0.5)
            made += 1

    return step

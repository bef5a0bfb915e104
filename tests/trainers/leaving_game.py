"""A game whose agents leave their episodes early, by a seeded schedule."""

import torch
from torch import Tensor

from trainers.envs.vector_env import Discrete, EnvSpec, Step, VectorEnv

AGENTS, ACTIONS, HORIZON, OBSERVATION = 3, 3, 7, 4


class LeavingGame(VectorEnv):
    """Synchronisation among the agents that are left; observations are noise.

    Each agent's last step is drawn for each episode. It ends in a terminal state when all have
    left, and is cut off at the horizon, which is a win. The world state says who acts, and the
    time. `garbage` stands in all that is said of agents that have left.
    """

    def __init__(self, copies, *, seed=0, garbage=0.0):
        self.copies = copies
        self.garbage = garbage
        self.random = torch.Generator().manual_seed(seed)
        self.spec = EnvSpec(
            name="leaving",
            agent_names=tuple(f"agent_{i}" for i in range(AGENTS)),
            observation_size=OBSERVATION,
            action_space=Discrete(n=ACTIONS),
            world_state_size=AGENTS + 1,
            outcomes=("win", "early"),
        )
        self.acting = torch.ones(AGENTS, copies, dtype=torch.bool)
        self.time = torch.zeros(copies, dtype=torch.int64)
        self.last = self._draw()

    def _draw(self):
        return torch.randint(1, HORIZON + 4, (AGENTS, self.copies), generator=self.random)

    def _observe(self):
        return torch.randn(AGENTS, self.copies, OBSERVATION, generator=self.random)

    def world_state(self):
        return torch.cat([self.acting, self.time[None]]).float().mT

    def reset(self):
        self.time = torch.zeros_like(self.time)
        self.acting = torch.ones_like(self.acting)
        self.last = self._draw()
        return self._observe()

    def step(self, action: Tensor) -> Step:
        choice = torch.where(self.acting, action, -torch.arange(1, AGENTS + 1)[:, None])
        same = (choice[:, None] == choice[None]) & self.acting[:, None] & self.acting
        reward = same.sum(1) / self.acting.sum(0).clamp(min=1)
        reward = torch.where(self.acting, reward.float(), self.garbage)
        self.time = self.time + 1
        active = self.acting & (self.time < self.last)
        terminated = ~active.any(0)
        truncated = (self.time >= HORIZON) & ~terminated
        ended = terminated | truncated
        final = torch.where(active[..., None], self._observe(), self.garbage)
        self.acting = active
        world_state, early = self.world_state(), self.time < 4
        first, last = self._observe(), self._draw()
        self.time = torch.where(ended, 0, self.time)
        self.last = torch.where(ended, last, self.last)
        self.acting = active | ended
        return Step(
            observation=torch.where(ended[:, None], first, final),
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            final_observation=final,
            active=active,
            final_world_state=world_state,
            outcomes={"win": truncated, "early": early},
        )

    def state(self):
        tensors = {"/time": self.time, "/last": self.last, "/acting": self.acting}
        return tensors | {"/random": self.random.get_state()}, {}

    def load_state(self, tensors, values):  # noqa: ARG002
        self.time, self.last, self.acting = (tensors[f"/{n}"] for n in ("time", "last", "acting"))
        self.random.set_state(tensors["/random"])

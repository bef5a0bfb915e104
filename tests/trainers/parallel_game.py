"""A game with PettingZoo's interface that does whatever a test wants of it."""

import numpy as np
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv

AGENTS = ("a", "b", "c")


class ParallelGame(ParallelEnv):
    """Agents see their number, the time and noise, and are paid their number times the time.

    `leaves` says at which step which agents leave, dead or cut off; the episode is cut off at
    `steps`. Agent c has one component of the observation and one action less, and counts its
    actions from 5.
    """

    def __init__(self, leaves=None, steps=6, *, box=False, seeded=True, render_mode=None):
        self.possible_agents = list(AGENTS)
        self.leaves = leaves or {}
        self.steps = steps
        self.seeded = seeded
        self.render_mode = render_mode
        self.taken = []
        sizes = {agent: 2 if agent == "c" else 3 for agent in AGENTS}
        self._observed = {a: Box(-np.inf, np.inf, (n,)) for a, n in sizes.items()}
        if box:
            self._acted = {a: Box(-2.0, 1.0, (n,)) for a, n in sizes.items()}
        else:
            self._acted = {a: Discrete(n, start=5 * (a == "c")) for a, n in sizes.items()}

    def observation_space(self, agent):
        return self._observed[agent]

    def action_space(self, agent):
        return self._acted[agent]

    def reset(self, seed=None, options=None):  # noqa: ARG002
        if seed is not None or not hasattr(self, "random"):
            self.random = np.random.default_rng(seed if self.seeded else None)
        self.agents, self.time = list(AGENTS), 0
        return self._see(self.agents), {agent: {} for agent in self.agents}

    def _see(self, agents):
        seen = {}
        for agent in agents:
            number, noise = AGENTS.index(agent), self.random.normal()
            seen[agent] = np.array([number, noise, self.time])[: self._observed[agent].shape[0]]
        return {agent: x.astype(np.float32) for agent, x in seen.items()}

    def step(self, actions):
        assert set(actions) == set(self.agents)
        assert all(self._acted[agent].contains(action) for agent, action in actions.items())
        self.taken.append(dict(actions))
        self.time += 1
        acting = list(self.agents)
        leaves = self.leaves.get(self.time, {})
        dead = {agent: leaves.get(agent) == "dead" for agent in acting}
        cut = {a: leaves.get(a) == "cut" or self.time == self.steps for a in acting}
        cut = {agent: cut[agent] and not dead[agent] for agent in acting}
        reward = {agent: float(AGENTS.index(agent) * self.time) for agent in acting}
        infos = {agent: {"time": self.time, "word": "x"} for agent in acting}
        self.agents = [agent for agent in acting if not (dead[agent] or cut[agent])]
        return self._see(acting), reward, dead, cut, infos

    def render(self):
        return np.full((4, 5, 3), self.time, dtype=np.uint8)

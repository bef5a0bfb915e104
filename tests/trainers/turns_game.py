"""A game in which what may be done changes at every step."""

import torch

from trainers.envs.matrix_games import MatrixGame


class Turns(MatrixGame):
    """Each agent may take another half of the actions at each step."""

    def action_mask(self):
        numbers = torch.arange(self.spec.action_space.n)
        agents = torch.arange(self.spec.agents)[:, None]
        return ((numbers + agents + self._time) % 2 == 0)[:, None].expand(-1, self.copies, -1)


def use_turns(monkeypatch):
    """Put it in place of what a trainer makes."""

    def make(name, *, copies, agents, seed, args, info, share):  # noqa: ARG001
        return Turns(name, copies=copies, agents=agents, args=args)

    monkeypatch.setattr("trainers.loop.make_env", make)

"""A game of two roles, which agents are not told."""

import torch
from torch import Tensor

from trainers.envs.vector_env import Discrete, EnvSpec, Step, VectorEnv

ROLES = (0, 1, 0, 0, 1, 1, 0, 1)
HORIZON = 12


class TwoRoles(VectorEnv):
    """Agents on a line from -1 to 1 see where they are and step to the left or to the right.

    What differs by role is what they are paid, minus the distance from -0.5 or 0.5, or where they
    go: agents of role 1 in the other direction, and all are paid for being on the right.
    """

    def __init__(self, copies, *, seed=0, differ="reward"):
        self.copies = copies
        self.spec = EnvSpec(
            name="two roles",
            agent_names=tuple(f"agent_{i}" for i in range(len(ROLES))),
            observation_size=1,
            action_space=Discrete(n=2),
        )
        self._differ = differ
        self._random = torch.Generator().manual_seed(seed)
        self.reset()

    def reset(self):
        self._time = 0
        self._place = 2 * torch.rand(len(ROLES), self.copies, generator=self._random) - 1
        return self._place[..., None].clone()

    def step(self, action: Tensor) -> Step:
        sign = 1 - 2 * torch.tensor(ROLES)[:, None]  # 1 of role 0, -1 of role 1
        away = self._differ == "transition"
        direction = (2 * action - 1) * (sign if away else 1)
        self._place = (self._place + 0.2 * direction).clamp(-1, 1)
        final = self._place[..., None].clone()
        self._time += 1
        over = self._time >= HORIZON
        return Step(
            reward=self._place.clone() if away else -(self._place - 0.5 * sign).abs(),
            terminated=torch.zeros(self.copies, dtype=torch.bool),
            truncated=torch.full((self.copies,), over),
            final_observation=final,
            observation=self.reset() if over else final,
        )

    def state(self):
        tensors = {"/place": self._place, "/random": self._random.get_state()}
        return tensors, {"time": self._time}

    def load_state(self, tensors, values):
        self._place, self._time = tensors["/place"].clone(), values["time"]
        self._random.set_state(tensors["/random"])

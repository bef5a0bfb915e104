"""Blind particle spread (Christianos et al., 2021): agents look for landmarks of hidden groups.

The physics, observations and rewards are those of SePS's fork of PettingZoo
(github.com/semitable/PettingZoo, `large_spread_v1` to `large_spread_v4`), stepped together.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradlab.checks import check, unknown_name
from trainers.envs.vector_env import Discrete, EnvSpec, Step, VectorEnv

GROUPS = {
    "1": (5, 5, 5),
    "2": (10, 10, 10),
    "3": (6, 6, 6, 6, 6),
    "4": (3, 3, 3, 12, 9),
}
"""Numbers of agents in each group by name; agents are numbered through group after group."""

_FORCES = 5.0 * torch.tensor([[0.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
_TIME_STEP = 0.1
_DAMPING = 0.25
_ARGUMENTS = {"max_steps": 50, "local_ratio": 0.5, "cooperative": False}


def moved(
    position: Float[Tensor, "agent copy 2"],
    velocity: Float[Tensor, "agent copy 2"],
    action: Int[Tensor, "agent copy"],
) -> tuple[Float[Tensor, "agent copy 2"], Float[Tensor, "agent copy 2"]]:
    """Move particles of mass 1, which pass through each other, by one step of 0.1 s.

    Args:
        position: Where they are.
        velocity: Their velocities, a quarter of which is lost in a step.
        action: 0 none, or a force of 5 to the left (1), right (2), down (3), up (4).

    Returns:
        Positions and velocities after the step; the new velocity is what moves them.
    """
    force = _FORCES.to(velocity.dtype)[action]
    velocity = velocity * (1 - _DAMPING) + force * _TIME_STEP
    return position + velocity * _TIME_STEP, velocity


class BlindSpread(VectorEnv):
    """Agents are paid for being near the landmark of their group, and not told which that is.

    An agent observes its velocity, its position, and where all landmarks lie relative to it, in the
    same order for all agents; not the other agents. Agents start at rest, uniformly in [-1, 1]^2,
    the landmarks, which stay, uniformly in [-3, 3]^2. The reward is what the source's mixture of
    the agent's own and the sum of all agents' comes to: by default `local_ratio` (0.5) times the
    negative distance to the own group's landmark; with `cooperative`, 1 - `local_ratio` times the
    sum of that over all agents. An episode is cut off (truncated) after `max_steps`, 50 as in SePS.
    """

    def __init__(
        self,
        name: str,
        *,
        copies: int,
        agents: int | None,
        seed: int,
        args: Mapping[str, Any],
        info: bool = False,  # noqa: ARG002 -- nothing is measured beside the reward
    ) -> None:
        if name not in GROUPS:
            raise unknown_name("blind particle spread", name, GROUPS)
        groups = GROUPS[name]
        total = sum(groups)
        check(agents in {None, total}, "agents", f"be {total} in bps/{name}", agents)
        settings = dict(_ARGUMENTS)
        for key, value in args.items():
            if key not in settings:
                raise unknown_name(f"argument of bps/{name}", key, settings)
            settings[key] = value
        steps, ratio, cooperative = settings.values()
        whole = type(steps) is int and steps >= 1
        check(whole, "max_steps", "be a whole number of at least 1", steps)
        real = type(ratio) in {int, float} and 0 <= ratio <= 1
        check(real, "local_ratio", "be a number between 0 and 1", ratio)
        check(type(cooperative) is bool, "cooperative", "be true or false", cooperative)
        self.copies = copies
        self.spec = EnvSpec(
            name=f"bps/{name}",
            agent_names=tuple(f"agent_{i}" for i in range(total)),
            observation_size=4 + 2 * len(groups),
            action_space=Discrete(n=len(_FORCES)),
        )
        self._group = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))
        self._max_steps = steps
        self._weight = 1 - ratio if cooperative else ratio
        self._cooperative = cooperative
        self._random = torch.Generator().manual_seed(seed)
        self.reset()

    def reset(self) -> Float[Tensor, "agent copy obs"]:
        """See `VectorEnv.reset`."""
        self._time = 0
        agents, groups = self.spec.agents, int(self._group[-1]) + 1
        self._position = 2 * torch.rand(agents, self.copies, 2, generator=self._random) - 1
        self._velocity = torch.zeros_like(self._position)
        self._landmark = 6 * torch.rand(self.copies, groups, 2, generator=self._random) - 3
        return self._observe(self._landmark - self._position[:, :, None])

    def step(self, action: Int[Tensor, "agent copy"] | Float[Tensor, "agent copy action"]) -> Step:
        """See `VectorEnv.step`."""
        self._position, self._velocity = moved(self._position, self._velocity, action)
        relative = self._landmark - self._position[:, :, None]  # [agent, copy, group, 2]
        own = relative[torch.arange(self.spec.agents), :, self._group]
        reward = -own.norm(dim=-1)
        if self._cooperative:
            reward = reward.sum(0).expand_as(reward)
        final = self._observe(relative)
        self._time += 1
        cut_off = self._time >= self._max_steps
        return Step(
            observation=self.reset() if cut_off else final,
            reward=self._weight * reward,
            terminated=torch.zeros(self.copies, dtype=torch.bool),
            truncated=torch.full((self.copies,), cut_off),
            final_observation=final,
        )

    def _observe(self, relative: Tensor) -> Tensor:
        return torch.cat([self._velocity, self._position, relative.flatten(2)], dim=-1)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `VectorEnv.state`."""
        return {
            "/position": self._position,
            "/velocity": self._velocity,
            "/landmark": self._landmark,
            "/random": self._random.get_state(),
        }, {"time": self._time}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """See `VectorEnv.load_state`."""
        self._position, self._velocity, self._landmark = (
            tensors[f"/{name}"].clone() for name in ("position", "velocity", "landmark")
        )
        self._random.set_state(tensors["/random"])
        self._time = values["time"]

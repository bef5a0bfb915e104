"""The Specialisation and Synchronisation games, stateless and temporal (HyperMARL, section 3)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from gradlab.checks import check, unknown_name
from trainers.envs.vector_env import Discrete, EnvSpec, Step, VectorEnv


def _count_of_own(action: Int[Tensor, "agent copy"], actions: int) -> Float[Tensor, "agent copy"]:
    """How many agents of the same copy chose the same action."""
    counts = functional.one_hot(action, actions).sum(0)
    return counts.gather(1, action.mT).mT.float()


def specialisation_reward(
    action: Int[Tensor, "agent copy"], actions: int
) -> Float[Tensor, "agent copy"]:
    """Reward 1 / (number of agents that chose the same action).

    Args:
        action: Chosen actions.
        actions: Number of actions there are.

    Returns:
        Each agent's reward; its mean over agents is (number of distinct actions) / agents.
    """
    return 1 / _count_of_own(action, actions)


def synchronisation_reward(
    action: Int[Tensor, "agent copy"], actions: int
) -> Float[Tensor, "agent copy"]:
    """Reward 1 / (1 + number of agents that chose another action).

    Args:
        action: Chosen actions.
        actions: Number of actions there are.

    Returns:
        Each agent's reward.
    """
    return 1 / (len(action) - _count_of_own(action, actions) + 1)


def chance_return(agents: int, actions: int) -> float:
    """Mean reward of uniformly random play of the Specialisation game.

    An action is chosen by somebody with probability 1 - (1 - 1/K)^N, so K times that many actions
    are distinct on average.

    Args:
        agents: Number of agents N.
        actions: Number of actions K.

    Returns:
        The expected mean reward per step.
    """
    return actions / agents * (1 - (1 - 1 / actions) ** agents)


Reward = Callable[[Tensor, int], Tensor]

GAMES: dict[str, Reward] = {
    "specialisation": specialisation_reward,
    "synchronisation": synchronisation_reward,
}
TEMPORAL = "-temporal"
NAMES = tuple(name + form for name in GAMES for form in ("", TEMPORAL))


class MatrixGame(VectorEnv):
    """A repeated or one-shot game.

    One-shot: the observation is a constant and every step ends the episode. Temporal: everyone
    sees the one-hot previous joint action (-1 everywhere at first), and the episode is cut off
    (truncated, not terminated) at the horizon.
    """

    def __init__(
        self, name: str, *, copies: int, agents: int | None, args: Mapping[str, object]
    ) -> None:
        agents = 4 if agents is None else agents
        check(agents >= 1, "agents", "be at least 1", agents)
        temporal = name.endswith(TEMPORAL)
        known = {"actions": max(agents, 2)} | ({"horizon": 100} if temporal else {})
        for key, value in args.items():
            if key not in known:
                raise unknown_name(f"argument of {name}", key, known)
            valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            check(valid, key, "be a whole number of at least 1", value)
            assert isinstance(value, int)
            known[key] = value
        self.copies = copies
        self._reward = GAMES[name.removesuffix(TEMPORAL)]
        self._actions = known["actions"]
        self._horizon = known.get("horizon")
        self.spec = EnvSpec(
            name=name,
            agent_names=tuple(f"agent_{i}" for i in range(agents)),
            observation_size=agents * self._actions if temporal else 1,
            action_space=Discrete(n=self._actions),
        )
        self._time = 0

    def reset(self) -> Float[Tensor, "agent copy obs"]:
        """See `VectorEnv.reset`."""
        self._time = 0
        start = -1.0 if self._horizon else 1.0
        return torch.full((self.spec.agents, self.copies, self.spec.observation_size), start)

    def step(self, action: Int[Tensor, "agent copy"] | Float[Tensor, "agent copy action"]) -> Step:
        """See `VectorEnv.step`."""
        reward = self._reward(action, self._actions)
        self._time += 1
        final = self.reset_observation() if self._horizon is None else self._seen(action)
        cut_off = self._horizon is not None and self._time >= self._horizon
        ended = self._horizon is None or cut_off
        return Step(
            observation=self.reset() if ended else final,
            reward=reward,
            terminated=torch.full((self.copies,), self._horizon is None),
            truncated=torch.full((self.copies,), cut_off),
            final_observation=final,
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `VectorEnv.state`."""
        return {}, {"time": self._time}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:  # noqa: ARG002
        """See `VectorEnv.load_state`."""
        self._time = values["time"]

    def reset_observation(self) -> Float[Tensor, "agent copy obs"]:
        """The constant observation of the one-shot games.

        Returns:
            Ones.
        """
        return torch.ones(self.spec.agents, self.copies, self.spec.observation_size)

    def _seen(self, action: Tensor) -> Tensor:
        joint = functional.one_hot(action, self._actions).float()  # [agent, copy, action]
        return joint.transpose(0, 1).flatten(1).expand(self.spec.agents, -1, -1).clone()

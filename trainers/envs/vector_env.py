"""What the training loop asks of an environment: many copies stepped at once, as torch tensors."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Discrete:
    """One of `n` actions, numbered from 0."""

    n: int


@dataclass(frozen=True, kw_only=True)
class Box:
    """A real vector whose components lie between `low` and `high`."""

    low: Float[Tensor, " action"]
    high: Float[Tensor, " action"]


@dataclass(frozen=True, kw_only=True)
class EnvSpec:
    """What is the same for every copy of an environment.

    Attributes:
        name: The name under which the environment is registered.
        agent_names: One name per agent; their number is the number of agents.
        observation_size: Length of each agent's observation.
        action_space: The action space, the same for every agent.
    """

    name: str
    agent_names: tuple[str, ...]
    observation_size: int
    action_space: Discrete | Box

    @property
    def agents(self) -> int:
        """Number of agents."""
        return len(self.agent_names)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step of all copies brings.

    Attributes:
        observation: What the agents act on next: where an episode ended, the first observation of
            the next one.
        reward: Reward of each agent for this step.
        terminated: The episode ended in a terminal state: nothing follows, its value is 0.
        truncated: The episode was cut off (time limit) in a state that has a value. Never true
            together with `terminated`.
        final_observation: The observation before any reset; equals `observation` where no episode
            ended.
    """

    observation: Float[Tensor, "agent copy obs"]
    reward: Float[Tensor, "agent copy"]
    terminated: Bool[Tensor, " copy"]
    truncated: Bool[Tensor, " copy"]
    final_observation: Float[Tensor, "agent copy obs"]


class VectorEnv(ABC):
    """Independent copies of one environment, stepped together; finished copies reset themselves.

    All randomness comes from the seed given at construction, and never from (nor into) the global
    random state. float32 tensors on the CPU.
    """

    spec: EnvSpec
    copies: int

    @abstractmethod
    def reset(self) -> Float[Tensor, "agent copy obs"]:
        """Start every copy anew.

        Returns:
            The first observations.
        """

    @abstractmethod
    def step(self, action: Int[Tensor, "agent copy"] | Float[Tensor, "agent copy action"]) -> Step:
        """Advance every copy by one step.

        Args:
            action: One action per agent and copy: an index (int64) for a `Discrete` space, a
                vector inside the box for a `Box` space.

        Returns:
            What the step brought.
        """

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copy what the environment needs to go on exactly as it would.

        Returns:
            Tensors by name, and the rest as JSON can hold it.
        """

    @abstractmethod
    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on from a copied state.

        Args:
            tensors: What `state` returned first.
            values: What it returned second.
        """

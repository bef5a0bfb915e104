"""What the training loop asks of an environment: many copies stepped at once, as torch tensors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from gradlab.checks import Failed, UsageError
from trainers.processes import Share


@dataclass(frozen=True, kw_only=True)
class Discrete:
    """One of `n` actions, numbered from 0."""

    n: int


@dataclass(frozen=True, kw_only=True)
class Box:
    """A real vector whose components lie between `low` and `high`.

    Both have a leading agent axis where agents have other bounds than each other.
    """

    low: Float[Tensor, "*agent action"]
    high: Float[Tensor, "*agent action"]

    @property
    def size(self) -> int:
        """Number of components."""
        return self.low.shape[-1]


@dataclass(frozen=True, kw_only=True)
class EnvSpec:
    """What is the same for every copy of an environment.

    Attributes:
        name: The name under which the environment is registered.
        agent_names: One name per agent; their number is the number of agents.
        observation_size: Length of every agent's observation, padded if its own is shorter.
        action_space: The action space of every agent, padded if its own is smaller.
        observation_sizes: Lengths of the agents' own observations, if they differ. What is beyond
            an agent's own is 0.
        action_sizes: Numbers of the agents' own actions, or of their components, if they differ.
            What is beyond an agent's own is never taken, or has no effect.
        world_state_size: Length of what `VectorEnv.world_state` says; None if it says nothing.
        outcomes: Names of what an episode may come to, see `Step.outcomes`.
        resuming: In words, how a training goes on if the environment's state can't be copied; empty
            if it can, and the training goes on exactly.
    """

    name: str
    agent_names: tuple[str, ...]
    observation_size: int
    action_space: Discrete | Box
    observation_sizes: tuple[int, ...] | None = None
    action_sizes: tuple[int, ...] | None = None
    world_state_size: int | None = None
    outcomes: tuple[str, ...] = ()
    resuming: str = ""

    @property
    def agents(self) -> int:
        """Number of agents."""
        return len(self.agent_names)

    @property
    def action_mask(self) -> Bool[Tensor, "agent action"] | None:
        """Which actions, or components of an action, each agent has; None: all have all."""
        if self.action_sizes is None:
            return None
        space = self.action_space
        most = torch.arange(space.n if isinstance(space, Discrete) else space.size)
        return most < torch.tensor(self.action_sizes)[:, None]

    @property
    def padding(self) -> str:
        """In words, what of which agents is padded; empty if nothing is."""
        named = {"observation": self.observation_sizes, "action": self.action_sizes}
        return "; ".join(
            f"{kind} sizes "
            + ", ".join(f"{n} {size}" for n, size in zip(self.agent_names, sizes, strict=True))
            for kind, sizes in named.items()
            if sizes is not None
        )


def check_equal_spaces(spec: EnvSpec) -> None:
    """Raise unless all agents' observations and actions have the same sizes.

    Args:
        spec: What the environment looks like.

    Raises:
        UsageError: If they have not.
    """
    if spec.padding:
        raise UsageError(
            f"{spec.name}: every agent must have the same observation and action size, as one "
            f"form of network serves all. Got {spec.padding}. Add --pad true to pad the smaller."
        )


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
        info: What the environment measures itself in this step, before any reset, by name; empty
            if it measures nothing or was not asked to. NaN for an agent that a measure is not of.
        active: Which agents go on: the others have left their episode with this step or before, and
            neither act nor learn until it ends. An episode begins with all agents; None: none has
            left. What stands in the other fields for an agent that has left is never read.
        final_world_state: What `VectorEnv.world_state` would say before any reset; None if the
            environment has none.
        outcomes: Whether the episodes came to what they may come to, e.g. "win", by the names in
            the spec; read where an episode ended.
    """

    observation: Float[Tensor, "agent copy obs"]
    reward: Float[Tensor, "agent copy"]
    terminated: Bool[Tensor, " copy"]
    truncated: Bool[Tensor, " copy"]
    final_observation: Float[Tensor, "agent copy obs"]
    active: Bool[Tensor, "agent copy"] | None = None
    info: Mapping[str, Float[Tensor, "agent copy"]] = field(default_factory=dict)
    final_world_state: Float[Tensor, "copy state"] | None = None
    outcomes: Mapping[str, Bool[Tensor, " copy"]] = field(default_factory=dict)

    @property
    def ended(self) -> Bool[Tensor, " copy"]:
        """Where an episode ended."""
        return self.terminated | self.truncated

    @property
    def left(self) -> Bool[Tensor, "agent copy"]:
        """For whom nothing follows: their episode is over, or they have left it."""
        over = self.terminated.expand(self.reward.shape)
        return over if self.active is None else over | ~self.active

    @property
    def act_next(self) -> Bool[Tensor, "agent copy"]:
        """Which agents act on `observation`."""
        if self.active is None:
            return torch.ones(self.reward.shape, dtype=torch.bool)
        return self.active | self.ended

    def of_active(self, acted: Bool[Tensor, "agent copy"]) -> "Step":
        """Put 0 in place of what is said of agents that have left their episode.

        So critics that read all agents' observations see 0 there (death masking; Yu et al., 2022,
        section 5.4), and nothing else can be learned from it either.

        Args:
            acted: Which agents acted in this step.

        Returns:
            The step; itself if no agent has left.
        """
        if self.active is None:
            return self
        return replace(
            self,
            observation=kept(self.observation, self.act_next),
            reward=kept(self.reward, acted),
            final_observation=kept(self.final_observation, self.active),
        )


def kept(
    values: Float[Tensor, "agent copy ..."], where: Bool[Tensor, "agent copy"]
) -> Float[Tensor, "agent copy ..."]:
    """Put 0 elsewhere, whatever stands there.

    Args:
        values: Values.
        where: Of whom they are kept.

    Returns:
        A tensor of the same shape.
    """
    where = where.view(*where.shape, *[1] * (values.dim() - 2))
    return torch.where(where, values, torch.zeros((), dtype=values.dtype))


def cant_be_split(name: str, why: str) -> UsageError:
    """Make the error for an environment whose copies several processes can't share.

    Args:
        name: The environment's.
        why: Why not.

    Returns:
        The error.
    """
    return UsageError(
        f"{name} can't be shared out over several processes: {why}. Train with one process."
    )


class RenderingFailed(Failed):
    """What is missing on this machine to draw an environment that can be drawn."""


class EnvironmentFailed(Failed):
    """What ended a simulation that was going on, e.g. the death of a process that does it.

    The environment can be started anew (`VectorEnv.reset`), or from a copied state (`load_state`).
    """


class VectorEnv(ABC):
    """Independent copies of one environment, stepped together; finished copies reset themselves.

    All randomness comes from the seed given at construction, and never from (nor into) the global
    random state. float32 tensors on the CPU.

    Attributes:
        spec: What the environment looks like.
        copies: Number of copies.
        share: Which of a training's copies they are, if several processes have some each.
        renders: Whether there is a drawing of it.
    """

    renders: ClassVar[bool] = False
    spec: EnvSpec
    copies: int
    share: Share | None = None

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

    def render(self, copy: int) -> UInt8[np.ndarray, "height width 3"]:  # noqa: ARG002
        """Draw one copy as it stands.

        Args:
            copy: Its number.

        Returns:
            Red, green and blue of every pixel, the top row first.

        Raises:
            UsageError: If there is no drawing of this environment.
            RenderingFailed: If something is missing on this machine.
        """
        raise UsageError(
            f"{self.spec.name} has no rendering. VMAS scenarios and MAMuJoCo robots have."
        )

    def action_mask(self) -> Bool[Tensor, "agent copy action"] | None:
        """Say what the agents may do next, after a reset or step.

        An environment in which that changes from step to step overrides this.

        Returns:
            True for each numbered action that is available, or component of an action that has an
            effect: at least one of each agent. None: all are.
        """
        own = self.spec.action_mask
        return None if own is None else own[:, None].expand(-1, self.copies, -1)

    def world_state(self) -> Float[Tensor, "copy state"] | None:
        """Say how the world stands, after a reset or step; more than any agent may see.

        An environment that knows it overrides this, and says its size in the spec.

        Returns:
            What critics may read; None: there is no such thing.
        """
        return None

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

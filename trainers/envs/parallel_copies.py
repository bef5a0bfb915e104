"""Environments with PettingZoo's parallel interface: copies of one, stepped one after the other."""

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from gradlab.checks import Failed, UsageError, check
from gradlab.extras import require
from trainers.envs.padding import common_space, if_they_differ
from trainers.envs.vector_env import Box, Discrete, EnvironmentFailed, EnvSpec, Step, VectorEnv
from trainers.processes import Share

INTERFACE = ("possible_agents", "observation_space", "action_space", "reset", "step")
"""What an environment must have; and `agents` once it has been reset."""

RESUMING = "the episodes under way are played again, and checked to be where they were"

RENDER_MODE = "rgb_array"

ParallelEnv = Any  # by what it has, not by its class


class ParallelCopies(VectorEnv):
    """Copies of an environment whose agents act at once, each copy an object of its own.

    Observations are flattened `Box` spaces, float32; or a `Dict` of one and an `action_mask`, which
    is PettingZoo's way to say which numbered actions are available.

    Every episode is begun with a seed of its own, which follows from the seed given, the copy and
    the number of the episode. So an episode is determined by its seed and its actions, as far as
    the environment goes by its seed, and that is what is saved of it; resuming plays it again.

    An agent that is cut off while others go on has left like one that has died.
    """

    renders: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        make: Callable[[], ParallelEnv],
        *,
        copies: int,
        agents: int | None,
        seed: int,
        info: bool = False,
        share: Share | None = None,
    ) -> None:
        """Make the copies.

        Args:
            name: The name under which the environment is registered.
            make: Makes one copy.
            copies: Number of copies.
            agents: The number of agents that is asked for; None: whatever there are.
            seed: Seed of all episodes.
            info: Whether steps bring the numbers in the environment's `infos`.
            share: Which copies they are; None: all.

        Raises:
            UsageError: If it raises an error, or its interface or spaces are others than can be
                used.
        """
        require("pettingzoo", "gymnasium")
        self.copies = copies
        self._seed = seed
        self._first_copy = 0 if share is None else share.first
        self._info = info
        with in_one_line(f"{name}: making it", UsageError):
            self._envs = [make() for _ in range(copies)]
        first = self._envs[0]
        if missing := [part for part in INTERFACE if not hasattr(first, part)]:
            raise UsageError(
                f"{name} must be an environment with PettingZoo's parallel interface. Got a "
                f"{type(first).__name__}, which has no {', '.join(missing)}. pettingzoo.utils."
                "aec_to_parallel makes one of an environment whose agents take turns."
            )
        self._agents = list(first.possible_agents)
        check(
            agents in {None, len(self._agents)},
            "agents",
            f"be {len(self._agents)} in {name}, as it is made (its own argument: --env-arg)",
            agents,
        )
        with in_one_line(f"{name}: its spaces", UsageError):
            observed = [first.observation_space(agent) for agent in self._agents]
            acted = [first.action_space(agent) for agent in self._agents]
        self._masked = [_is_masked(space) for space in observed]
        sizes = [
            _observation_size(name, agent, space["observation"] if masked else space)
            for agent, space, masked in zip(self._agents, observed, self._masked, strict=True)
        ]
        own = [
            _own_space(name, agent, space) for agent, space in zip(self._agents, acted, strict=True)
        ]
        if len({type(space) for space in own}) > 1:
            raise UsageError(
                f"{name}: the action spaces of all agents must be Discrete, or of all be Box. Got "
                f"{', '.join(f'{a} {s}' for a, s in zip(self._agents, acted, strict=True))}."
            )
        self._observation_sizes = sizes
        self._first_action = [getattr(space, "start", 0) for space in acted]
        self._action_types = [space.dtype for space in acted]
        action_space, action_sizes = common_space(own)
        self._action_sizes = action_sizes
        self.spec = EnvSpec(
            name=name,
            agent_names=tuple(str(agent) for agent in self._agents),
            observation_size=max(sizes),
            action_space=action_space,
            observation_sizes=if_they_differ(sizes),
            action_sizes=if_they_differ(action_sizes),
            resuming=RESUMING,
        )
        if any(self._masked) and not isinstance(action_space, Discrete):
            raise UsageError(f"{name}: the actions of an `action_mask` must be Discrete.")
        most = np.arange(max(action_sizes))
        self._own_actions = most < np.array(action_sizes)[:, None]  # [agent, action]
        self._available = np.repeat(self._own_actions[:, None], copies, axis=1)
        self._episode = np.full(copies, -1)
        self._taken: list[list[np.ndarray]] = [[] for _ in range(copies)]
        self._acting = np.ones((len(self._agents), copies), dtype=bool)
        self._observation = np.zeros((len(self._agents), copies, max(sizes)), dtype=np.float32)
        # Some environments begin otherwise when they have just been made than ever after.
        try:
            self._begin_all()
        except EnvironmentFailed as error:
            raise UsageError(str(error)) from error

    def reset(self) -> Float[Tensor, "agent copy obs"]:
        """See `VectorEnv.reset`."""
        self._begin_all()
        return torch.from_numpy(self._observation.copy())

    def step(self, action: Int[Tensor, "agent copy"] | Float[Tensor, "agent copy action"]) -> Step:
        """See `VectorEnv.step`.

        Raises:
            EnvironmentFailed: If a copy raises an error or breaks the interface.
        """
        taken = action.numpy()
        shape = (len(self._agents), self.copies)
        reward = np.zeros(shape, dtype=np.float32)
        active = np.zeros(shape, dtype=bool)
        terminated, truncated = np.zeros((2, self.copies), dtype=bool)
        infos: dict[str, np.ndarray] = {}
        for copy in range(self.copies):
            brought = self._step_copy(copy, taken[:, copy])
            reward[:, copy], active[:, copy], terminated[copy], truncated[copy] = brought[:4]
            self._gather(infos, copy, brought[4])
        final = torch.from_numpy(self._observation.copy())
        self._acting = active.copy()
        for copy in np.flatnonzero(terminated | truncated).tolist():
            self._begin(copy)
        return Step(
            observation=torch.from_numpy(self._observation.copy()),
            reward=torch.from_numpy(reward),
            terminated=torch.from_numpy(terminated),
            truncated=torch.from_numpy(truncated),
            final_observation=final,
            active=None if active.all() else torch.from_numpy(active),
            info={name: torch.from_numpy(values) for name, values in infos.items()},
        )

    def action_mask(self) -> Bool[Tensor, "agent copy action"] | None:
        """See `VectorEnv.action_mask`.

        Raises:
            EnvironmentFailed: If an agent has no action.
        """
        if not any(self._masked):
            return super().action_mask()
        if not self._available.any(-1).all():
            agent, copy = np.argwhere(~self._available.any(-1))[0]
            raise EnvironmentFailed(
                f"{self.spec.name}: an `action_mask` must leave an action. That of "
                f"{self._agents[agent]} in copy {copy} leaves none."
            )
        return torch.from_numpy(self._available.copy())

    def render(self, copy: int) -> UInt8[np.ndarray, "height width 3"]:
        """See `VectorEnv.render`."""
        env = self._envs[copy]
        if getattr(env, "render_mode", None) != RENDER_MODE:
            raise UsageError(
                f"{self.spec.name} is not made to be drawn. Train it with "
                f"--env-arg render_mode={RENDER_MODE} if it can be."
            )
        with in_one_line(f"{self.spec.name}: drawing it", EnvironmentFailed):
            return np.ascontiguousarray(env.render())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copy what the environment needs to go on as it would.

        Returns:
            The seeds' episode numbers [copy], the actions taken since the episodes began
            [steps of all copies, agent, ...], how many of them are each copy's [copy], and what
            agents see, by which resuming tells that it is where it was.
        """
        actions = [action for taken in self._taken for action in taken]
        return {
            "/episode": torch.from_numpy(self._episode.copy()),
            "/steps": torch.tensor([len(taken) for taken in self._taken]),
            "/actions": torch.from_numpy(np.stack(actions)) if actions else torch.empty(0),
            "/acting": torch.from_numpy(self._acting.copy()),
            "/observation": torch.from_numpy(self._observation.copy()),
        }, {}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:  # noqa: ARG002
        """Play the episodes under way again.

        Args:
            tensors: What `state` returned first.
            values: What it returned second.

        Raises:
            UsageError: If an episode does not repeat itself.
        """
        actions = iter(tensors["/actions"].numpy())
        seen, acting = tensors["/observation"].numpy(), tensors["/acting"].numpy()
        for copy, steps in enumerate(tensors["/steps"].tolist()):
            self._episode[copy] = tensors["/episode"][copy] - 1
            self._begin(copy)
            for _ in range(steps):
                # An episode that ends too early can't be stepped: what follows is told below.
                if not self._acting[:, copy].any():
                    break
                self._acting[:, copy] = self._step_copy(copy, next(actions))[1]
            same = np.array_equal(self._observation[:, copy], seen[:, copy], equal_nan=True)
            if not (same and np.array_equal(self._acting[:, copy], acting[:, copy])):
                raise UsageError(
                    f"{self.spec.name} can't be resumed: played again with its seed and its "
                    f"actions, the episode of copy {copy} is at step {steps} not where it was. "
                    "Something in the environment is random beside reset(seed=...), or outlives "
                    "an episode. Train anew with another --out."
                )

    def _begin_all(self) -> None:
        for copy in range(self.copies):
            self._begin(copy)

    def _begin(self, copy: int) -> None:
        """Begin a copy's next episode."""
        env = self._envs[copy]
        self._episode[copy] += 1
        entropy = (self._seed, self._first_copy + copy, int(self._episode[copy]))
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)  # 31 bits
        with in_one_line(f"{self.spec.name}: reset(seed={seed})", EnvironmentFailed):
            brought = env.reset(seed=seed)
        if not (isinstance(brought, tuple) and len(brought) == 2):
            raise EnvironmentFailed(
                f"{self.spec.name}: reset must return (observations, infos). Got {_kind(brought)}."
            )
        there = getattr(env, "agents", ())
        if set(there) != set(self._agents):
            raise EnvironmentFailed(
                f"{self.spec.name}: every episode must begin with all of possible_agents "
                f"({', '.join(self.spec.agent_names)}) as its agents. Got "
                f"{', '.join(map(str, there)) or 'none'}."
            )
        self._taken[copy] = []
        self._acting[:, copy] = True
        self._see(copy, brought[0], self._acting[:, copy])

    def _step_copy(
        self, copy: int, taken: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, bool, bool, Mapping[Any, Any]]:
        """Step one copy.

        Returns:
            Rewards [agent], which agents go on [agent], whether the episode ended in a terminal
            state or was cut off, and the infos. What agents see is put in its place.
        """
        env, acting = self._envs[copy], self._acting[:, copy]
        self._taken[copy].append(np.array(taken))
        numbers = np.flatnonzero(acting).tolist()
        actions = {self._agents[i]: self._own_action(i, np.asarray(taken[i])) for i in numbers}
        with in_one_line(f"{self.spec.name}: step of copy {copy}", EnvironmentFailed):
            brought = env.step(actions)
        if not (isinstance(brought, tuple) and len(brought) == 5):
            raise EnvironmentFailed(
                f"{self.spec.name}: step must return (observations, rewards, terminations, "
                f"truncations, infos). Got {_kind(brought)}."
            )
        observations, rewards, terminations, truncations, infos = brought
        dead, cut, goes_on = np.zeros((3, len(self._agents)), dtype=bool)
        left = {self._agents[i] for i in np.flatnonzero(~acting).tolist()}
        if back := left & set(env.agents):
            raise EnvironmentFailed(
                f"{self.spec.name}: an agent that has left its episode must stay away until the "
                f"next. {min(map(str, back))} came back."
            )
        reward = np.zeros(len(self._agents))
        for i in numbers:
            agent = self._agents[i]
            dead[i], cut[i] = terminations.get(agent, False), truncations.get(agent, False)
            goes_on[i] = agent in env.agents and not (dead[i] or cut[i])
            if agent not in rewards:
                raise EnvironmentFailed(f"{self.spec.name}: step gave no reward of {agent}.")
            reward[i] = rewards[agent]
        over = not goes_on.any()
        cut_off = over and bool((cut & ~dead).any())
        if cut_off:
            goes_on = cut & ~dead  # their last state has a value
        self._see(copy, observations, goes_on)
        return reward, goes_on, over and not cut_off, cut_off, infos

    def _see(self, copy: int, observations: Mapping[Any, Any], needed: np.ndarray) -> None:
        """Put what agents see in its place, 0 of those that are not needed and not there."""
        self._observation[:, copy] = 0
        self._available[:, copy] = self._own_actions
        for i, (agent, size) in enumerate(zip(self._agents, self._observation_sizes, strict=True)):
            if agent in observations:
                seen = observations[agent]
                if self._masked[i]:
                    if needed[i]:
                        own = self._available[i, copy, : self._action_sizes[i]]
                        own[:] = np.asarray(seen["action_mask"], dtype=bool)
                    seen = seen["observation"]
                seen = np.asarray(seen)
                if seen.size != size:
                    raise EnvironmentFailed(
                        f"{self.spec.name}: the observation of {agent} must have the {size} "
                        f"numbers of its space. Got shape {seen.shape}."
                    )
                self._observation[i, copy, :size] = seen.reshape(-1)
            elif needed[i]:
                raise EnvironmentFailed(f"{self.spec.name}: there is no observation of {agent}.")

    def _own_action(self, agent: int, taken: np.ndarray) -> Any:  # noqa: ANN401
        if isinstance(self.spec.action_space, Discrete):
            return int(taken) + int(self._first_action[agent])
        return taken[: self._action_sizes[agent]].astype(self._action_types[agent])

    def _gather(self, found: dict[str, np.ndarray], copy: int, infos: Mapping[Any, Any]) -> None:
        """Add what an agent's info says in one number."""
        if not self._info:
            return
        for i, agent in enumerate(self._agents):
            for name, value in infos.get(agent, {}).items():
                if np.ndim(value) == 0 and isinstance(value, int | float | np.number | np.bool_):
                    shape = (len(self._agents), self.copies)
                    values = found.setdefault(name, np.full(shape, np.nan, dtype=np.float32))
                    values[i, copy] = value


@contextlib.contextmanager
def in_one_line(what: str, kind: type[UsageError] | type[Failed]) -> Iterator[None]:
    """Make one line of whatever somebody else's code raises.

    Args:
        what: What was done, to be read before "raised".
        kind: What the error becomes. Errors that are already one line pass.

    Yields:
        Nothing.
    """
    try:
        yield
    except (UsageError, Failed):
        raise
    except Exception as error:
        places = traceback.extract_tb(error.__traceback__)
        own = [place for place in places if "site-packages" not in place.filename] or places
        message = " ".join(str(error).split())
        raise kind(
            f"{what} raised {type(error).__name__}{': ' if message else ''}{message} "
            f"({Path(own[-1].filename).name}, line {own[-1].lineno})"
        ) from error


def _kind(brought: object) -> str:
    length = f" of {len(brought)}" if isinstance(brought, tuple) else ""
    return f"a {type(brought).__name__}{length}"


def _is_masked(space: Any) -> bool:  # noqa: ANN401
    import gymnasium

    parts = {"observation", "action_mask"}
    return isinstance(space, gymnasium.spaces.Dict) and set(space.spaces) == parts


def _observation_size(name: str, agent: object, space: Any) -> int:  # noqa: ANN401
    import gymnasium

    usable = isinstance(space, gymnasium.spaces.Box) and space.dtype != np.uint8
    if not usable:
        raise UsageError(
            f"{name}: an observation must be a Box of numbers that are no image (uint8). Got "
            f"{space} of {agent}."
        )
    return int(np.prod(space.shape))


def _own_space(name: str, agent: object, space: Any) -> Discrete | Box:  # noqa: ANN401
    import gymnasium

    if isinstance(space, gymnasium.spaces.Discrete):
        return Discrete(n=int(space.n))
    if isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1 and space.is_bounded():
        low, high = (torch.tensor(np.asarray(end, "float32")) for end in (space.low, space.high))
        return Box(low=low, high=high)
    raise UsageError(
        f"{name}: an action must be Discrete, or a Box of one axis within bounds. Got {space} of "
        f"{agent}. A MultiDiscrete can be wrapped: one number for each combination, or a Box."
    )

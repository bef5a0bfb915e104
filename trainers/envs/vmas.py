"""VMAS scenarios (Bettini et al., 2022); agents with smaller spaces than others are padded."""

import ast
import contextlib
import importlib.util
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from gradlab.checks import UsageError, check, unknown_name
from trainers.envs.object_state import capture, restore
from trainers.envs.padding import common_space, if_they_differ
from trainers.envs.starts import MADE_AT_ONCE, Starts
from trainers.envs.vector_env import (
    Box,
    Discrete,
    EnvSpec,
    RenderingFailed,
    Step,
    VectorEnv,
    cant_be_split,
)
from trainers.processes import Share

RENDERING_PACKAGES = ("libegl1", "libgl1", "libglu1-mesa", "libgl1-mesa-dri")
"""Debian's names of what VMAS draws with."""

_RANDOM = ("/random/torch", "/random/numpy", "/random/python")
_STARTS = "/starts"


def scenario_files() -> dict[str, Path]:
    """Find the scenarios that VMAS ships, without importing it.

    Returns:
        Each scenario's source file by name.
    """
    found = importlib.util.find_spec("vmas")
    assert found is not None
    assert found.origin is not None
    files = (Path(found.origin).parent / "scenarios").rglob("*.py")
    return {file.stem: file for file in sorted(files) if file.stem != "__init__"}


def scenario_arguments(file: Path) -> list[str]:
    """Read the keyword arguments that a scenario takes off its source.

    Args:
        file: The scenario's source file.

    Returns:
        Their names: what it pops or gets from `kwargs`.
    """
    return [
        node.args[0].value
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"pop", "get"}
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "kwargs"
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    ]


class VmasEnv(VectorEnv):
    """A VMAS scenario; an episode is cut off (truncated) after `max_steps`, 100 by default."""

    renders = True

    def __init__(
        self,
        scenario: str,
        *,
        copies: int,
        agents: int | None,
        seed: int,
        args: Mapping[str, Any],
        info: bool = False,
        share: Share | None = None,
    ) -> None:
        files = scenario_files()
        if scenario not in files:
            raise unknown_name("VMAS scenario", scenario, files)
        known = scenario_arguments(files[scenario])
        for key in args:
            if key not in {*known, "max_steps", "continuous_actions"}:
                raise unknown_name(
                    f"argument of vmas/{scenario}",
                    key,
                    sorted({*known, "max_steps", "continuous_actions"}),
                )
        settings = {"max_steps": 100, "continuous_actions": True, **args}
        for key, kind in (("max_steps", int), ("continuous_actions", bool)):
            value = settings[key]
            check(type(value) is kind, key, f"be of type {kind.__name__}", value)
        check(settings["max_steps"] >= 1, "max_steps", "be at least 1", settings["max_steps"])
        if agents is not None and "n_agents" in known:
            settings["n_agents"] = agents
        vmas = _import_vmas()
        self._make = partial(_make, vmas, scenario, settings)
        self._shared_random: list[Any] = vmas.simulator.environment.Environment.vmas_random_state
        self._random = list(self._shared_random)
        try:
            with self._own_random():
                self._env = self._make(share.of if share else copies, seed)
            random = list(self._random)
            if share:
                # Random numbers are drawn for all copies at once, so all are reset, and the starts
                # of its own are taken over.
                self._all = self._env
                with self._own_random():
                    self._env = self._make(copies, seed)
                self._random = random
        except (AssertionError, TypeError, ValueError, RuntimeError) as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"vmas/{scenario} can't be made with {settings}: {cause}") from None
        self._packages = _packages(self._env)
        self._looks_are_kept = True  # until a look shows that they are not
        self._starts: Starts | None = None  # until a copy finishes before the others
        if share and not self._own_starts().possible:
            raise cant_be_split(f"vmas/{scenario}", "its resets do more than place what is there")
        names = tuple(agent.name for agent in self._env.agents)
        check(agents in {None, len(names)}, "agents", f"be {len(names)} in this scenario", agents)
        self.copies = copies
        self.share = share
        self._info = info
        observation_sizes = [space.shape[0] for space in self._env.observation_space.spaces]
        action_space, action_sizes = common_space(self._action_spaces())
        self.spec = EnvSpec(
            name=f"vmas/{scenario}",
            agent_names=names,
            observation_size=max(observation_sizes),
            action_space=action_space,
            observation_sizes=if_they_differ(observation_sizes),
            action_sizes=if_they_differ(action_sizes),
        )

    @torch.no_grad()
    def reset(self) -> Float[Tensor, "agent copy obs"]:
        """See `VectorEnv.reset`."""
        with self._own_random(), torch.inference_mode():
            seen = self._begin()
        return seen.clone()

    @torch.no_grad()
    def step(self, action: Int[Tensor, "agent copy"] | Float[Tensor, "agent copy action"]) -> Step:
        """See `VectorEnv.step`."""
        own: Iterable[Tensor] = action[..., None] if action.dim() == 2 else action
        if action.dim() == 3 and self.spec.action_sizes is not None:
            own = (a[:, :size] for a, size in zip(action, self.spec.action_sizes, strict=True))
        # Inference mode makes small steps faster. Its tensors cannot be written to in other modes,
        # so they stay in here; stacking and cloning makes ordinary ones.
        random = self._random
        with self._own_random(), torch.inference_mode():
            observations, rewards, terminated, truncated, infos = self._env.step(list(own))
        if self.share and not _same_random(random, self._random):
            raise cant_be_split(self.spec.name, "it draws random numbers in the course of episodes")
        final = self._stack(observations)
        reward = torch.stack([r.reshape(self.copies) for r in rewards]).float()
        terminated = terminated.clone()
        ended = terminated | truncated
        observation = final
        ended_of_all = self.share.group.whole(ended, 0) if self.share else ended
        if ended_of_all.any():
            with self._own_random(), torch.inference_mode():
                observation = self._restart(ended_of_all, final)
            observation = observation.clone()
        return Step(
            observation=observation,
            reward=reward,
            terminated=terminated,
            truncated=truncated & ~terminated,
            final_observation=final,
            info=_by_measure(infos, self.copies) if self._info else {},
        )

    @torch.no_grad()
    def render(self, copy: int) -> UInt8[np.ndarray, "height width 3"]:
        """See `VectorEnv.render`."""
        try:
            with self._own_random(), torch.inference_mode():
                frame = self._env.render(mode="rgb_array", env_index=copy)
        # A missing driver, library or display shows in as many ways as there are layers.
        except Exception as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            raise RenderingFailed(
                f"{self.spec.name} can't be drawn here ({cause}). Install OpenGL with EGL: apt-get "
                f"install {' '.join(RENDERING_PACKAGES)}"
            ) from None
        return np.ascontiguousarray(frame)

    def _restart(
        self, ended: Bool[Tensor, " copy"], final: Float[Tensor, "agent copy obs"]
    ) -> Float[Tensor, "agent copy obs"]:
        """Reset the finished copies, of all; returns what all agents of its own act on next."""
        if ended.all():
            return self._begin()
        copies, starts = ended.nonzero()[:, 0], self._own_starts()
        if starts.possible:
            own = self.share.own if self.share else slice(0, self.copies)
            return final.index_copy(1, *starts.into(self._env, copies, own))
        for copy in copies.tolist():
            self._env.reset_at(copy, return_observations=False)
        return final.index_copy(1, copies, self._look()[:, copies])

    def _begin(self) -> Float[Tensor, "agent copy obs"]:
        """Reset all copies; returns what the agents see then."""
        if self.share is None:
            return self._stack(self._env.reset())
        seen = self._stack(self._all.reset())
        self._own_starts().take_over(self._all, self._env, self.share.own)
        return seen[:, self.share.own]

    def _look(self) -> Float[Tensor, "agent copy obs"]:
        """What all agents see now; they see it, noise and all, but no copy takes note of it.

        A scenario may keep what was seen (road_traffic does, and rewards depend on it), and would
        keep it twice for the copies that go on.
        """
        kept = capture(self._env, self._packages) if self._looks_are_kept else None
        seen = self._stack(self._env.get_from_scenario(True, False, False, False)[0])
        if kept is not None:
            self._looks_are_kept = not _same(kept, capture(self._env, self._packages))
            if self._looks_are_kept:
                restore(self._env, self._packages, *kept)
        return seen

    def _own_starts(self) -> Starts:
        if self._starts is None:
            random = list(self._shared_random)
            with torch.inference_mode(False), torch.no_grad():
                env = self._make(MADE_AT_ONCE, seed=0)
                self._starts = Starts(env, _packages(env), self._stack)
            self._shared_random[:] = random
        return self._starts

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `VectorEnv.state`."""
        tensors, values = capture(self._env, self._packages)
        torch_state, (kind, keys, *rest), (version, words, gauss) = self._random
        tensors |= {
            _RANDOM[0]: torch_state.clone(),
            _RANDOM[1]: torch.from_numpy(keys.astype("int64")),
            _RANDOM[2]: torch.tensor(words),
        }
        if self._starts is not None:
            tensors |= {_STARTS + path: left for path, left in self._starts.state().items()}
        return tensors, values | {"numpy": [kind, rest], "python": [version, gauss]}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """See `VectorEnv.load_state`."""
        # Some of a scenario's attributes only come to be with the first step.
        self.reset()
        space, shape = self.spec.action_space, (self.spec.agents, self.copies)
        self.step(
            torch.zeros(shape, dtype=torch.int64)
            if isinstance(space, Discrete)
            else (space.low[:, None] if space.low.dim() == 2 else space.low).expand(*shape, -1)
        )
        starts = {
            name.removeprefix(_STARTS): x for name, x in tensors.items() if name.startswith(_STARTS)
        }
        if starts or self._starts is not None:
            self._own_starts().load_state(starts)
        inside = {
            path: x
            for path, x in tensors.items()
            if path not in _RANDOM and not path.startswith(_STARTS)
        }
        restore(self._env, self._packages, inside, values)
        kind, rest = values["numpy"]
        version, gauss = values["python"]
        self._random = [
            tensors[_RANDOM[0]].clone(),
            (kind, tensors[_RANDOM[1]].numpy().astype("uint32"), *rest),
            (version, tuple(tensors[_RANDOM[2]].tolist()), gauss),
        ]

    @contextlib.contextmanager
    def _own_random(self) -> Iterator[None]:
        """Swap in this environment's random state: VMAS keeps one for all that a process has."""
        others = list(self._shared_random)
        self._shared_random[:] = self._random
        try:
            yield
        finally:
            self._random = list(self._shared_random)
            self._shared_random[:] = others

    def _stack(self, observations: list[Tensor]) -> Tensor:
        if self.spec.observation_sizes is not None:
            longest = self.spec.observation_size
            observations = [functional.pad(x, (0, longest - x.shape[1])) for x in observations]
        return torch.stack(observations).float()

    def _action_spaces(self) -> list[Discrete] | list[Box]:
        spaces = self._env.action_space.spaces
        if not self._env.continuous_actions:
            return [Discrete(n=int(space.n)) for space in spaces]
        return [
            Box(low=torch.tensor(space.low).float(), high=torch.tensor(space.high).float())
            for space in spaces
        ]


def _make(
    vmas: Any,  # noqa: ANN401 -- vmas has no types
    scenario: str,
    settings: dict[str, Any],
    copies: int,
    seed: int,
) -> Any:  # noqa: ANN401
    return vmas.make_env(
        scenario=scenario,
        num_envs=copies,
        device="cpu",
        seed=seed,
        clamp_actions=True,
        terminated_truncated=True,
        **settings,
    )


def _packages(env: Any) -> tuple[str, ...]:  # noqa: ANN401
    """What the environment's state is made of; VMAS loads a scenario's file as a module."""
    return "vmas", "torch.distributions", type(env.scenario).__module__


def _same_random(one: list[Any], other: list[Any]) -> bool:
    """Whether two random states of VMAS, of torch, numpy and Python, are the same."""
    (tensor, (_, keys, *rest), plain), (tensor_2, (_, keys_2, *rest_2), plain_2) = one, other
    same = torch.equal(tensor, tensor_2) and plain == plain_2 and rest == rest_2
    return same and np.array_equal(keys, keys_2)


def _same(one: tuple[dict[str, Tensor], Any], other: tuple[dict[str, Tensor], Any]) -> bool:
    """Whether two captured states are the same."""
    (tensors, values), (others, other_values) = one, other
    return (
        values == other_values
        and tensors.keys() == others.keys()
        and all(
            torch.equal(x.nan_to_num(), others[path].nan_to_num()) for path, x in tensors.items()
        )
    )


def _import_vmas() -> Any:  # noqa: ANN401 -- vmas has no types
    """Import VMAS without the notice that gym, which it needs, prints about itself."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vmas.simulator.environment

    return vmas


def _by_measure(infos: list[dict[str, Tensor]], copies: int) -> dict[str, Tensor]:
    """What each agent's info says, agents side by side; what is not one number a copy is left."""
    names = dict.fromkeys(
        name for info in infos for name, value in info.items() if value.numel() == copies
    )
    nothing = torch.full((copies,), torch.nan)
    return {
        name: torch.stack([info.get(name, nothing).reshape(copies).float() for info in infos])
        for name in names
    }

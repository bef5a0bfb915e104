"""Multi-agent MuJoCo (Peng et al., 2021): the joints of one robot, shared out among agents.

Robots, partitions and local observations are those of gymnasium-robotics. Copies are stepped in
worker processes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from gradlab.checks import UsageError, check, unknown_name
from gradlab.extras import installed, require
from trainers.envs.vector_env import Box, EnvSpec, RenderingFailed, Step, VectorEnv
from trainers.envs.workers import Workers, processor_cores
from trainers.processes import Share

_KEPT = ("physics", "bodies", "elapsed")
_MODULES = ("gymnasium_robotics", "mujoco")
_RENDERING_PACKAGES = ("libegl1", "libgl1", "libgl1-mesa-dri")


class Robot(NamedTuple):
    """A robot of gymnasium-robotics.

    Attributes:
        label: Its name there.
        joints: Number of joints that are actuated; None: as many segments as a partition asks for,
            any AGENTSxSEGMENTS.
        partitions: Partitions that it knows there, or of many segments, the one that is listed.
    """

    label: str
    joints: int | None
    partitions: tuple[str, ...]

    def all_partitions(self) -> list[str]:
        """List what can be made.

        Returns:
            Its own partitions, every joint an agent of its own, and one agent for all.
        """
        if self.joints is None:
            return list(self.partitions)
        ends = f"{self.joints}x1", f"1x{self.joints}"
        return list(dict.fromkeys((*self.partitions, *ends)))


ROBOTS = {
    "ant": Robot("Ant", 8, ("2x4", "2x4d", "4x2")),
    "halfcheetah": Robot("HalfCheetah", 6, ("2x3", "6x1")),
    "hopper": Robot("Hopper", 3, ("3x1",)),
    "humanoid": Robot("Humanoid", 17, ("9|8",)),
    "humanoidstandup": Robot("HumanoidStandup", 17, ("9|8",)),
    "reacher": Robot("Reacher", 2, ("2x1",)),
    "pusher": Robot("Pusher", 7, ("3p",)),
    "swimmer": Robot("Swimmer", 2, ("2x1",)),
    "walker2d": Robot("Walker2d", 6, ("2x3",)),
    "inverted_pendulum": Robot("InvertedPendulum", 1, ()),
    "inverted_double_pendulum": Robot("InvertedDoublePendulum", 1, ()),
    "coupled_half_cheetah": Robot("CoupledHalfCheetah", 12, ("1p1",)),
    "manyagent_ant": Robot("ManySegmentAnt", None, ("2x3",)),
    "manyagent_swimmer": Robot("ManySegmentSwimmer", None, ("10x2",)),
}

_DEFAULTS: dict[str, Any] = {
    "agent_obsk": 1,
    "local_categories": None,
    "global_categories": None,
    "max_episode_steps": None,
    "standardise": False,
    "workers": None,
    "patience": 600,
}
_HERE = ("standardise", "workers", "patience")  # which the workers need not know


def mamujoco_names() -> list[str]:
    """List robots with their partitions.

    Returns:
        Names, of robots with many segments one each; empty if a package is not installed.
    """
    if not installed(*_MODULES):
        return []
    return [f"{name}-{part}" for name, robot in ROBOTS.items() for part in robot.all_partitions()]


class MujocoEnv(VectorEnv):
    """A robot whose joints are moved by several agents, who are all rewarded alike.

    By default agents see their own joints and the nearest others, and what is known of the whole
    robot, as in gymnasium-robotics (`agent_obsk` 1); all of the robot's state if it is None.
    """

    renders = True

    def __init__(
        self,
        name: str,
        *,
        copies: int,
        agents: int | None,
        seed: int,
        args: Mapping[str, Any],
        info: bool = False,
        share: Share | None = None,
    ) -> None:
        require("mamujoco", *_MODULES)
        robot, conf, joints_apart = find_partition(name)
        own = {**_DEFAULTS, **{key: args[key] for key in args if key in _DEFAULTS}}
        _check_arguments(own)
        self.copies = copies
        first = 0 if share is None else share.first
        self._standardise: bool = own["standardise"]
        self._settings = {
            **{key: value for key, value in own.items() if key not in _HERE},
            "label": robot.label,
            "conf": conf,
            "joints_apart": joints_apart,
            "robot": {key: value for key, value in args.items() if key not in _DEFAULTS},
            "measures": info,
            "seeds": [copy_seed(seed, first + copy) for copy in range(copies)],
        }
        self._workers = Workers(
            Path(__file__).with_name("mujoco_simulation.py"),
            environment=f"mamujoco/{name}",
            copies=copies,
            number=own["workers"] or processor_cores(),
            patience=own["patience"] or _DEFAULTS["patience"],
        )
        found = self._workers.start(self._settings)[0]
        if refused := found.get("refused"):
            self._workers.stop()
            raise _refusal(name, args, *refused)
        self._description: dict[str, Any] = found
        actuators: list[list[int]] = found["actuators"]
        count = len(actuators)
        check(agents in {None, count}, "agents", f"be {count} in this partition", agents)
        self._sees_all = not found["observation_sizes"]
        sizes: list[int] = found["observation_sizes"] or [found["state_size"]] * count
        # Where an agent's part of what the workers write is; the column beyond all parts is 0.
        self._columns = torch.full((count, max(sizes)), sum(sizes))
        for agent, (size, end) in enumerate(zip(sizes, np.cumsum(sizes).tolist(), strict=True)):
            self._columns[agent, :size] = torch.arange(end - size, end)
        owner = sorted(
            (actuator, agent, component)
            for agent, part in enumerate(actuators)
            for component, actuator in enumerate(part)
        )
        self._agent_of = torch.tensor([agent for _, agent, _ in owner])
        self._component_of = torch.tensor([component for _, _, component in owner])
        action_sizes = tuple(map(len, actuators))
        bounds = torch.ones(max(action_sizes))
        self.spec = EnvSpec(
            name=f"mamujoco/{name}",
            agent_names=tuple(f"agent_{i}" for i in range(count)),
            observation_size=max(sizes),
            action_space=Box(low=found["low"] * bounds, high=found["high"] * bounds),
            observation_sizes=tuple(sizes) if len(set(sizes)) > 1 else None,
            action_sizes=action_sizes if len(set(action_sizes)) > 1 else None,
            world_state_size=found["state_size"],
        )
        self._memory = self._shared()
        self._world_state = torch.zeros(copies, found["state_size"])

    def reset(self) -> Float[Tensor, "agent copy obs"]:
        """See `VectorEnv.reset`. After a worker has died this starts them all anew."""
        self._go_on()
        self._workers.ask("reset")
        self._world_state = self._state()
        return self._seen()

    def step(self, action: Int[Tensor, "agent copy"] | Float[Tensor, "agent copy action"]) -> Step:
        """See `VectorEnv.step`."""
        memory = self._memory
        memory["action"].copy_(action[self._agent_of, :, self._component_of].mT)
        self._workers.ask("step")
        terminated = memory["terminated"].clone()
        truncated = memory["truncated"] & ~terminated
        ended = terminated | truncated
        final, final_state = self._seen("final_"), self._state("final_")
        observation, self._world_state = final, final_state
        if ended.any():
            observation = torch.where(ended[:, None], self._seen(), final)
            self._world_state = torch.where(ended[:, None], self._state(), final_state)
        alike = self.spec.agents, self.copies
        return Step(
            observation=observation,
            reward=memory["reward"].float().repeat(self.spec.agents, 1),
            terminated=terminated,
            truncated=truncated,
            final_observation=final,
            final_world_state=final_state,
            info={
                name: measured.expand(alike)
                for name, measured in zip(
                    self._description["measures"], memory["measure"].clone().unbind(1), strict=True
                )
            }
            if self._settings["measures"]
            else {},
        )

    def world_state(self) -> Float[Tensor, "copy state"]:
        """All of the robots' state; see `VectorEnv.world_state`."""
        return self._world_state

    def render(self, copy: int) -> UInt8[np.ndarray, "height width 3"]:
        """See `VectorEnv.render`."""
        answer, data = self._workers.ask_of(copy, "render")
        if "missing" in answer:
            raise RenderingFailed(
                f"{self.spec.name} can't be drawn here ({answer['missing']}). Install OpenGL with "
                f"EGL: apt-get install {' '.join(_RENDERING_PACKAGES)}"
            )
        return np.frombuffer(data, np.uint8).reshape(answer["shape"]).copy()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `VectorEnv.state`."""
        generators = [state for part in self._workers.ask("save") for state in part]
        kept = {f"/{name}": self._memory[name].clone() for name in _KEPT}
        return {**kept, "/world_state": self._world_state.clone()}, {"generators": generators}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """See `VectorEnv.load_state`. After a worker has died this starts them all anew."""
        self._go_on()
        for name in _KEPT:
            saved, place = tensors[f"/{name}"], self._memory[name]
            if saved.shape != place.shape:
                raise UsageError(
                    f"{self.spec.name}: the saved {name} is {list(saved.shape)}, here it is "
                    f"{list(place.shape)}. Resume with the version of MuJoCo that saved it."
                )
            place.copy_(saved)
        self._world_state = tensors["/world_state"].clone()
        self._workers.ask("load", values["generators"])

    def _go_on(self) -> None:
        if not self._workers.running:
            self._workers.start(self._settings)
            self._memory = self._shared()

    def _shared(self) -> dict[str, Tensor]:
        """The arrays through which the workers and this process tell each other of every copy."""
        found, copies = self._description, self.copies
        seen = ("float32", (copies, sum(found["observation_sizes"]) + 1))
        state = ("float32", (copies, found["state_size"]))
        return self._workers.share({
            "action": ("float64", (copies, len(self._agent_of))),
            "reward": ("float64", (copies,)),
            "terminated": ("bool", (copies,)),
            "truncated": ("bool", (copies,)),
            "final_observation": seen,
            "observation": seen,
            "final_state": state,
            "state": state,
            "measure": ("float32", (copies, len(found["measures"]))),
            "elapsed": ("int64", (copies,)),
            "physics": ("float64", (copies, found["physics_size"])),
            "bodies": ("float64", (copies, 2, found["bodies"], 3)),
        })

    def _seen(self, moment: str = "") -> Float[Tensor, "agent copy obs"]:
        """Share out what the workers wrote among the agents."""
        if self._sees_all:
            return self._state(moment).repeat(self.spec.agents, 1, 1)
        seen = self._memory[f"{moment}observation"]
        own = self._columns[:, None] < seen.shape[1] - 1
        return self._scaled(seen[:, self._columns].transpose(0, 1).contiguous(), own)

    def _state(self, moment: str = "") -> Float[Tensor, "copy state"]:
        state = self._memory[f"{moment}state"].clone()
        return self._scaled(state, torch.ones(state.shape[1], dtype=torch.bool))

    def _scaled(self, values: Tensor, own: Tensor) -> Tensor:
        """Standardise over the last axis what is not padded, if that is asked for."""
        if not self._standardise:
            return values
        count = own.sum(-1, keepdim=True)
        away = torch.where(own, values - values.sum(-1, keepdim=True) / count, 0.0)
        scale = (away.square().sum(-1, keepdim=True) / count).sqrt()
        return away / scale.clamp(min=1e-6)


def copy_seed(seed: int, copy: int) -> int:
    """The seed of one copy: no two copies share one, whatever the environment's seed.

    Args:
        seed: The environment's.
        copy: The copy's number.

    Returns:
        A seed as gymnasium takes it.
    """
    return int(np.random.SeedSequence((seed, copy)).generate_state(1)[0])


def find_partition(name: str) -> tuple[Robot, str | None, bool]:
    """Find what a name means.

    Args:
        name: A robot's name, a hyphen and a partition.

    Returns:
        The robot; the partition that gymnasium-robotics knows, None for a single agent; and whether
        each joint of that is an agent of its own.

    Raises:
        UsageError: If there is no such robot or partition.
    """
    robot_name, _, partition = name.partition("-")
    if robot_name not in ROBOTS:
        raise unknown_name("MAMuJoCo robot", robot_name, ROBOTS)
    robot = ROBOTS[robot_name]
    if robot.joints is None:
        numbers = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", partition)
        if numbers is None or int(numbers[1]) * int(numbers[2]) < 2:
            raise UsageError(
                f"Unknown partition of {robot_name} {partition!r}. It has any number of agents "
                f"with any number of segments each, at least 2 in all, e.g. {robot.partitions[0]}."
            )
        return robot, partition, False
    if partition not in robot.all_partitions():
        raise unknown_name(f"partition of {robot_name}", partition, robot.all_partitions())
    if partition in robot.partitions:
        return robot, partition, False
    if partition == f"1x{robot.joints}":
        return robot, None, False
    return robot, robot.partitions[0], True


def _check_arguments(given: Mapping[str, Any]) -> None:
    """Raise unless what this adapter itself takes is of the right kind."""
    least_of = {"agent_obsk": 0, "max_episode_steps": 1, "workers": 1, "patience": 1}
    for name, least in least_of.items():
        value = given[name]
        whole = type(value) is int and value >= least
        check(
            value is None or whole, name, f"be a whole number of at least {least}, or null", value
        )
    check(
        type(given["standardise"]) is bool, "standardise", "be true or false", given["standardise"]
    )


def _refusal(
    name: str, args: Mapping[str, Any], what: str, why: str, known: list[str]
) -> UsageError:
    if what == "argument":
        return unknown_name(f"argument of mamujoco/{name}", why, [*_DEFAULTS, *known])
    return UsageError(f"mamujoco/{name} can't be made with {dict(args)}: {why}")

"""Copies of a MuJoCo robot in a worker process, see `trainers.envs.workers`; imports no torch."""

import contextlib
import inspect
import json
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.wrappers import TimeLimit
from gymnasium_robotics.envs.multiagent_mujoco import many_segment_ant, many_segment_swimmer
from gymnasium_robotics.envs.multiagent_mujoco.coupled_half_cheetah import CoupledHalfCheetahEnv
from gymnasium_robotics.envs.multiagent_mujoco.mujoco_multi import MultiAgentMujocoEnv
from gymnasium_robotics.envs.multiagent_mujoco.obsk import (
    Node,
    build_obs,
    get_joints_at_kdist,
    get_parts_and_edges,
)

Array = np.ndarray[Any, np.dtype[Any]]
Answer = Any
"""What JSON can hold."""

_MANY_SEGMENTS = {
    "ManySegmentAnt": ("Ant", many_segment_ant),
    "ManySegmentSwimmer": ("Swimmer", many_segment_swimmer),
}
_COUPLED = "CoupledHalfCheetah"
_SAVED = mujoco.mjtState.mjSTATE_INTEGRATION


class Refused(Exception):
    """What was asked for can't be made; says why."""


class DenseTendons:
    """A robot's data with Jacobians of its tendons as matrices, which MuJoCo 4 keeps sparse."""

    def __init__(self, data: Any) -> None:  # noqa: ANN401 -- an MjData
        """Stand before data.

        Args:
            data: The data.
        """
        self._data = data

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._data, name)

    @property
    def ten_J(self) -> Array:
        """Jacobian of every tendon's length [tendon, velocity]."""
        data, model = self._data, self._data.model
        if data.ten_J.ndim == 2:
            return np.asarray(data.ten_J)
        dense = np.zeros((model.ntendon, model.nv))
        rows = np.repeat(np.arange(model.ntendon), model.ten_J_rownnz)
        dense[rows, model.ten_J_colind] = data.ten_J
        return dense


class CoupledHalfCheetah(CoupledHalfCheetahEnv):  # type: ignore[misc]
    """gymnasium-robotics' own, which takes Jacobians of tendons for dense."""

    def _get_obs(self) -> Array:
        state: Array = CoupledHalfCheetahEnv._get_obs(SimpleNamespace(data=DenseTendons(self.data)))
        return state


class LocalObservations:
    """What all agents see of a robot, one after the other, as gymnasium-robotics gathers it.

    That goes through joints and bodies one by one, every time. What is copied from where, and cut
    off at which bounds, is found by having it gather numbered data; from then on that is one
    indexing. What is computed (sines of angles, distances) is gathered as ever.
    """

    _SOURCES = ("qpos", "qvel", "cinert", "cvel", "qfrc_actuator", "cfrc_ext")

    def __init__(self, gather: Callable[[Any], Array], robot: Any) -> None:  # noqa: ANN401
        """Find out.

        Args:
            gather: Gathers from an MjData.
            robot: A robot that has moved.
        """
        self._gather = gather
        data = mujoco.MjData(robot.model)
        sizes = [getattr(data, name).size for name in self._SOURCES]
        numbers = np.arange(1, sum(sizes) + 1) / (sum(sizes) + 1)  # within all bounds

        def gathered(shift: float) -> Array:
            for name, values in zip(
                self._SOURCES, np.split(numbers + shift, np.cumsum(sizes)[:-1]), strict=True
            ):
                array = getattr(data, name)
                array[:] = values.reshape(array.shape)
            return gather(data)

        seen, far = gathered(0), 1000.0  # beyond all bounds
        found = np.searchsorted(numbers, seen).clip(0, len(numbers) - 1)
        low, high = gathered(-far), gathered(far)
        self._index = found
        self._low = np.where(low == numbers[found] - far, -np.inf, low)
        self._high = np.where(high == numbers[found] + far, np.inf, high)
        self._bounded = bool(np.isfinite([self._low, self._high]).any())
        self._copies = np.array_equal(numbers[found], seen) and np.array_equal(
            self._indexed(self.sources(robot)), gather(robot.data)
        )

    def sources(self, robot: Any) -> list[Array]:  # noqa: ANN401
        """Look up where a robot's data stands.

        Args:
            robot: The robot.

        Returns:
            Flat arrays that follow what happens to it.
        """
        return [getattr(robot.data, name).reshape(-1) for name in self._SOURCES]

    def of(self, robot: Any, sources: Sequence[Array]) -> Array:  # noqa: ANN401
        """Gather.

        Args:
            robot: A robot.
            sources: Where its data stands.

        Returns:
            What the agents see of it.
        """
        return self._indexed(sources) if self._copies else self._gather(robot.data)

    def _indexed(self, sources: Sequence[Array]) -> Array:
        values: Array = np.concatenate(sources)[self._index]
        return np.clip(values, self._low, self._high) if self._bounded else values


class Simulation:
    """Some copies of one robot, stepped one after the other."""

    def __init__(self, settings: Mapping[str, Any], first: int, last: int) -> None:
        """Make them.

        Args:
            settings: `label`, the robot as gymnasium-robotics calls it, and its partition: `conf`,
                one that it knows, with `joints_apart` if each joint is to be an agent of its own,
                or no `conf` for a single agent; `agent_obsk`, `local_categories` and
                `global_categories` as it takes them, but that of several agents as well each sees
                the whole state if `agent_obsk` is None; `max_episode_steps`, None for the robot's
                own; `robot`, keyword arguments to it; `measures`, whether steps measure anything;
                and `seeds`, one for each copy of all.
            first: Number of its first copy.
            last: Number of the one after its last.

        Raises:
            Refused: If an argument of the robot is not known.
        """
        self._settings = settings
        self._slice = slice(first, last)
        with tempfile.TemporaryDirectory() as folder:
            make = self._maker(Path(folder))
            robots = [make() for _ in range(first, last)]
            self._limit = settings["max_episode_steps"] or robots[0].get_wrapper_attr(
                "_max_episode_steps"
            )
            self._robots = [robot.unwrapped for robot in robots]
            self._agents, gather = self._partition()
        robot = self._robots[0]
        robot.reset(seed=0)
        state, _, _, _, info = robot.step(np.zeros(robot.action_space.shape))
        self._state_size = len(state)
        self._measures = [name for name, value in info.items() if np.isscalar(value)]
        self._sizes = [len(seen) for seen in gather(robot.data)]
        self._local: LocalObservations | None = None
        if self._sizes:
            self._local = LocalObservations(lambda data: np.concatenate(gather(data)), robot)
            self._sources = [self._local.sources(robot) for robot in self._robots]
        for robot, seed in zip(self._robots, settings["seeds"][self._slice], strict=True):
            robot.np_random = gymnasium.utils.seeding.np_random(seed)[0]
        self._memory: dict[str, Array] = {}

    def description(self) -> Answer:
        """Say what it is.

        Returns:
            Sizes, bounds and names.
        """
        robot = self._robots[0]
        return {
            "actuators": self._agents,  # those of each agent
            "low": float(robot.action_space.low.min()),
            "high": float(robot.action_space.high.max()),
            "state_size": self._state_size,
            "observation_sizes": self._sizes,  # none if all see the whole state
            "measures": self._measures,
            "physics_size": mujoco.mj_stateSize(robot.model, _SAVED),
            "bodies": robot.model.nbody,
        }

    def attach(self, memory: mmap.mmap, layout: list[tuple[str, str, list[int], int]]) -> None:
        """Take the memory that is shared with the others.

        Args:
            memory: All of it.
            layout: Name, type, shape and offset of each array; all have a row for each copy.
        """
        self._memory = {
            name: np.ndarray(shape, kind, memory, offset)[self._slice]
            for name, kind, shape, offset in layout
        }

    def reset(self) -> None:
        """Start every copy anew."""
        for copy in range(len(self._robots)):
            self._restart(copy)

    def step(self) -> None:
        """Advance every copy by one step; those that finish start anew."""
        memory = self._memory
        for copy, robot in enumerate(self._robots):
            observation, reward, terminated, _, info = robot.step(memory["action"][copy])
            memory["elapsed"][copy] += 1
            truncated = memory["elapsed"][copy] >= self._limit
            memory["reward"][copy] = reward
            memory["terminated"][copy] = terminated
            memory["truncated"][copy] = truncated
            self._show(copy, observation, "final_")
            if self._settings["measures"]:
                memory["measure"][copy] = [info[name] for name in self._measures]
            if terminated or truncated:
                self._restart(copy)

    def save(self) -> Answer:
        """Put what the future depends on where all see it.

        Returns:
            The state of each copy's random generator.
        """
        for copy, robot in enumerate(self._robots):
            mujoco.mj_getState(robot.model, robot.data, self._memory["physics"][copy], _SAVED)
            # Where bodies are is a step behind the physics' state. Some robots' rewards count
            # how far they have come since.
            self._memory["bodies"][copy] = robot.data.xpos, robot.data.xipos
        return [robot.np_random.bit_generator.state for robot in self._robots]

    def load(self, generators: list[Any]) -> None:
        """Go on from what was saved.

        Args:
            generators: States of the random generators of all copies.
        """
        for copy, robot in enumerate(self._robots):
            mujoco.mj_resetData(robot.model, robot.data)
            mujoco.mj_setState(robot.model, robot.data, self._memory["physics"][copy], _SAVED)
            robot.data.xpos[:], robot.data.xipos[:] = self._memory["bodies"][copy]
            robot.np_random.bit_generator.state = generators[self._slice.start + copy]

    def render(self, copy: int) -> tuple[Answer, bytes]:
        """Draw a copy.

        Args:
            copy: Its number among all.

        Returns:
            The picture's shape, and its bytes; or what is missing, and nothing.
        """
        robot = self._robots[copy - self._slice.start]
        if sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")  # which needs no screen
        # A missing driver, library or display shows in as many ways as there are layers.
        try:
            frame = robot.mujoco_renderer.render("rgb_array")
        except Exception as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            return {"missing": cause}, b""
        return {"shape": frame.shape}, np.ascontiguousarray(frame).tobytes()

    def _restart(self, copy: int) -> None:
        observation, _ = self._robots[copy].reset()
        self._memory["elapsed"][copy] = 0
        self._show(copy, observation)

    def _show(self, copy: int, state: Array, moment: str = "") -> None:
        self._memory[f"{moment}state"][copy] = state
        if self._local is not None:
            self._memory[f"{moment}observation"][copy, :-1] = self._local.of(
                self._robots[copy], self._sources[copy]
            )

    def _maker(self, folder: Path) -> Callable[[], Any]:
        """What makes one robot; files of its own go to a folder."""
        label, arguments = self._settings["label"], self._settings["robot"]
        form, segments = _MANY_SEGMENTS.get(label, (label, None))
        known: set[str] = set()
        if label != _COUPLED:
            creator = load_env_creator(str(gymnasium.spec(f"{form}-v5").entry_point))
            known |= set(inspect.signature(creator).parameters) - {"kwargs"}
        if segments is not None:
            # The name that gymnasium-robotics itself gives this file is the same in all processes.
            agents, _, each = self._settings["conf"].partition("x")
            file = folder / "robot.xml"
            segments.gen_asset(n_segs=int(agents) * int(each), asset_path=str(file))
            arguments = {**arguments, "xml_file": str(file)}
            known -= {"xml_file"}
        for name in self._settings["robot"]:
            if name not in known:
                raise Refused("argument", name, sorted(known))
        if label == _COUPLED:
            return lambda: TimeLimit(CoupledHalfCheetah(), max_episode_steps=1000)
        return lambda: gymnasium.make(f"{form}-v5", disable_env_checker=True, **arguments)

    def _partition(self) -> tuple[list[list[int]], Callable[[Any], list[Array]]]:
        """The actuators of each agent, and what each sees of data if not the whole state."""
        settings = self._settings
        if settings["conf"] is None:
            actuators = [list(range(len(self._robots[0].data.ctrl)))]
        else:
            parts, edges, shared = get_parts_and_edges(settings["label"], settings["conf"])
            if settings["joints_apart"]:
                joints: list[Node] = sorted(sum(parts, ()), key=lambda joint: joint.act_ids)
                parts = [(joint,) for joint in joints]
            # Of joints named alike, as there are in Pusher, the order would be another one in each
            # process.
            labels = [joint.label for part in parts for joint in part]
            for joint in (joint for part in parts for joint in part):
                if labels.count(joint.label) > 1:
                    joint.label += f" {joint.act_ids}"
            actuators = [[joint.act_ids for joint in part] for part in parts]
        if settings["conf"] is None or settings["agent_obsk"] is None:
            return actuators, lambda _: []
        depth = settings["agent_obsk"]
        nearest = [get_joints_at_kdist(part, edges, depth) for part in parts]
        # The defaults are in a method, which only wants to know how deep to go.
        categories = settings["local_categories"] or MultiAgentMujocoEnv._generate_local_categories(
            SimpleNamespace(agent_obsk=depth), settings["label"]
        )
        of_all = settings["global_categories"] or ("qpos", "qvel")

        def local(data: Any) -> list[Array]:  # noqa: ANN401 -- an MjData
            readable = DenseTendons(data)
            return [build_obs(readable, near, categories, shared, of_all) for near in nearest]

        return actuators, local


def serve(connection: Connection, memory: int) -> None:
    """Do what is asked for until nobody asks any more.

    Args:
        connection: Brings requests, takes answers.
        memory: File descriptor of the memory that is shared.
    """

    def request() -> list[Any]:
        found: list[Any] = json.loads(connection.recv_bytes())
        return found

    def answer(value: Answer) -> None:
        connection.send_bytes(json.dumps(value).encode())

    _, settings, first, last = request()
    try:
        simulation = Simulation(settings, first, last)
    except Refused as refusal:
        answer({"refused": refusal.args})
        return
    # Arguments of the wrong kind show wherever they are first used.
    except Exception as error:
        cause = " ".join(str(error).split())
        answer({"refused": ["all", f"{type(error).__name__}: {cause}", []]})
        return
    answer(simulation.description())
    while True:
        command, *arguments = request()
        if command == "attach":
            simulation.attach(mmap.mmap(memory, 0), *arguments)
            answer(None)
        elif command == "render":
            value, data = simulation.render(*arguments)
            answer(value)
            connection.send_bytes(data)
        else:
            answer(getattr(simulation, command)(*arguments))


def say(text: str) -> None:
    """Print a warning of MuJoCo's, which would otherwise write it to a file where it is run.

    Args:
        text: The warning.
    """
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    mujoco.set_mju_user_warning(say)
    with contextlib.suppress(EOFError, ConnectionError):  # whoever asked is gone
        serve(Connection(int(sys.argv[1])), int(sys.argv[2]))

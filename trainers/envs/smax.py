"""SMAX battles (Rutherford et al., "JaxMARL", 2024) against JaxMARL's scripted enemy."""

import ast
import contextlib
import functools
import importlib.util
import inspect
import io
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from gradlab.checks import UsageError, check, unknown_name
from gradlab.extras import installed, require
from trainers.envs.vector_env import Discrete, EnvSpec, Step, VectorEnv
from trainers.processes import Share

CHOICES = {"attack_mode": ("closest", "random"), "observation_type": ("unit_list", "conic")}
"""What arguments that are words may be."""

_OF_MAP = {
    "num_allies",
    "num_enemies",
    "smacv2_position_generation",
    "smacv2_unit_type_generation",
}
_OWN = {"train_dead": False}
_ROBOTS = "jaxmarl.environments.mabrax"


def map_names() -> list[str]:
    """Read the names of the maps off JaxMARL's source, without importing it.

    Returns:
        Their names; none if JaxMARL is not installed.
    """
    if not installed("jax", "jaxmarl"):
        return []
    found = importlib.util.find_spec("jaxmarl")
    assert found is not None
    assert found.origin is not None
    file = Path(found.origin).parent / "environments" / "smax" / "smax_env.py"
    return [
        key.value
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Dict)
        and any(isinstance(t, ast.Name) and t.id == "MAP_NAME_TO_SCENARIO" for t in node.targets)
        for key in node.value.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    ]


@dataclass(frozen=True, kw_only=True)
class Battle:
    """A map's rules, compiled when first used with a number of copies.

    Attributes:
        env: JaxMARL's environment.
        jax: The package.
        start: From a key of each copy: its state, and what is seen then; for copies that are to
            begin anew (a mask), in place of a state and what is seen.
        step: From the copies' keys, states and actions: the next keys, the keys of the episodes
            that may begin then, states, what is seen, and what the step brought.
        nothing: States and what is seen, all zeros, of so many copies.
    """

    env: Any
    jax: Any
    start: Callable[..., Any]
    step: Callable[..., Any]
    nothing: Callable[[int], Any]


@functools.lru_cache(maxsize=8)
def battle(name: str, settings: tuple[tuple[str, Any], ...]) -> Battle:
    """Make a map's rules, the same object for the same settings, so they are compiled once.

    Args:
        name: The map.
        settings: Keyword arguments of JaxMARL's environment.

    Returns:
        The rules.
    """
    jax, smax = _import_jaxmarl()
    numpy = jax.numpy
    env = smax.HeuristicEnemySMAX(scenario=smax.map_name_to_scenario(name), **dict(settings))
    allies = env.num_allies

    def by_agent(values: Mapping[str, Any]) -> Any:  # noqa: ANN401 -- arrays of jax
        return numpy.stack([values[agent] for agent in env.agents])

    def seen(observations: Mapping[str, Any], state: Any) -> dict[str, Any]:  # noqa: ANN401
        return {
            "observation": by_agent(observations),
            "world_state": observations["world_state"],
            "available": by_agent(env.get_avail_actions(state)).astype(bool),
        }

    def first(key: Any) -> Any:  # noqa: ANN401
        observations, state = env.reset(key)
        return state, seen(observations, state)

    def start_one(key: Any, anew: Any, *before: Any) -> Any:  # noqa: ANN401
        # JaxMARL's reset has other types than its step; both compile once if this one keeps them.
        return jax.tree.map(
            lambda new, old: numpy.where(anew, new.astype(old.dtype), old), first(key), before
        )

    def step_one(key: Any, state: Any, action: Any) -> Any:  # noqa: ANN401
        key, now = jax.random.split(key)
        now, afterwards = jax.random.split(now)  # as JaxMARL's own `step` does
        actions = {agent: action[i] for i, agent in enumerate(env.agents)}
        observations, after, reward, done, _ = env.step_env(now, state, actions)
        after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)
        alive = after.state.unit_alive
        brought = {
            "reward": by_agent(reward),
            "alive": alive[:allies],
            "ended": done["__all__"],
            "terminated": ~alive[:allies].any() | ~alive[allies:].any(),
            "won": alive[:allies].any() & ~alive[allies:].any(),
        }
        return key, afterwards, after, seen(observations, after), brought

    axes = {"observation": 1, "world_state": 0, "available": 1}
    of_step = {"reward": 1, "alive": 1, "ended": 0, "terminated": 0, "won": 0}
    start = jax.vmap(start_one, in_axes=(0, 0, 0, axes), out_axes=(0, axes))
    step = jax.vmap(step_one, in_axes=(0, 0, 1), out_axes=(0, 0, 0, axes, of_step))

    @functools.cache
    def nothing(copies: int) -> Any:  # noqa: ANN401
        keys = jax.ShapeDtypeStruct((copies, 2), numpy.uint32)
        shapes = jax.eval_shape(jax.vmap(first, out_axes=(0, axes)), keys)
        return jax.tree.map(lambda shape: numpy.zeros(shape.shape, shape.dtype), shapes)

    # One thread, as torch has by default: small steps are not faster with more.
    compiled = functools.partial(jax.jit, compiler_options={"xla_cpu_multi_thread_eigen": False})
    return Battle(env=env, jax=jax, start=compiled(start), step=compiled(step), nothing=nothing)


class SmaxEnv(VectorEnv):
    """A SMAX map: allies learn, JaxMARL's heuristic plays the enemy.

    An episode ends (terminated) when a side is dead, and is cut off (truncated) after `max_steps`,
    100 by default. Units that die leave it, unless `train_dead` is true: then they go on with the
    one action that they have, and what their side earns, as in JaxMARL's own baselines.
    """

    def __init__(
        self,
        name: str,
        *,
        copies: int,
        agents: int | None,
        seed: int,
        args: Mapping[str, Any],
        info: bool = False,  # noqa: ARG002 -- it measures nothing but who won
        share: Share | None = None,
    ) -> None:
        require("smax", "jax", "jaxmarl")
        maps = map_names()
        if name not in maps:
            raise unknown_name("SMAX map", name, maps)
        settings = _checked(name, args)
        self._train_dead = settings.pop("train_dead", False)
        self._battle = battle(name, tuple(sorted(settings.items())))
        env = self._battle.env
        check(
            agents in {None, env.num_agents}, "agents", f"be {env.num_agents} on this map", agents
        )
        self.copies = copies
        self.spec = EnvSpec(
            name=f"smax/{name}",
            agent_names=tuple(env.agents),
            observation_size=env.obs_size,
            action_space=Discrete(n=env.num_ally_actions),
            world_state_size=env.state_size,
            outcomes=("win",),
        )
        jax = self._battle.jax
        self._cpu = jax.devices("cpu")[0]
        with jax.default_device(self._cpu):
            keys = jax.random.split(jax.random.PRNGKey(seed), share.of if share else copies)
            keys = keys[share.own] if share else keys
        # All that the rest depends on. What is on a device on purpose stays there: no GPU is used.
        self._now = jax.device_put({"keys": keys}, self._cpu)

    def reset(self) -> Float[Tensor, "agent copy obs"]:
        """See `VectorEnv.reset`."""
        jax = self._battle.jax
        with jax.default_device(self._cpu):
            keys, now = jax.numpy.moveaxis(jax.vmap(jax.random.split)(self._now["keys"]), 1, 0)
            anew = jax.numpy.ones(self.copies, bool)
            nothing = self._battle.nothing(self.copies)
        battles, seen = self._battle.start(*jax.device_put((now, anew, *nothing), self._cpu))
        self._now = {"keys": keys, "battles": battles, "seen": seen}
        return _tensors(seen)["observation"]

    def step(self, action: Int[Tensor, "agent copy"] | Float[Tensor, "agent copy action"]) -> Step:
        """See `VectorEnv.step`."""
        moves = self._battle.jax.numpy.from_dlpack(action.to(torch.int32).contiguous())
        keys, afterwards, battles, seen, brought = self._battle.step(
            self._now["keys"], self._now["battles"], moves
        )
        final, step = _tensors(seen), _tensors(brought)
        following = final
        if step["ended"].any():
            battles, seen = self._battle.start(afterwards, brought["ended"], battles, seen)
            following = _tensors(seen)
        self._now = {"keys": keys, "battles": battles, "seen": seen}
        return Step(
            observation=following["observation"],
            reward=step["reward"],
            terminated=step["terminated"],
            truncated=step["ended"] & ~step["terminated"],
            final_observation=final["observation"],
            active=None if self._train_dead else step["alive"],
            final_world_state=final["world_state"],
            outcomes={"win": step["won"]},
        )

    def action_mask(self) -> Bool[Tensor, "agent copy action"]:
        """See `VectorEnv.action_mask`; who is dead can only stop."""
        return _tensors(self._now["seen"])["available"]

    def world_state(self) -> Float[Tensor, "copy state"]:
        """See `VectorEnv.world_state`: health, position, cooldown and kind of every unit."""
        return _tensors(self._now["seen"])["world_state"]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `VectorEnv.state`."""
        leaves, _ = self._battle.jax.tree_util.tree_flatten_with_path(self._now)
        return {_place(path): from_dlpack(leaf).clone() for path, leaf in leaves}, {}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:  # noqa: ARG002
        """See `VectorEnv.load_state`."""
        jax = self._battle.jax
        self.reset()  # a state is put in the place of another
        places = {_place(path) for path, _ in jax.tree_util.tree_leaves_with_path(self._now)}
        if differing := places ^ tensors.keys():
            raise UsageError(
                f"the saved state of {self.spec.name} and the simulator differ in "
                f"{min(differing)!r}. Resume with the version of JaxMARL that saved it."
            )
        self._now = jax.tree_util.tree_map_with_path(
            lambda path, _: jax.numpy.from_dlpack(tensors[_place(path)].clone()), self._now
        )


def _checked(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, if the map can be made with them."""
    _, smax = _import_jaxmarl()
    known: dict[str, Any] = dict(_OWN)
    for made in (smax.SMAX, smax.HeuristicEnemySMAX):
        for argument, parameter in inspect.signature(made.__init__).parameters.items():
            if type(parameter.default) in {bool, int, float} or argument in CHOICES:
                known[argument] = parameter.default
    known = {argument: default for argument, default in known.items() if argument not in _OF_MAP}
    for argument, value in args.items():
        if argument not in known:
            raise unknown_name(f"argument of smax/{name}", argument, sorted(known))
        if argument in CHOICES:
            choices = CHOICES[argument]
            check(value in choices, argument, f"be one of {', '.join(choices)}", value)
            continue
        kind = type(known[argument])
        fits = type(value) is kind or (kind is float and type(value) is int)
        check(fits, argument, f"be of type {kind.__name__}", value)
        if kind is int:
            check(value >= 1, argument, "be at least 1", value)
        elif argument == "time_per_step":
            check(value > 0, argument, "be above 0", value)
    return dict(args)


def _tensors(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Hand arrays over without copying them; they must not be written to."""
    return {name: from_dlpack(array) for name, array in arrays.items()}


def _place(path: tuple[Any, ...]) -> str:
    """Where something stands in the state."""
    return "".join(f"/{getattr(part, 'key', getattr(part, 'name', part))}" for part in path)


def _import_jaxmarl() -> tuple[Any, Any]:
    """Import jax and JaxMARL's SMAX, without what the latter prints of what it lacks."""
    alone = "jax" not in sys.modules
    modules: dict[str, Any] = sys.modules
    if "jaxmarl" not in modules:
        # Its robots turn sys.stdout and sys.stderr to the console's when they are looked for.
        modules[_ROBOTS] = None
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jax

        if alone:  # whoever uses jax already may need its other devices
            jax.config.update("jax_platforms", "cpu")
        from jaxmarl.environments import smax
    if _ROBOTS in modules and modules[_ROBOTS] is None:
        del modules[_ROBOTS]
    return jax, smax
